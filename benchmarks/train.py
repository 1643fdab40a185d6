r"""Training speed of a config on this machine.

    python -m benchmarks.train --config=configs/gla.py:tiny [--mixers=gla,attention] [--optimizer=adamw] [--depths=4,24]
    python -m benchmarks.train --config=configs/gla.py:1.3b --config.model.vocab_size=32000 \
        --config.model.remat=minimal --config.train.batch_size=16 --mixers=attention,gla --compile_threads=2 [--profile]

For each mixer: tokens/s of the jitted training step (optimizer included, batches ready in memory), model FLOP/s
(three times the forward pass, `zoo.flops`; recomputation does not count), their share of the rate of a square matmul
in the model's dtype and, on accelerators, of the data sheet's bf16 rate (MFU), the bytes of a device that the step
needs, and the seconds that tracing and compiling it took. Medians are printed, with the spread.

Steps of the mixers and matmuls are interleaved on CPUs, so that a slow phase of the machine meets all of them. On
accelerators, whose memory the states of several large models would not share, mixers are timed one after another, each
beside matmuls. `--depths` adds the compile time of the step at those numbers of layers, the compilation cache off.
"""

import collections
import concurrent.futures
import contextlib
import copy
import math
import pathlib
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import config_flags

from benchmarks import measure, record
from zoo import config as zoo_config
from zoo import flops, sharding
from zoo.errors import UsageError, exit_with_message
from zoo.training import command_line, step

_MIXERS = flags.DEFINE_list("mixers", [], "Patterns, comma-separated, with + inside one (gla+attention).")
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps a mixer.", lower_bound=1)
_DEPTHS = flags.DEFINE_list("depths", [], "Numbers of layers whose compile time is measured.")
_OPTIMIZER = flags.DEFINE_enum("optimizer", None, zoo_config.OPTIMIZERS, "Default: the config's.")
_THREADS = flags.DEFINE_integer("compile_threads", 1, "Mixers whose steps are compiled at once.", lower_bound=1)
_PROFILE = flags.DEFINE_boolean("profile", False, "Print the 20 kernels that take most of each step.")

DEFAULT_CONFIG = "configs/gla.py:tiny"
MATMUL_WIDTH = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def _parse(argv: list[str]) -> list[str]:
    with exit_with_message():
        if any(argument in ("--help", "-help", "-h", "--helpshort") for argument in argv[1:]):
            print(__doc__, flags.FLAGS.module_help(sys.modules[__name__]), sep="\n")
            sys.exit(0)
        if not any(argument.partition("=")[0].lstrip("-") == "config" for argument in argv[1:]):
            argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
        rest = command_line.define_and_parse(argv)
        if len(rest) > 1:
            raise UsageError(f"unexpected argument {rest[1]!r}; settings are given as --config.NAME=VALUE")
        return rest


def _batch(config: zoo_config.Config) -> dict[str, np.ndarray]:
    rows = (config.train.batch_size, config.train.context_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, rows, np.int32)
    ones = np.ones(rows, np.int32)
    return {"tokens": tokens, "targets": tokens, "segment_ids": ones, "weights": ones.astype(np.float32)}


def _on_cpu(mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


class _Program:
    """The compiled step of a config, with what compiling it took; it holds no arrays."""

    def __init__(self, config: zoo_config.Config, mesh):
        self.config, self.programs = config, step.build(config, mesh)
        start = time.perf_counter()
        self.lowered = self.programs.train.lower(self.programs.abstract_state, _batch(config))
        self.seconds = time.perf_counter() - start

    def compile(self) -> "_Program":
        start = time.perf_counter()
        self.train = self.lowered.compile()
        self.seconds += time.perf_counter() - start
        return self

    def bytes(self) -> int:
        """Of a device, while the step runs: its arguments, what it adds to them, and its temporaries."""
        memory = self.train.memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state's are donated
        return memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes


class _Run:
    def __init__(self, program: _Program):
        self.train, programs = program.train, program.programs
        self.state, self.batch = programs.init(), programs.put(_batch(program.config))

    def step(self) -> dict:
        self.state, metrics = self.train(self.state, self.batch)
        return self.state.step, metrics


def _time(programs: dict[str, _Program], mesh) -> list[dict]:
    """A row for each program, their steps and matmuls in turn. All states are in memory, and gone on return."""
    device, dtype = mesh.devices.flat[0], next(iter(programs.values())).config.model.dtype
    multiply, operations = measure.matmul(MATMUL_WIDTH[device.platform], jnp.dtype(dtype))
    runs = {name: _Run(program) for name, program in programs.items()}
    functions = {name: run.step for name, run in runs.items()} | {"matmul": multiply}
    timings = measure.interleaved(functions, rounds=_STEPS.value, seconds_each=math.inf)
    matmul_rate = mesh.size * operations / (1e-3 * timings["matmul"].median_ms)
    rows = [_row(name, program, timings[name], matmul_rate, mesh) for name, program in programs.items()]
    if _PROFILE.value:
        for name, run in runs.items():
            print(f"{name}: {_profile(run)}")
    return rows


def _row(name: str, program: _Program, timing: measure.Timing, matmul_rate: float, mesh) -> dict:
    config, device = program.config, mesh.devices.flat[0]
    train, median = config.train, 1e-3 * timing.median_ms
    tokens = train.batch_size * train.context_length
    rate = tokens * flops.train_flops_per_token(config.model, train.context_length) / median
    peak = flops.peak_flops(device)
    return {
        "mixer": name,
        "parameters": flops.num_parameters(config.model),
        "milliseconds": timing.median_ms,
        "fastest": timing.min_ms,
        "slowest": timing.max_ms,
        "tokens_per_second": tokens / median,
        "model_gflops": rate / 1e9,
        "share_of_matmul_rate": rate / matmul_rate,
        "mfu": peak and rate / (mesh.size * peak),
        "matmul_flops": matmul_rate,
        "compile_seconds": program.seconds,
        "step_bytes": program.bytes(),
        # of the device since the process started, so of the largest mixer so far
        "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _profile(run: _Run, steps: int = 2, rows: int = 20) -> str:
    """The kernels and fusions of the device that take most of a step, with the operation that each belongs to."""
    operations = dict(re.findall(r'%?(\S+) = [^\n]*op_name="([^"]*)"', run.train.as_text()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                result = run.step()
            jax.block_until_ready(result)
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    total, count = collections.Counter(), collections.Counter()
    for plane in planes:
        lines = plane.lines if plane.name.startswith("/device:") else ()
        for line in lines:
            if line.name.startswith(("Stream", "XLA Ops")):  # of a GPU, of a TPU
                for event in line.events:
                    total[event.name] += 1e-6 * event.duration_ns / steps
                    count[event.name] += 1 / steps
    whole = sum(total.values())
    if not whole:
        return "the profiler saw no device"
    lines = [f"kernels {whole:.1f} ms a step"]
    for name, milliseconds in total.most_common(rows):
        operation = operations.get(name) or operations.get(name.replace("_", "."), "")
        share = f"{milliseconds:8.2f} ms {milliseconds / whole:6.1%} x{count[name]:<6.0f}"
        lines.append(f"  {share} {name[:60]:60} {operation[-100:]}")
    return "\n".join(lines)


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
    with exit_with_message():
        _measure(flags.FLAGS.config)


def _measure(base: zoo_config.Config) -> None:
    flag = flags.FLAGS["config"]
    spec, overrides = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    base.model.vocab_size = base.model.vocab_size or 320  # the byte tokenizer's
    base.optimizer.name = _OPTIMIZER.value or base.optimizer.name
    mesh = sharding.make_mesh(base.mesh)
    programs = {}
    for name in [mixer.replace("+", ",") for mixer in _MIXERS.value] or [base.model.mixer]:
        config = copy.deepcopy(base)
        config.model.mixer = name
        zoo_config.validate(config)
        programs[name] = _Program(config, mesh)
    # XLA compiles without Python's lock
    with concurrent.futures.ThreadPoolExecutor(_THREADS.value) as pool:
        list(pool.map(_Program.compile, programs.values()))
    groups = [programs] if _on_cpu(mesh) else [{name: program} for name, program in programs.items()]

    sequences = f"{base.train.batch_size} x {base.train.context_length} tokens a step"
    print(f"{spec}: {sequences}, {base.model.dtype}, {base.optimizer.name}, remat {base.model.remat};")
    print(f"{_STEPS.value} steps; share: of this machine's matmul rate, MFU: of the data sheet's")
    print(f"{'mixer':24}{'parameters':>14}{'ms (min-max)':>24}{'tokens/s':>12}{'GFLOP/s':>10}{'share':>8}{'MFU':>8}"
          f"{'GiB':>8}{'compile s':>11}")  # fmt: skip
    rows = []
    for group in groups:
        for row in _time(group, mesh):
            rows.append(row)
            spread = f"{row['milliseconds']:.0f} ({row['fastest']:.0f}-{row['slowest']:.0f})"
            mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
            print(f"{row['mixer']:24}{row['parameters']:>14,}{spread:>24}{row['tokens_per_second']:>12,.0f}"
                  f"{row['model_gflops']:>10.1f}{row['share_of_matmul_rate']:>8.1%}{mfu:>8}"
                  f"{row['step_bytes'] / 2**30:>8.2f}{row['compile_seconds']:>11.1f}", flush=True)  # fmt: skip
    print(f"matmul rate {rows[-1]['matmul_flops'] / 1e9:.1f} GFLOP/s")
    if peak := rows[-1]["device_peak_bytes"]:
        print(f"the device held {peak / 2**30:.2f} GiB at its peak")
    compile_seconds = {}
    if _DEPTHS.value:
        with _without_compilation_cache():
            for depth in map(int, _DEPTHS.value):
                compile_seconds[depth] = min(_compile_seconds(base, mesh, depth) for _ in range(3))
                print(f"compile time of the step at {depth} layers: {compile_seconds[depth]:.2f} s (fastest of 3)")
    measured = {"config": spec, "overrides": overrides, "optimizer": base.optimizer.name, "remat": base.model.remat}
    measured |= {"matmul_flops": rows[-1]["matmul_flops"], "rows": rows, "compile": compile_seconds}
    # CPUs measure `tiny`; accelerators measure several sizes, each in a file of its own.
    size = "" if _on_cpu(mesh) else "_" + re.sub(r"\W+", "_", spec.removeprefix("configs/").replace(".py", ""))
    record.write(f"train_{base.optimizer.name}{size}", measured)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
