"""Training speed of a config on this machine.

    python -m benchmarks.train --config=configs/gla.py:tiny [--mixers=gla,attention] [--optimizer=adamw] [--depths=4,24]

For each mixer: tokens/s of the jitted training step (optimizer included, batches ready in memory), model FLOP/s
(three times the forward pass, `zoo.flops`; recomputation does not count), and its share of the rate of a square matmul
in the model's dtype. Steps of the mixers and matmuls are interleaved, so that a slow phase of the machine meets all of
them; medians are printed, with the spread. `--depths` adds the compile time of the step at those numbers of layers,
the compilation cache off.
"""

import contextlib
import copy
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import measure, record
from zoo import config as zoo_config
from zoo import flops, sharding
from zoo.training import command_line, step

_MIXERS = flags.DEFINE_list("mixers", [], "Patterns, comma-separated, with + inside one (gla+attention).")
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps a mixer.", lower_bound=1)
_DEPTHS = flags.DEFINE_list("depths", [], "Numbers of layers whose compile time is measured.")
_OPTIMIZER = flags.DEFINE_enum("optimizer", None, zoo_config.OPTIMIZERS, "Default: the config's.")
_CONFIG = flags.DEFINE_string("config", "configs/gla.py:tiny", "FILE.py:SIZE or a run's config.json.")

MATMUL_WIDTH = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def _batch(config: zoo_config.Config) -> dict[str, np.ndarray]:
    rows = (config.train.batch_size, config.train.context_length)
    tokens = np.random.default_rng(0).integers(0, 256, rows, np.int32)
    ones = np.ones(rows, np.int32)
    return {"tokens": tokens, "targets": tokens, "segment_ids": ones, "weights": ones.astype(np.float32)}


class _Run:
    def __init__(self, config: zoo_config.Config, mesh):
        self.config = config
        programs = step.build(config, mesh)
        self.state, self.batch, self.train = programs.init(), programs.put(_batch(config)), programs.train

    def step(self) -> dict:
        self.state, metrics = self.train(self.state, self.batch)
        return self.state.step, metrics


def _row(name: str, run: _Run, timing: measure.Timing, matmul_rate: float) -> dict:
    train, median = run.config.train, 1e-3 * timing.median_ms
    tokens = train.batch_size * train.context_length
    per_token = flops.train_flops_per_token(run.config.model, train.context_length)
    return {
        "mixer": name,
        "parameters": flops.num_parameters(run.config.model),
        "milliseconds": timing.median_ms,
        "fastest": timing.min_ms,
        "slowest": timing.max_ms,
        "tokens_per_second": tokens / median,
        "model_gflops": tokens * per_token / median / 1e9,
        "share_of_matmul_rate": tokens * per_token / median / matmul_rate,
    }


def _compile_seconds(config: zoo_config.Config, mesh, num_layers: int) -> float:
    config = copy.deepcopy(config)
    config.model.num_layers = num_layers
    programs = step.build(config, mesh)
    lowered = programs.train.lower(programs.abstract_state, _batch(config))
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


@contextlib.contextmanager
def _without_compilation_cache():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax remembers whether it had one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def main(argv: list[str]) -> None:
    del argv
    base = command_line.load(_CONFIG.value)
    base.model.vocab_size = base.model.vocab_size or 320  # the byte tokenizer's
    base.optimizer.name = _OPTIMIZER.value or base.optimizer.name
    mesh = sharding.make_mesh(base.mesh)
    runs = {}
    for name in [mixer.replace("+", ",") for mixer in _MIXERS.value] or [base.model.mixer]:
        config = copy.deepcopy(base)
        config.model.mixer = name
        zoo_config.validate(config)
        runs[name] = _Run(config, mesh)
    multiply, operations = measure.matmul(MATMUL_WIDTH[mesh.devices.flat[0].platform], jnp.dtype(base.model.dtype))
    functions = {name: run.step for name, run in runs.items()} | {"matmul": multiply}
    timings = measure.interleaved(functions, rounds=_STEPS.value, seconds_each=math.inf)
    matmul_rate = mesh.size * operations / (1e-3 * timings["matmul"].median_ms)
    rows = [_row(name, run, timings[name], matmul_rate) for name, run in runs.items()]
    sequences = f"{base.train.batch_size} x {base.train.context_length} tokens a step"
    print(f"{_CONFIG.value}: {sequences}, {base.model.dtype}, {base.optimizer.name};")
    print(f"{_STEPS.value} steps; this machine's matmul rate {matmul_rate / 1e9:.1f} GFLOP/s")
    print(f"{'mixer':24}{'parameters':>12}{'ms (min-max)':>24}{'tokens/s':>12}{'GFLOP/s':>10}{'share':>8}")
    for row in rows:
        spread = f"{row['milliseconds']:.0f} ({row['fastest']:.0f}-{row['slowest']:.0f})"
        print(f"{row['mixer']:24}{row['parameters']:>12,}{spread:>24}{row['tokens_per_second']:>12,.0f}"
              f"{row['model_gflops']:>10.1f}{row['share_of_matmul_rate']:>8.1%}")  # fmt: skip
    compile_seconds = {}
    if _DEPTHS.value:
        with _without_compilation_cache():
            for depth in map(int, _DEPTHS.value):
                compile_seconds[depth] = min(_compile_seconds(base, mesh, depth) for _ in range(3))
                print(f"compile time of the step at {depth} layers: {compile_seconds[depth]:.2f} s (fastest of 3)")
    measured = {"config": _CONFIG.value, "optimizer": base.optimizer.name, "matmul_flops": matmul_rate, "rows": rows}
    record.write(f"train_{base.optimizer.name}", measured | {"compile": compile_seconds})


if __name__ == "__main__":
    app.run(main)
