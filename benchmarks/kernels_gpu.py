"""The table of `python -m benchmarks.kernels --table=gpu`: every implementation and its rivals on one GPU, in one run.

For each call of benchmarks/kernels_calls.py and each implementation that takes it: milliseconds of the forward pass and
of forward and backward, while calls queue up on the device (`measure.queued`); TFLOP/s and GB/s of forward and backward
by the call's least arithmetic and traffic; and the share of the roofline, the time in which this device's own bf16
matmul and copy, measured first, would do that arithmetic or that traffic, whichever is longer. Beside them the errors
against a float64 reference at few tokens and heads (`Call.checked`): root mean square, of the output and of the worst
gradient. `host` marks a time that is the host's, not the device's.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks import measure
from benchmarks.kernels_calls import FLOAT32, input_sets
from kernels import dispatch
from kernels.attention.api import IMPLEMENTATIONS as ATTENTION
from kernels.linear_attention.api import IMPLEMENTATIONS as LINEAR_ATTENTION
from kernels.selective_scan.api import IMPLEMENTATIONS as SELECTIVE_SCAN

TABLES = {"linear_attention": LINEAR_ATTENTION, "selective_scan": SELECTIVE_SCAN, "attention": ATTENTION}
NOT_FOR_GPUS = {"reference", "recurrent", "mosaic_tpu", "splash"}
FLA_SHARE = 0.4  # of the minutes
HOST_BOUND = 0.9
PACKAGES = ("jax-linear-attention", "fla-core", "torch", "triton", "nvidia-cudnn-cu13")


def run(calls, minutes, quick=False):
    """Measure, print the table, and return what belongs in the record."""
    start = time.monotonic()
    theirs, reason = fla_rows(calls, 60 * FLA_SHARE * minutes)
    ceilings = measure_ceilings(quick)
    print(f"bf16 matmul {ceilings['tflops']:.3g} TFLOP/s, copy {ceilings['gbytes_per_second']:.4g} GB/s")
    print(HEADER)
    rows, left_out = [], {"all": {"fla": reason}} if reason else {}
    for name, call in calls.items():
        if time.monotonic() - start > 60 * minutes:
            left_out[name] = {"row": f"the {minutes} minutes were over"}
            continue
        results, expected, left_out[name] = measure_call(call)
        if fla := theirs.get(name):
            if "failed" in fla:
                left_out[name]["fla"] = fla["failed"]
            else:
                timings = tuple(measure.Timing(**fla[which]) for which in ("forward", "both"))
                results["fla"] = timings, fla["results"]
        rows += (new := rows_of(name, call, results, expected, ceilings))
        print("\n".join(map(line, new)), flush=True)
    names = collections.defaultdict(list)  # one line a reason
    for name, reasons in left_out.items():
        for reason in reasons.items():
            names[reason].append(name)
    for (which, why), where in names.items():
        print(f"no {which} in {', '.join(where)}: {why}")
    return {"packages": versions(), "ceilings": ceilings, "rows": rows, "left_out": left_out}


def measure_call(call):
    """Implementation -> ((forward, both) Timings, results of the checked call); the results in float64; the reasons of
    the implementations that are not there."""
    functions, reasons = supported(call)
    sets = [place(draw(call, seed)) for seed in range(input_sets(call))]
    checked = place(call.draw_checked())
    thunks, results = {}, {}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles outside of Python's lock
        builds = {name: pool.submit(build, call, function, sets[0], checked) for name, function in functions.items()}
        expected = pool.submit(exact, call)
    for name, future in builds.items():
        try:
            forward, both, results[name] = future.result()
            jax.block_until_ready(both(sets[0]))
        except Exception as error:  # out of memory, a kernel's own check: the others' rows must not be lost
            reasons[name] = short(error)
            continue
        thunks[name, "forward"] = [functools.partial(forward, arrays) for arrays in sets]
        thunks[name, "both"] = [functools.partial(both, arrays) for arrays in sets]
    times = measure.queued(thunks)
    names = [name for name, which in thunks if which == "both"]
    return (
        {name: ((times[name, "forward"], times[name, "both"]), results[name]) for name in names},
        expected.result(),
        reasons,
    )


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


def supported(call):
    """The functions of a call's operands that can be traced, and the reasons of those that cannot."""
    names = [name for name in TABLES[call.op] if name not in NOT_FOR_GPUS]
    functions = {name: functools.partial(implementation, call, name) for name in names}
    if call.op != "attention":
        functions["jla, kernels alone"] = functools.partial(jla_kernels, call)
    reasons = {}
    for name, function in list(functions.items()):
        try:
            jax.eval_shape(lambda function=function: function(place(draw(call, 0))))
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


def rows_of(name, call, results, expected, ceilings):
    rows = []
    for implementation, (timings, actual) in results.items():
        errors = {key: error_ratio(actual[key], expected[key]) for key in expected}
        row = {
            "call": name,
            "op": call.op,
            "shape": f"{call.batch}x{call.time} {dataclasses.asdict(call)['shape']}",
            "implementation": implementation,
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
        }
    )
    return {
        "tflops": 2e-12 * width**3 / (1e-3 * times["matmul"].median_ms),
        "gbytes_per_second": 1e-9 * 8 * floats / (1e-3 * times["copy"].median_ms),
    }


def fla_rows(calls, seconds):
    """Rows by call of flash-linear-attention's process; else why there are none."""
    names = [name for name, call in calls.items() if call.op == "linear_attention"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.kernels_fla", folder, str(seconds), *names]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        try:
            process = subprocess.run(command, env=environment, timeout=1.2 * seconds, stderr=subprocess.PIPE, text=True)
            reason = process.stderr.strip().splitlines()[-1:] if process.returncode else []
        except subprocess.TimeoutExpired:
            reason = [f"stopped after {1.2 * seconds:.0f} seconds"]
        path = pathlib.Path(folder, "rows.jsonl")
        rows = {}
        for row in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            if "failed" not in row:
                with np.load(path.with_name(f"{row['call']}.npz")) as arrays:
                    row["results"] = {name: arrays[name].astype(np.float64) for name in arrays}
            rows[row["call"]] = row
    return rows, (reason[0] if reason else None)


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
    host = " host" if max(row["forward_host_share"], row["both_host_share"]) > HOST_BOUND else ""
    return (
        f"{row['call']:24}{row['implementation']:20}{row['forward_median_ms']:9.3f}{row['both_median_ms']:9.3f}"
        f"{row['both_tflops']:10.3g}{row['both_gbytes_per_second']:10.3g}"
        f"{row['forward_roofline']:9.1%}{row['both_roofline']:9.1%}"
        f"{row['out_error']:11.1e}{row['gradient_errors'][worst]:11.1e} {worst}{host}"
    )
