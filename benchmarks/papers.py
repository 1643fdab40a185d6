"""Published set-ups, run again: `python -m benchmarks.papers h3 | mamba_copying | mamba_induction | state_tracking`.

h3: H3's two synthetic tasks (arXiv:2212.14052) at full budget: 5,000 training and 500 test rows, 2 layers of width 32,
  400 and 200 epochs, a tenth of them warm-up. As in the released code: LayerNorms, biases, MLPs without a gate (a gate
  is a product, the thing that S4D lacks), one A for all channels of S4D, initial matrices of std 0.02, weight decay on
  all but A, B and dt. Not as there: no dropout in attention, whose initial matrices are the model's own (std
  1 / sqrt(inputs)): from 0.02 it did not find induction heads in 400 epochs (one seed).
mamba_copying, mamba_induction: Mamba's tasks (arXiv:2312.00752) in reduced forms for a CPU: copying from 128 tokens
  (published: from 4096), 8 of them in width 32, or as published 16 in width 64; induction heads trained at 64 and
  tested up to 4096 (published: 256 and 2^20) in width 64. Fresh data, 2 layers without MLPs.
state_tracking: parity (arXiv:2411.12537) and word problems of S3, A5 and S5 (arXiv:2502.10297), in reduced forms for
  a CPU: trained on 32 and 16 tokens (published: up to 40, and 128) and tested there and at 4 times the length, on the
  state after the last token. One layer of width 64 with an MLP, fresh data, every token's state a target.

The test rows choose nothing: the last step's weights are tested, once. Medians over seeds, with the range.

Each run is kept in benchmarks/results/ when it ends, with its date and machine, and is not repeated by the same command
(--again does): a table may be made in parts. Seeds run side by side, one a core of those that the process may use; of
fewer seeds than cores, each shares out its rows over several. A run's seconds are those of its group, divided among it.
"""

import argparse
import dataclasses
import functools
import json
import math
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from benchmarks import record
from zoo.config import Config, OptimizerConfig
from zoo.data.synthetic import Batch, Task, make
from zoo.errors import UsageError, exit_with_message
from zoo.mixers import MIXERS
from zoo.model import LanguageModel
from zoo.settings import argument
from zoo.training.optimizer import make_optimizer
from zoo.training.schedules import schedule

TRAIN_ROWS, TEST_ROWS = 5000, 500


@dataclasses.dataclass
class Setup:
    """One model on one task."""

    task: Task
    mixer: str
    published: str  # accuracy in per cent, or what was found
    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    rows: int = 0  # of a training set that is passed over again and again; 0: fresh data
    d_model: int = 32
    d_ff: int = 0  # of a GELU MLP; 0: no MLP
    embedding_dropout: float = 0.0
    init_std: float = 0.0  # of matrices; 0: the model's own
    as_gpt2: bool = False  # norms of mean and variance, and biases everywhere, in place of RMS norms and none
    undecayed: tuple[str, ...] = ()  # parameters without weight decay, every other has it; (): the trainer's choice
    test_lengths: tuple[int, ...] = ()  # beside the task's own
    settings: dict = dataclasses.field(default_factory=dict)  # of the mixer
    model: dict = dataclasses.field(default_factory=dict, repr=False)  # of the model, beside what stands above
    label: str = dataclasses.field(default="", repr=False)  # in the table and of its runs; "": the task's name

    def __post_init__(self):
        self.label = self.label or self.task.name

    @property
    def description(self) -> str:
        """All that a result depends on."""
        return repr(self) + (f" {self.model}" if self.model else "")


def h3_setups() -> Iterator[Setup]:
    published = {"attention": ("100.0", "100.0"), "h3": ("100.0", "99.8"), "s4d": ("35.6", "86.0")}
    tasks = [
        (make("induction_heads", vocab_size=20, length=30), 400, "cosine", 0.1),
        (make("associative_recall", vocab_size=10, length=20), 200, "linear", 0.0),
    ]
    settings = {
        "attention": {"num_heads": 1},
        "h3": {"state_dim": 64, "discretization": "bilinear"},
        "s4d": {"state_dim": 64, "init": "inv", "n_ssm": 1},
    }
    for number, (task, epochs, decay, final) in enumerate(tasks):
        for mixer, figures in published.items():
            steps = epochs * (TRAIN_ROWS // 32)
            yield Setup(
                task,
                mixer,
                figures[number],
                steps,
                32,
                OptimizerConfig(
                    learning_rate=5e-4,
                    schedule=decay,
                    warmup_steps=steps // 10,
                    final_fraction=final,
                    b2=0.999,
                    clip_norm=0.0,
                ),
                rows=TRAIN_ROWS,
                d_ff=128,
                embedding_dropout=0.1,
                init_std=0.0 if mixer == "attention" else 0.02,
                as_gpt2=True,
                undecayed=("log_dt", "log_rate", "frequency", "b_real", "b_imag", "b"),
                settings=settings[mixer],
            )


def mamba_copying_setups() -> Iterator[Setup]:
    """From a 32nd of the published length: S4D starts from 32 times its usual dt, so that its longest memory,
    2 / dt_min tokens, is half of the length, as published. What Mamba forgets, tokens decide: its dt starts as usual.

    As many tokens as published, in as wide a model, and half of both: what S4D copies, it copies by having room.
    """
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=200, final_fraction=0.0)
    in_proportion = {"state_dim": 16, "dt_min": 32e-3, "dt_max": 3.2}  # of as large a state as Mamba's
    for copies, width, steps, label in ((8, 32, 4000, "copying_8"), (16, 64, 6000, "")):
        task = make("selective_copying", vocab_size=16, length=128, copies=copies)
        for mixer, published, settings in (("mamba", "99.8", {}), ("s4d", "18.3", in_proportion)):
            yield Setup(task, mixer, published, steps, 32, optimizer, d_model=width, settings=settings, label=label)


def mamba_induction_setups() -> Iterator[Setup]:
    """To hold on to a token 64 times as long as ever asked to, a short run needs channels that are slow from the start
    and a b2 of 0.999: with 0.95 what it learns it loses again once the loss is near 0 (docs/benchmarks.md).
    """
    task = make("induction_heads", vocab_size=18, length=64)  # 16 regular tokens
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=400, final_fraction=0.0, weight_decay=0.0, b2=0.999)
    lengths = tuple(2**i for i in range(7, 13))
    settings = {"dt_min": 1e-4}
    yield Setup(task, "mamba", "100", 12_000, 8, optimizer, d_model=64, test_lengths=lengths, settings=settings)


def state_tracking_setups() -> Iterator[Setup]:
    """What a transition can follow: decays and corrections of b up to 1 forget, of b up to 2 they reflect, and n
    reflections a token make what moves n dimensions.

    Published, where the papers have the row: whether it was solved at lengths beyond the training's (parity), or at the
    training's (word problems; n steps of which DeltaProduct).
    """
    model = {"num_layers": 1, "positions": "none"}
    rotary = model | {"positions": "rope"}  # learned positions end where training did
    sizes = {"d_model": 64, "d_ff": 128}
    task, lengths = make("parity", length=32), (128,)
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.0)
    bounded = {name: {"num_heads": 4} for name in ("delta_net", "gated_delta_net", "kda", "gated_delta_product")}
    bounded["gated_delta_product"]["forget_gate"] = False
    published = {name: "not solved" for name in ("attention", "mlstm", "mamba", "delta_net")}
    runs = [("parity", mixer, published.get(mixer, "-"), {}) for mixer in MIXERS if mixer not in bounded]
    for bound in (1.0, 2.0):
        for mixer, settings in bounded.items():
            found = {1.0: "not solved", 2.0: "solved"}[bound] if mixer in ("delta_net", "gated_delta_product") else "-"
            runs.append((f"parity b<={bound:.0f}", mixer, found, settings | {"beta_max": bound}))
    for label, mixer, found, settings in runs:
        setup = Setup(task, mixer, found, 1000, 32, optimizer, test_lengths=lengths, settings=settings, **sizes)
        yield dataclasses.replace(setup, label=label, model=rotary if mixer == "attention" else model)

    optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
    for group, needed in {"S3": 2, "A5": 2, "S5": 4}.items():  # steps a token that solve it
        task, lengths = make(f"word_problem:{group}", length=16), (64,)
        runs = [(group, "attention", "-", {})]
        for steps in (1, 2, 4):
            settings = bounded["gated_delta_product"] | {"num_householder": steps}
            found = "solved" if steps >= needed else "not solved"
            runs.append((f"{group} n={steps}", "gated_delta_product", found, settings))
        for label, mixer, found, settings in runs:
            setup = Setup(task, mixer, found, 6000, 64, optimizer, test_lengths=lengths, settings=settings, **sizes)
            yield dataclasses.replace(setup, label=label, model=rotary if mixer == "attention" else model)


SETUPS = {
    "h3": h3_setups,
    "mamba_copying": mamba_copying_setups,
    "mamba_induction": mamba_induction_setups,
    "state_tracking": state_tracking_setups,
}


def make_model(setup: Setup, seed: int) -> LanguageModel:
    config = Config().model
    config.mixer, config.num_layers, config.d_model = setup.mixer, 2, setup.d_model
    config.vocab_size, config.tie_embeddings = setup.task.vocab_size, True
    config.mlp, config.d_ff = ("gelu", setup.d_ff) if setup.d_ff else ("none", 0)
    config.positions = "learned" if setup.mixer == "attention" else "none"
    config.max_positions = setup.task.context_length
    config.dropout = setup.embedding_dropout
    for field, value in setup.model.items():
        setattr(config, field, value)
    for field, value in setup.settings.items():
        setattr(getattr(config, setup.mixer), field, value)
    model = LanguageModel(config, rngs=nnx.Rngs(seed))
    for block in model.units.blocks:
        block.dropout = 0.0  # these set-ups drop embeddings alone
    if setup.as_gpt2:
        _make_gpt2_layers(model)
    if setup.init_std:
        scaled = functools.partial(_scaled, setup.init_std)
        nnx.update(model, jax.tree_util.tree_map_with_path(scaled, nnx.state(model, nnx.Param)))
    return model


def _make_gpt2_layers(model: LanguageModel) -> None:
    """LayerNorms in place of RMS norms, and biases, 0 at first, in every projection."""
    holders = [(model, ["norm"])] + [(block, ["mixer_norm", "mlp_norm"]) for block in model.units.blocks]
    for holder, names in holders:
        for name in names:
            scale = getattr(holder, name).scale[...]  # [width], in blocks [units, width]
            norm = nnx.LayerNorm(scale.shape[-1], epsilon=model.norm.epsilon, rngs=nnx.Rngs(0))
            norm.scale, norm.bias = nnx.Param(scale), nnx.Param(jnp.zeros_like(scale))
            setattr(holder, name, norm)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            kernel = module.kernel[...]  # [in, out], in blocks [units, in, out]
            module.use_bias, module.bias = True, nnx.Param(jnp.zeros((*kernel.shape[:-2], kernel.shape[-1])))


def _scaled(std: float, path: tuple, parameter: jax.Array) -> jax.Array:
    """A matrix at the standard deviation `std`, half of it in an MLP's second: a residual stream has 4 branches."""
    *_, layer, name = _keys(path)
    if name != "kernel":
        return parameter
    return parameter * std / jnp.std(parameter) * (0.5 if layer == "down" else 1.0)


def _keys(path: tuple) -> list[str]:
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]


def optimizer_of(setup: Setup, params: nnx.State) -> optax.GradientTransformation:
    """The trainer's optimizer, or AdamW with weight decay on all but `undecayed`."""
    config = setup.optimizer
    if not setup.undecayed:
        return make_optimizer(config, setup.steps, params)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: _keys(path)[-1] not in setup.undecayed, params)
    rate = schedule(config, setup.steps)
    return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=mask)


def run(setup: Setup, seeds: Sequence[int], steps_at_once: int = 200) -> list[dict[str, float]]:
    """Train a model for each seed side by side, then test each: accuracy in per cent by the length of the task.

    Every seed has devices of its own, at least one, over which its rows are shared out. `seconds` are those of the
    training of all, divided by the number of seeds.
    """
    models = [nnx.split(make_model(setup, seed)) for seed in seeds]
    graphdef = models[0][0]
    optimizer = optimizer_of(setup, models[0][1])

    def loss(params, batch, key):
        key = key if setup.embedding_dropout else None
        model = nnx.merge(graphdef, params)
        losses = model.token_losses(batch["tokens"], batch["targets"], batch["weights"], dropout_key=key)
        return losses.sum() / batch["weights"].sum()  # every row has as many weights

    def step(state, batch):
        params, opt, key = state
        key, dropout_key = jax.random.split(key)
        dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("rows"))
        flat, unflatten = ravel_pytree(jax.value_and_grad(loss)(params, batch, dropout_key))
        value, gradient = unflatten(jax.lax.pmean(flat, "rows"))  # one sum: each is a meeting of the threads
        if setup.optimizer.clip_norm:
            scale = jnp.minimum(1.0, setup.optimizer.clip_norm / (optax.tree.norm(gradient) + 1e-12))
            gradient = jax.tree.map(lambda g: g * scale, gradient)
        updates, opt = optimizer.update(gradient, opt, params)
        return (optax.apply_updates(params, updates), opt, key), value

    def steps_of_a_seed(state, batches):  # both with an axis of one seed
        state, losses = jax.lax.scan(step, *jax.tree.map(lambda x: x[0], (state, batches)))
        return jax.tree.map(lambda x: x[None], (state, losses))

    shares = math.gcd(setup.batch_size, jax.device_count() // len(seeds))
    devices = np.array(jax.devices()[: len(seeds) * shares]).reshape(len(seeds), shares)
    mesh = jax.sharding.Mesh(devices, ("seeds", "rows"))
    by_seed, by_row = P("seeds"), P("seeds", None, "rows")
    train = jax.jit(
        jax.shard_map(
            steps_of_a_seed, mesh=mesh, in_specs=(by_seed, by_row), out_specs=(by_seed, by_seed), check_vma=False
        ),
        donate_argnums=0,
        compiler_options={"xla_cpu_multi_thread_eigen": False},  # a core is a device: none is left to share an op with
    )
    states = [
        (params, optimizer.init(params), jax.random.key(seed)) for (_, params), seed in zip(models, seeds, strict=True)
    ]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    batches = [stacks(setup, seed, steps_at_once) for seed in seeds]
    started, done = time.perf_counter(), 0
    while done < setup.steps:
        stack = jax.tree.map(lambda *arrays: np.stack(arrays), *(next(batches_of_seed) for batches_of_seed in batches))
        state, losses = train(state, stack)
        done += losses.shape[1]
    final_losses = jax.device_get(losses.mean(1))
    seconds = (time.perf_counter() - started) / len(seeds)
    accuracy = accuracy_of(graphdef)
    results = []
    for index, seed in enumerate(seeds):
        params = jax.device_put(jax.tree.map(operator.itemgetter(index), state[0]), jax.devices()[0])
        result = {"seconds": seconds, "loss": float(final_losses[index])}
        for length in (setup.task.length, *setup.test_lengths):
            task = dataclasses.replace(setup.task, length=length)
            pieces = max(1, length // 256)  # rows at once: memory stays the same
            rows = task.rows(np.random.default_rng([seed, 2]), TEST_ROWS)
            parts = [rows.take(part).batch(answers_only=True) for part in np.array_split(np.arange(TEST_ROWS), pieces)]
            right, asked = (sum(x) for x in zip(*(accuracy(params, part) for part in parts), strict=True))
            result[f"accuracy_{length}"] = 100 * float(right) / float(asked)
        results.append(result)
    return results


def stacks(setup: Setup, seed: int, steps: int) -> Iterator[Batch]:
    """Batches of `steps` steps, stacked: of fresh rows, or an epoch of a training set, shuffled anew each time."""
    rng = np.random.default_rng([seed, 1])
    if setup.rows:
        rows = setup.task.rows(np.random.default_rng([seed, 0]), setup.rows, training=True)
        steps = setup.rows // setup.batch_size
    while True:
        if setup.rows:
            drawn = rows.take(rng.permutation(setup.rows)[: steps * setup.batch_size])
        else:
            drawn = setup.task.rows(rng, steps * setup.batch_size, training=True)
        batch = drawn.batch(answers_only=not (setup.rows or setup.task.trains_on_all))
        yield {name: array.reshape(steps, setup.batch_size, -1) for name, array in batch.items()}


def accuracy_of(graphdef: nnx.GraphDef) -> Callable:
    @jax.jit
    def accuracy(params, batch):
        logits, _ = nnx.merge(graphdef, params)(batch["tokens"])
        right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
        return right.sum(), batch["weights"].sum()

    return accuracy


def kept_runs(paper: str) -> dict[str, dict]:
    """Earlier runs by label, mixer and seed."""
    path = record.path(f"papers_{paper}")
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def run_or_recall(paper: str, setup: Setup, seeds: int, again: bool, partial: bool) -> list[dict]:
    """The runs of seeds 0 ... seeds - 1: kept ones with the same set-up, and new ones as many at once as devices."""
    keys, description = [f"{setup.label} {setup.mixer} {seed}" for seed in range(seeds)], setup.description
    kept = {} if again else kept_runs(paper)
    found = {key: kept[key] for key in keys if key in kept and kept[key]["setup"] == description}
    missing = [seed for seed, key in enumerate(keys) if key not in found]
    for first in range(0, len(missing), jax.device_count()):
        together = missing[first : first + jax.device_count()]
        for seed, result in zip(together, run(setup, together), strict=True):
            found[keys[seed]] = {"setup": description} | result | record.environment()
        if not partial:
            record.write(f"papers_{paper}", {"runs": kept_runs(paper) | found})
    return [found[key] for key in keys]


def chosen(setups: list[Setup], mixers: str, tasks: str) -> list[Setup]:
    """Those of comma-separated mixers and tasks; "": all.

    Raises:
      UsageError: a name that no set-up has.
    """
    wanted = {}
    for field, given in (("mixer", mixers), ("label", tasks)):
        known = list(dict.fromkeys(getattr(setup, field) for setup in setups))
        wanted[field] = given.split(",") if given else known
        if unknown := set(wanted[field]) - set(known):
            flag = "--mixers" if field == "mixer" else "--tasks"
            raise UsageError(f"{flag}: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(known)}")
    return [setup for setup in setups if setup.mixer in wanted["mixer"] and setup.label in wanted["label"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=SETUPS)
    parser.add_argument("--seeds", type=argument(int, unit="seed"), default=3)
    parser.add_argument("--mixers", default="", help="some of them, comma-separated; all by default")
    parser.add_argument("--tasks", default="", help="some of them, comma-separated; all by default")
    parser.add_argument(
        "--steps", type=argument(int, at_least=0), default=0, help="fewer than the set-up's, for a look; not kept"
    )
    parser.add_argument("--again", action="store_true", help="repeat runs whose results are kept")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux alone has it
    jax.config.update("jax_num_cpu_devices", cores)
    print(", ".join(f"{name} {value}" for name, value in record.environment().items()))
    columns = f"{'published %':>13}{'median %':>10}{'range':>16}{'seeds':>6}{'seconds':>9}"
    print(f"{'task':20}{'mixer':20}{'length':>8}{columns}")
    for setup in chosen(list(SETUPS[args.paper]()), args.mixers, args.tasks):
        setup.steps = args.steps or setup.steps
        runs = run_or_recall(args.paper, setup, args.seeds, args.again, args.steps > 0)
        seconds = statistics.median(run["seconds"] for run in runs)
        for length in (setup.task.length, *setup.test_lengths):
            found = [run[f"accuracy_{length}"] for run in runs]
            median, span = statistics.median(found), f"{min(found):.1f} - {max(found):.1f}"
            line = f"{setup.label:20}{setup.mixer:20}{length:8}{setup.published:>13}{median:10.1f}{span:>16}"
            print(f"{line}{len(runs):6}{seconds:9.1f}", flush=True)


if __name__ == "__main__":
    with exit_with_message():
        main()
