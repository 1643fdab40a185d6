"""Ten training steps on eight devices, spread in several ways, beside the same steps on one: a program, since devices
are made once a process. It prints one JSON object a mesh: the largest relative difference of a loss (of an evaluation
too), the largest of a parameter by plain gradient descent, the error ratio of all parameters by AdamW, and how far
descent moved them.

    python -m tests.training.on_meshes gla,attention data=8 sequence=8 data=2+sequence=2+tensor=2

A pattern may end in /bidirectional, /classes or /values. `descent` leaves AdamW out, names of implementations choose
kernels.
"""

import json
import sys
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from flax import nnx

from kernels import dispatch
from zoo import config, heads, sharding
from zoo.checkpoints import named_leaves
from zoo.config import Config, pattern
from zoo.config_files import family_config
from zoo.mixers import MIXERS
from zoo.training import placement, step

MESHES = ("data=8", "fsdp=8", "fsdp=4+tensor=2", "sequence=8", "data=2+sequence=2+tensor=2")
STEPS, ROWS, TIME = 10, 8, 48
# Norms of heads, and mLSTM's division, make much of what is near 0 at the first tokens of a document: with larger
# steps, or the usual epsilon, rounding grows from step to step.
DESCENT = optax.sgd(0.02)


def make_config(mixer: str) -> Config:
    """A model of two layers of the pattern's families, whose sizes every mesh divides."""
    c = config.preset("tiny")
    c.model.mixer, _, kind = mixer.partition("/")
    if kind in heads.HEADS:
        c.model.head, c.model.classes, c.model.horizon = kind, 8, 8
        c.model.channels, c.model.patch = (2, 3) if kind == "values" else (0, 1)
    else:
        c.model.direction = kind or c.model.direction
    c.model.vocab_size, c.model.d_model, c.model.d_ff = 64, 32, 32
    c.model.num_layers = max(2, len(pattern(c.model)))
    for family in pattern(c.model):
        section = getattr(c.model, family)
        small = {"num_heads": 2, "num_kv_heads": 2, "state_dim": 4, "head_dim": 16 if family == "mamba2" else 4}
        for name, value in small.items():
            if hasattr(section, name) and not (family == "attention" and name == "head_dim"):
                setattr(section, name, value)
    c.model.norm_epsilon = 1e-2
    if mixer in MIXERS:
        c.model.mlp = family_config(mixer).model.mlp
    c.train.batch_size, c.train.context_length, c.train.steps = ROWS, TIME * c.model.patch, STEPS
    c.eval.batch_size = ROWS
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.schedule = "adamw", 1e-3, "constant"
    c.model.dropout = 0.1
    if "," in mixer:  # a hybrid's attention does not turn its queries and keys; layers alike are scanned
        c.model.positions, c.model.max_positions, c.model.remat = "learned", TIME, "full"
    return c


def batches(c: Config) -> list[dict[str, np.ndarray]]:
    """Packed rows: of each, documents that end within a device's part of the time, at its end, and far from it. Of
    classes, rows of any length; of values, noise."""
    rng, made = np.random.default_rng(0), []
    arrays = {"label": (8, (ROWS,)), "lengths": (TIME, (ROWS,)), "tokens": (64, (ROWS, TIME))}
    for _ in range(STEPS if c.model.head != "tokens" else 0):
        drawn = {name: rng.integers(0, top, shape, dtype=np.int32) for name, (top, shape) in arrays.items()}
        drawn = drawn | {"lengths": drawn["lengths"] + 1} if c.model.head == "classes" else {}
        steps = c.train.context_length + c.model.horizon
        numbers = {"values": rng.random((ROWS, steps, c.model.channels), np.float32)} if c.model.channels else {}
        made.append(drawn | numbers | {"weights": np.ones(ROWS, np.float32)})
    for _ in range(STEPS - len(made)):
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


class Run(NamedTuple):
    losses: np.ndarray  # of the steps, and of an evaluation after them
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]


def run(c: Config, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation | None = None) -> Run:
    """The steps of `batches`; `optimizer`: in place of the config's."""
    make = step.make_optimizer if optimizer is None else lambda *_: optimizer
    with mock.patch.object(step, "make_optimizer", make):
        programs = step.build(c, mesh)
    state, losses = programs.init(), []
    start = _arrays(state.params)
    for batch in batches(c):
        state, metrics = programs.train(state, programs.put(batch))
        losses.append(float(metrics["loss"]))
    batch |= {"bytes": batch["weights"]} if c.model.head == "tokens" else {}
    evaluation = programs.evaluate(state.params, programs.put(batch))
    losses.append(heads.of(c.model).figures({name: float(x) for name, x in evaluation.items()})["eval_loss"])
    return Run(np.array(losses), start, _arrays(state.params))


def _arrays(params: nnx.State) -> dict[str, np.ndarray]:
    return {name: np.asarray(p) for name, p in named_leaves(params).items()}


def largest(a: Run, b: Run) -> float:
    """Difference of a parameter, relative to the largest entry of its array (or to 0.01, for what starts at 0)."""
    return np.max([np.max(np.abs(a.end[name] - p)) / max(np.max(np.abs(p)), 1e-2) for name, p in b.end.items()])


def ratio(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """|a - b| / |b|, of all parameters together."""
    norm = lambda arrays: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))  # noqa: E731
    return norm([a[name] - p for name, p in b.items()]) / norm(b.values())


def main(mixer: str, meshes: list[str], implementations: list[str], only_descent: bool) -> None:
    c = make_config(mixer)
    optimizers = [DESCENT] if only_descent else [DESCENT, None]
    with dispatch.use_implementation(*implementations):
        one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        alone = [run(c, one, optimizer) for optimizer in optimizers]
        for name in meshes:
            sizes = {axis: int(size) for axis, size in (part.split("=") for part in name.split("+"))}
            c.mesh = sharding.MeshConfig(**{"data": 1} | sizes)
            placement.check(c, 8)
            mesh = sharding.make_mesh(c.mesh)
            there = [run(c, mesh, optimizer) for optimizer in optimizers]
            losses = [np.max(np.abs(a.losses / b.losses - 1)) for a, b in zip(there, alone, strict=True)]
            found = {
                "loss": np.max(losses),  # nan if one is
                "parameter": largest(there[0], alone[0]),
                "adamw": ratio(there[-1].end, alone[-1].end),
                "moved": ratio(alone[0].end, alone[0].start),
            }
            print(json.dumps({"mesh": name} | {what: float(value) for what, value in found.items()}), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    arguments = [argument for argument in sys.argv[2:] if argument != "descent"]
    named = [argument for argument in arguments if "=" in argument]
    implementations = [argument for argument in arguments if "=" not in argument]
    main(sys.argv[1], named or list(MESHES), implementations, only_descent="descent" in sys.argv)
