"""The table of `python -m benchmarks.kernels --table=gpu`: every implementation and its rivals on one GPU, in one run.

For each call of benchmarks/kernels_calls.py and each implementation that takes it: milliseconds of the forward pass and
of forward and backward, while calls queue up on the device (`measure.queued`); TFLOP/s and GB/s of forward and backward
by the call's least arithmetic and traffic; and the share of the roofline, the time in which this device's own bf16
matmul and copy, measured first, would do that arithmetic or that traffic, whichever is longer. Beside them the errors
against a float64 reference at few tokens and heads (`Call.checked`): root mean square, of the output and of the worst
gradient. `host` marks a time that is the host's, not the device's; `default` what runs when no implementation is named.

Kernels take the host longer to build than the device to run, and hold Python's lock meanwhile: a process a call builds,
several at once, and times when it has the device alone (`measure.alone`; builds elsewhere still try a matmul on it).
After a call's rows: seconds since the start, and of that process. flash-linear-attention: benchmarks/kernels_fla.py.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks import measure
from benchmarks.kernels_calls import CALLS, FLOAT32, MULTIPLY_ADDS, QUICK_CALLS, input_sets
from kernels import dispatch
from kernels.attention.api import IMPLEMENTATIONS as ATTENTION
from kernels.delta_rule.api import IMPLEMENTATIONS as DELTA_RULE
from kernels.dplr_delta_rule.api import IMPLEMENTATIONS as DPLR_DELTA_RULE
from kernels.linear_attention.api import IMPLEMENTATIONS as LINEAR_ATTENTION
from kernels.selective_scan.api import IMPLEMENTATIONS as SELECTIVE_SCAN

TABLES = {
    "linear_attention": LINEAR_ATTENTION,
    "delta_rule": DELTA_RULE,
    "dplr_delta_rule": DPLR_DELTA_RULE,
    "selective_scan": SELECTIVE_SCAN,
    "attention": ATTENTION,
}
NOT_FOR_GPUS = {"reference", "recurrent", "mosaic_tpu", "splash"}
RIVALS = ("fla", "jla", "jla, kernels alone")
HOST_BOUND = 0.9
ROUNDS = 5
WORKERS, BUILDERS = 8, 3  # processes, and threads of each
FLA_GROUPS = 3  # processes
WORKER_SECONDS, GRACE_SECONDS = 240, 15  # of a call; of calls that were begun before the minutes were over
MODULE, FLA_MODULE = "benchmarks.kernels_gpu", "benchmarks.kernels_fla"
PACKAGES = ("jax-linear-attention", "fla-core", "torch", "triton", "nvidia-cudnn-cu13")


def run(calls, minutes, quick=False):
    """Measure, print the table, and return what belongs in the record."""
    start = time.monotonic()
    ceilings = measure_ceilings(quick)  # before any other process has the device
    print(f"bf16 matmul {ceilings['tflops']:.3g} TFLOP/s, copy {ceilings['gbytes_per_second']:.4g} GB/s")
    print(HEADER, flush=True)
    rows, expected, left_out = [], {}, collections.defaultdict(dict)
    cores = len(os.sched_getaffinity(0))

    def add(name, results, seconds, default=None):
        rows.extend(new := rows_of(name, calls[name], results, expected[name], ceilings, default))
        took = ", ".join(f"{phase} {length:.0f}" for phase, length in seconds.items())
        print("\n".join([*map(line, new), f"  {time.monotonic() - start:.0f} s ({took})"]), flush=True)

    def finish(which, module, folder, names):
        """Why the names have no results, or None."""
        left = 60 * minutes - (time.monotonic() - start)
        if left <= 0:
            return f"the {minutes} minutes were over"
        seconds = min(WORKER_SECONDS * len(names), left + GRACE_SECONDS)
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if which == "fla":
            cache = os.environ.get("TRITON_CACHE_DIR", f"{folder}/triton")  # a kept one saves most of the time
            environment |= {"JAX_PLATFORMS": "cpu", "FLA_CACHE_RESULTS": "0", "TRITON_CACHE_DIR": cache}
        return execute([sys.executable, "-m", module, folder, *names], environment, seconds)

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # a stopped process may leave children
        concurrent.futures.ThreadPoolExecutor(min(WORKERS, cores)) as ours,
        concurrent.futures.ThreadPoolExecutor(FLA_GROUPS) as theirs,
    ):
        jobs = {ours.submit(finish, "row", MODULE, folder, [name]): ("row", [name]) for name in calls}
        if importlib.util.find_spec("fla"):
            groups = fla_groups(calls)
            jobs |= {theirs.submit(finish, "fla", FLA_MODULE, folder, names): ("fla", names) for names in groups}
        else:
            left_out["all"]["fla"] = "it is not installed"
        pending, taken = set(jobs), set()
        while pending:
            done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
            for which, name in itertools.product(("row", "fla"), calls):
                path = pathlib.Path(folder, f"{name}.{which}.pickle")
                early = which == "fla" and name not in expected and pending
                if path in taken or early or not path.exists():
                    continue
                taken.add(path)
                found = pickle.loads(path.read_bytes())
                left_out[name] |= found["reasons"]
                expected |= {name: found["expected"]} if "expected" in found else {}
                if name in expected:
                    add(name, found["results"], found["seconds"], found.get("default"))
                else:
                    left_out[name].setdefault(which, "there is no reference to compare it with")
            for future in done:
                which, names = jobs[future]
                for name in names:
                    if future.result() and not pathlib.Path(folder, f"{name}.{which}.pickle").exists():
                        left_out[name][which] = future.result()
    print("\n".join(ratios(rows)))
    names = collections.defaultdict(list)  # one line a reason
    for name, reasons in left_out.items():
        for reason in reasons.items():
            names[reason].append(name)
    for (which, why), where in names.items():
        print(f"no {which} in {', '.join(where)}: {why}")
    return {"packages": versions(), "ceilings": ceilings, "rows": rows, "left_out": dict(left_out)}


def execute(command, environment, seconds):
    """Why the command failed, or None."""
    with tempfile.TemporaryFile("w+") as errors:  # no pipe: its own children may outlive it
        try:
            code = subprocess.run(command, env=os.environ | environment, stderr=errors, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} seconds"
        errors.seek(0)
        return ": ".join([f"exit status {code}", *errors.read().strip().splitlines()[-1:]])[:200] if code else None


def main():
    """One call in a process of its own: its memory is the next one's when it ends."""
    folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
    call = (CALLS | QUICK_CALLS)[name]
    times = [time.monotonic()]
    built = build_call(call)
    times.append(time.monotonic())
    with measure.alone(folder / "lock"):
        times.append(time.monotonic())
        found = time_call(call, *built)
        times.append(time.monotonic())
        lengths = (after - before for before, after in itertools.pairwise(times))
        found["seconds"] = dict(zip(("build", "wait", "time"), lengths, strict=True))
        measure.write(folder / f"{name}.row.pickle", found)
        os._exit(0)  # memory and lock go back together


def build_call(call):
    """All that needs no device of its own, for `time_call`: what draws operands; implementation -> compiled forward,
    compiled forward and backward, results of the checked call; and what belongs to the call's results."""
    drawn = jax.jit(lambda seed: place(draw(call, seed)))
    arrays = jax.eval_shape(drawn, 0)
    functions, reasons = supported(call, arrays)
    checked = place(call.draw_checked())
    with concurrent.futures.ThreadPoolExecutor(BUILDERS) as pool:  # XLA compiles outside of Python's lock
        builds = {name: pool.submit(build, call, function, arrays, checked) for name, function in functions.items()}
        expected = pool.submit(exact, call)
        drawn = drawn.lower(0).compile()
    programs = {}
    for name, future in builds.items():
        try:
            programs[name] = future.result()
        except Exception as error:  # a kernel's own check: the others' rows must not be lost
            reasons[name] = short(error)
    found = {"expected": expected.result(), "reasons": reasons, "default": default(call, arrays)}
    return drawn, programs, found


def time_call(call, drawn, programs, found):
    """`found` with "results": implementation -> ((forward, both) Timings, results of the checked call)."""
    sets = [drawn(seed) for seed in range(input_sets(call))]
    thunks = {}
    for name, (forward, both, _) in programs.items():
        try:
            jax.block_until_ready(both(sets[0]))
        except Exception as error:  # out of memory
            found["reasons"][name] = short(error)
            continue
        thunks[name, "forward"] = [functools.partial(forward, arrays) for arrays in sets]
        thunks[name, "both"] = [functools.partial(both, arrays) for arrays in sets]
    times = measure.queued(thunks, rounds=ROUNDS)
    names = [name for name, which in thunks if which == "both"]
    results = {name: ((times[name, "forward"], times[name, "both"]), programs[name][2]) for name in names}
    return found | {"results": results}


def default(call, arrays):
    """The implementation that runs when none is named."""
    ran = []

    def noted(name, function):
        def run(*args, **kwargs):
            result = function(*args, **kwargs)
            ran.append(name)
            return result

        return run

    table = TABLES[call.op]
    with unittest.mock.patch.dict(table, {name: noted(name, function) for name, function in table.items()}):
        jax.eval_shape(functools.partial(implementation, call, None), arrays)
    return ran[-1]


def build(call, function, arrays, checked):
    both = functools.partial(forward_and_backward, call, function)
    programs = [jax.jit(one).lower(arrays).compile() for one in (function, both)]
    out, gradients = jax.jit(both)(checked)
    return *programs, {name: np.asarray(x, np.float64) for name, x in (gradients | {"out": out}).items()}


def forward_and_backward(call, function, arrays):
    constants = {name: arrays[name] for name in call.constants}
    inputs = {name: arrays[name] for name in call.operands if name not in constants}
    out, pull = jax.vjp(lambda inputs: function(inputs | constants), inputs)
    return out, pull(arrays["cotangent"])[0]


def supported(call, arrays):
    """The functions of a call's operands that can be traced, and the reasons of those that cannot."""
    names = [name for name in TABLES[call.op] if name not in NOT_FOR_GPUS]
    functions = {name: functools.partial(implementation, call, name) for name in names}
    if call.op != "attention":
        functions["jla, kernels alone"] = functools.partial(jla_kernels, call)
    reasons = {}
    for name, function in list(functions.items()):
        try:
            jax.eval_shape(function, arrays)
        except NotImplementedError as error:
            reasons[name] = short(error).removeprefix(f"{call.op}: no implementation supports this call. {name}: ")
            del functions[name]
    return functions, reasons


def implementation(call, name, arrays):
    operands = {key: arrays[key] for key in call.operands}
    result = getattr(kernels, call.op)(**operands, implementation=name)
    return result if call.op == "attention" else result[0]


def jla_kernels(call, arrays):
    """jax-linear-attention as its own users call it: no initial state, no clamp, step sizes of x's dtype."""
    if "bonus" in arrays:
        raise NotImplementedError("the package has no kernel with a bonus")
    ops = dispatch.optional("jla.ops", extra="jla")
    if call.op == "selective_scan":
        kind, operands = "mamba1", [arrays["C"], arrays["B"], arrays["x"]]
        gates = {"dt": arrays["dt"].astype(arrays["x"].dtype), "a": arrays["A"], "d": arrays["D"]}
    elif call.op == "delta_rule":
        kind = {"none": "deltanet", "scalar": "gated_deltanet", "vector": "kda"}[call.shape.decay]
        operands = [arrays[name] for name in ("q", "k", "v")]
        gates = {"beta": arrays["beta"]} | ({"g": arrays["log_decay"]} if "log_decay" in arrays else {})
    elif call.op == "dplr_delta_rule":
        kind, operands = "rwkv7", [arrays[name] for name in ("q", "k", "v")]
        gates = {"a": arrays["a"], "b": arrays["b"], "w": arrays["log_decay"]}
        gates["scale"] = call.shape.key_dim**-0.5  # its own is 1
    else:
        kind = "gla" if call.shape.decay == "vector" else "simple_gla"
        operands = [arrays[name] for name in ("q", "k", "v")]
        log_decay = arrays["log_decay"]
        gates = {"g": jnp.broadcast_to(log_decay, (*operands[2].shape[:3], *log_decay.shape[3:]))}
    try:
        return ops.linear_attention(kind, *operands, **gates, impl="mosaic_gpu")[0]
    except ValueError as error:  # how the package says that its kernels do not take the call
        raise NotImplementedError(str(error)) from error


def draw(call, seed):
    keys = iter(jax.random.split(jax.random.key(seed), len(call.operands) + 1))
    return call.draw(lambda shape: jax.random.normal(next(keys), shape))


def place(arrays):
    return {name: jnp.asarray(x, jnp.float32 if name in FLOAT32 else jnp.bfloat16) for name, x in arrays.items()}


def exact(call):
    """The checked call by `reference`, in float64 on the CPU: the output and the gradients by name."""
    rounded = {name: np.asarray(x) for name, x in jax.device_get(place(call.draw_checked())).items()}
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        arrays = {name: jnp.asarray(x.astype(np.float64)) for name, x in rounded.items()}
        reference = functools.partial(implementation, call, "reference")
        out, gradients = jax.jit(functools.partial(forward_and_backward, call, reference))(arrays)
        return {name: np.asarray(x) for name, x in (gradients | {"out": out}).items()}


def rows_of(name, call, results, expected, ceilings, default=None):
    rows = []
    for implementation, (timings, actual) in results.items():
        errors = {key: error_ratio(actual[key], expected[key]) for key in expected}
        row = {
            "call": name,
            "op": call.op,
            "shape": f"{call.batch}x{call.time} {dataclasses.asdict(call)['shape']}",
            "implementation": implementation,
            "default": implementation == default,
            "out_error": errors.pop("out"),
            "gradient_errors": errors,
        }
        for which, timing, flops, moved in zip(("forward", "both"), timings, call.flops(), call.bytes(), strict=True):
            seconds = 1e-3 * timing.median_ms
            floor = max(flops / (1e12 * ceilings["tflops"]), moved / (1e9 * ceilings["gbytes_per_second"]))
            row |= {f"{which}_{key}": value for key, value in dataclasses.asdict(timing).items()}
            row[f"{which}_tflops"] = 1e-12 * flops / seconds
            row[f"{which}_gbytes_per_second"] = 1e-9 * moved / seconds
            row[f"{which}_roofline"] = floor / seconds
        rows.append(row)
    return rows


def error_ratio(actual, expected):
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2)))


def measure_ceilings(quick):
    """This device's own rates: a square bf16 matmul, and a copy, bytes read and written."""
    width, floats = (512, 2**20) if quick else (8192, 2**28)
    squares = [jax.random.normal(jax.random.key(seed), (width, width), jnp.bfloat16) for seed in range(2)]
    lines = [jax.random.normal(jax.random.key(seed), (floats,)) for seed in range(2)]
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: -x)
    times = measure.queued(
        {
            "matmul": [functools.partial(multiply, x, x) for x in squares],
            "copy": [functools.partial(copy, x) for x in lines],
        },
        rounds=3,
    )
    return {
        "tflops": 2e-12 * width**3 / (1e-3 * times["matmul"].median_ms),
        "gbytes_per_second": 1e-9 * 8 * floats / (1e-3 * times["copy"].median_ms),
    }


def fla_groups(calls):
    """Names of calls for whose heads flash-linear-attention picks most configurations once: a process each."""
    groups = collections.defaultdict(list)
    for name, call in calls.items():
        if call.op in MULTIPLY_ADDS:
            shape = call.shape
            groups[call.op, shape.decay, shape.bonus, shape.key_dim, shape.value_dim].append(name)
    return list(groups.values())


def versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def short(error):
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0][:200]


HEADER = (
    f"{'call':24}{'implementation':20}{'fwd ms':>9}{'f+b ms':>9}{'TFLOP/s':>10}{'GB/s':>10}"
    f"{'fwd roof':>9}{'f+b roof':>9}{'out error':>11}{'gradients':>11}"
)


def line(row):
    worst = max(row["gradient_errors"], key=row["gradient_errors"].get)
    mark = " default" if row["default"] else ""
    mark += " host" if max(row["forward_host_share"], row["both_host_share"]) > HOST_BOUND else ""
    return (
        f"{row['call']:24}{row['implementation']:20}{row['forward_median_ms']:9.3f}{row['both_median_ms']:9.3f}"
        f"{row['both_tflops']:10.3g}{row['both_gbytes_per_second']:10.3g}"
        f"{row['forward_roofline']:9.1%}{row['both_roofline']:9.1%}"
        f"{row['out_error']:11.1e}{row['gradient_errors'][worst]:11.1e} {worst}{mark}"
    )


def ratios(rows):
    """A line a call: forward and backward of what runs by default; its rivals' times, and its time over theirs."""
    for row in rows:
        if row["default"]:
            times = {other["implementation"]: other["both_median_ms"] for other in rows if other["call"] == row["call"]}
            own = row["both_median_ms"]
            rivals = [f"{name} {times[name]:.3f} ({own / times[name]:.2f})" for name in RIVALS if name in times]
            yield ", ".join([f"{row['call']}: default ({row['implementation']}) {own:.3f} ms f+b", *rivals])


if __name__ == "__main__":
    main()
