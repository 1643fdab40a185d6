"""Ten training steps on eight devices, spread in several ways, beside the same on one: a program, since devices are
made once a process. Prints one JSON object a mesh: the largest relative difference of a loss, of a parameter by plain
gradient descent, and the error ratio of all parameters by AdamW.

    python -m tests.training.on_meshes gla,attention data=8 sequence=8 data=2+sequence=2+tensor=2
"""

import json
import sys
from unittest import mock

import jax
import numpy as np
import optax

from kernels import dispatch
from zoo import config, sharding
from zoo.checkpoints import named_leaves
from zoo.config import Config, pattern
from zoo.training import placement, step

MESHES = ("data=8", "fsdp=8", "fsdp=4+tensor=2", "sequence=8", "data=2+sequence=2+tensor=2")
STEPS, ROWS, TIME = 10, 8, 48


def make_config(mixer: str) -> Config:
    """A model of two layers of the pattern's families, whose sizes every mesh divides."""
    c = config.preset("tiny")
    c.model.mixer, c.model.vocab_size, c.model.d_model, c.model.d_ff = mixer, 64, 32, 32
    c.model.num_layers = max(2, len(pattern(c.model)))
    for family in pattern(c.model):
        section = getattr(c.model, family)
        small = {"num_heads": 2, "num_kv_heads": 2, "state_dim": 4, "head_dim": 16 if family == "mamba2" else 4}
        for name, value in small.items():
            if hasattr(section, name) and not (family == "attention" and name == "head_dim"):
                setattr(section, name, value)
    # Norms of heads divide by what is near 0 at the first tokens of a document: rounding would grow from step to step.
    c.model.norm_epsilon = 1e-2
    if mixer == "rwkv6":
        c.model.mlp = "channel_mixing"
    c.train.batch_size, c.train.context_length, c.train.steps = ROWS, TIME, STEPS
    c.eval.batch_size = ROWS
    c.optimizer.name, c.optimizer.warmup_steps, c.optimizer.schedule = "adamw", 1, "constant"
    return c


def batches() -> list[dict[str, np.ndarray]]:
    """Packed rows: of each, documents that end within a device's part of the time, at its end, and far from it."""
    rng, made = np.random.default_rng(0), []
    for _ in range(STEPS):
        tokens = rng.integers(0, 64, (ROWS, TIME + 1), dtype=np.int32)
        starts = rng.random((ROWS, TIME)) < 0.05
        starts[0] = np.arange(TIME) % 6 == 0  # where parts of eight devices start
        starts[1] = False
        made.append(
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "segment_ids": np.cumsum(starts, 1, dtype=np.int32) % 2,  # 0, 1, 0: three documents
                "weights": (rng.random((ROWS, TIME)) < 0.9).astype(np.float32),
            }
        )
    return made


def run(c: Config, mesh: jax.sharding.Mesh, optimizer=None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses of the steps, and the parameters after them."""
    make = step.make_optimizer if optimizer is None else lambda *_: optimizer
    with mock.patch.object(step, "make_optimizer", make):
        programs = step.build(c, mesh)
    state, losses = programs.init(), []
    for batch in batches():
        state, metrics = programs.train(state, programs.put(batch))
        losses.append(float(metrics["loss"]))
    return np.array(losses), {name: np.asarray(p) for name, p in named_leaves(state.params).items()}


def main(mixer: str, meshes: list[str], implementations: list[str]) -> None:
    c = make_config(mixer)
    with dispatch.use_implementation(*implementations):
        one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        descent, adam = run(c, one, optax.sgd(0.1)), run(c, one)
        for name in meshes:
            sizes = dict(part.split("=") for part in name.split("+"))
            c.mesh = sharding.MeshConfig(**{"data": 1} | {axis: int(size) for axis, size in sizes.items()})
            placement.check(c, 8)
            mesh = sharding.make_mesh(c.mesh)
            (losses, params), (adam_losses, adam_params) = run(c, mesh, optax.sgd(0.1)), run(c, mesh)
            relative = max(
                np.max(np.abs(a - b) / np.abs(b)) for a, b in ((losses, descent[0]), (adam_losses, adam[0]))
            )
            moved = {name: np.max(np.abs(p - descent[1][name])) for name, p in params.items()}
            scale = {name: np.max(np.abs(p)) for name, p in descent[1].items()}
            wrong, size = (
                np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in values))
                for values in ([adam_params[name] - p for name, p in adam[1].items()], adam[1].values())
            )
            worst = max(moved, key=lambda name: moved[name] / max(scale[name], 1e-2))
            print(
                json.dumps(
                    {
                        "mesh": name,
                        "loss": float(relative),
                        "parameter": float(moved[worst] / max(scale[worst], 1e-2)),
                        "worst": worst,
                        "adamw": float(wrong / size),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    named = [argument for argument in sys.argv[2:] if "=" in argument]
    main(sys.argv[1], named or list(MESHES), [argument for argument in sys.argv[2:] if "=" not in argument])
