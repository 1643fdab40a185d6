"""Times and memory of the ops: `python -m benchmarks.kernels [op ...] [--shapes=1x4096x4x64x64,...] [--quick]`.

For each op, kind and shape, in one run with its implementations called in turn: milliseconds of the forward pass, and
of forward and backward (medians; minima in the JSON), bytes allocated at once (the compiler's temporaries and
outputs, forward and backward), and how many times longer the step-by-step reference and `jax.lax.associative_scan`
take. `default` is what a call without `implementation` runs. Without --shapes and --quick the rows are also written
to benchmarks/results/. Where the package jax-linear-attention is installed (Python 3.12, jax 0.11.2: the extra `jla`),
`package jla` is its op of the same recurrence as it comes, and how many times longer that takes.

linear_attention also has its arithmetic floor: the multiply-adds of the chunk algorithm, chunk 64, what the
backward pass computes again included, at the rate of a 2048-wide float32 matmul in the same run.

On a GPU, or with --table=gpu, another table: benchmarks/kernels_gpu.py.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kernels
from benchmarks import measure, record
from benchmarks.kernels_calls import CALLS, QUICK_CALLS, chunk_multiply_adds
from kernels import dispatch

LONG, TRAINING, SMALL = (1, 4096, 4, 64, 64), (16, 512, 4, 32, 64), (32, 256, 4, 16, 32)  # B, T, H, K, V
QUICK = (2, 256, 4, 32, 32)
LENGTHS = (4096, 8192, 16384, 32768)  # tokens, of the linearity rows
STATES_LIMIT = 2**29  # bytes of [B, T, H, K, V] up to which associative_scan is tried: it holds several of them
REFERENCE_SCORES_LIMIT = 2**28  # bytes of [B, H, T, T]


@dataclasses.dataclass
class Case:
    op: str
    kind: str
    shape: tuple[int, ...]
    functions: dict[str, Callable[..., Any]]  # implementation -> function of the arrays
    arrays: tuple[jax.Array, ...]  # differentiated in all of them that are of floats
    floor: tuple[float, float] | None = None  # multiply-adds: forward, forward and backward


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def linear_attention_cases(shape):
    batch, time, heads, key_dim, value_dim = shape
    q, k, v = (normal(i, *shape[:3], dim) for i, dim in enumerate((key_dim, key_dim, value_dim)))
    decays = {
        "none": (),
        "fixed [H]": (-0.05 * jnp.ones(heads),),
        "scalar [B,T,H]": (-0.1 * jnp.abs(normal(3, batch, time, heads)),),
        "per key [B,T,H,K]": (-0.1 * jnp.abs(normal(3, batch, time, heads, key_dim)),),
    }
    for kind, decay in decays.items():
        functions = implementations(kernels.linear_attention, "recurrent", "chunked", first_result=True)
        if 4 * batch * time * heads * key_dim * value_dim <= STATES_LIMIT and kind.startswith("per key"):
            functions["associative_scan"] = linear_attention_by_associative_scan
        functions |= package_jla("gla" if kind.startswith("per key") else "simple_gla", "g")
        yield Case("linear_attention", kind, shape, functions, (q, k, v, *decay), chunk_multiply_adds(*shape))


def linear_attention_by_associative_scan(q, k, v, log_decay):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay = jnp.exp(log_decay)[..., None]
    _, states = jax.lax.associative_scan(combine, (decay, k[..., :, None] * v[..., None, :]), axis=1)
    return q.shape[-1] ** -0.5 * jnp.einsum("bthk,bthkv->bthv", q, states)


def delta_rule_cases(shape):
    batch, time, heads, key_dim, value_dim = shape
    q, k, v = (normal(i, *shape[:3], dim) for i, dim in enumerate((key_dim, key_dim, value_dim)))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(normal(3, *shape[:3]))
    decays = {
        "none": ((), "deltanet"),
        "scalar [B,T,H]": ((-0.1 * jnp.abs(normal(4, *shape[:3])),), "gated_deltanet"),
        "per key [B,T,H,K]": ((-0.1 * jnp.abs(normal(4, *q.shape)),), "kda"),
    }
    for kind, (decay, name) in decays.items():
        functions = implementations(kernels.delta_rule, "recurrent", "chunked", first_result=True)
        functions |= package_jla(name, "beta", "g")
        yield Case("delta_rule", kind, shape, functions, (q, k, v, beta, *decay))


def dplr_delta_rule_cases(shape):
    """RWKV-7's: a = -kappa, b = kappa times a rate."""
    batch, time, heads, key_dim, value_dim = shape
    q, k, v = (normal(i, *shape[:3], dim) for i, dim in enumerate((key_dim, key_dim, value_dim)))
    kappa, rate = normal(3, *q.shape), jax.nn.sigmoid(normal(4, *q.shape))
    kappa = kappa / jnp.linalg.norm(kappa, axis=-1, keepdims=True)
    arrays = (q, k, v, -kappa, kappa * rate, -0.1 * jnp.abs(normal(5, *q.shape)))
    functions = implementations(kernels.dplr_delta_rule, "recurrent", "chunked", first_result=True)
    yield Case("dplr_delta_rule", "per key", shape, functions | package_jla("rwkv7", "a", "b", "w"), arrays)


def package_jla(kind, *gates):
    """{name: function of q, k, v and gates}, empty where the package is not installed. A gate not given is 0."""
    if importlib.util.find_spec("jla") is None:
        return {}

    def run(q, k, v, *given):
        named = dict(zip(gates, given, strict=False))
        if kind == "simple_gla":
            named["g"] = jnp.broadcast_to(named.get("g", 0.0), v.shape[:3])
        return importlib.import_module("jla.ops").linear_attention(kind, q, k, v, scale=q.shape[-1] ** -0.5, **named)[0]

    return {"package jla": run}


def linear_scan_cases(shape):
    batch, time, heads, _, value_dim = shape
    x = normal(0, batch, time, heads * value_dim)
    log_decay = -0.1 * jnp.abs(normal(1, *x.shape))

    def by_associative_scan(x, log_decay):
        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        return jax.lax.associative_scan(combine, (jnp.exp(log_decay), x), axis=1)[1]

    for kind, turn in {"real": 0.0, "complex": 1.0j}.items():
        functions = implementations(kernels.linear_scan, "chunked", first_result=True)
        yield Case(
            "linear_scan",
            kind,
            shape,
            functions | {"associative_scan": by_associative_scan},
            (x + 0 * turn, log_decay + turn * normal(2, *x.shape)) if turn else (x, log_decay),
        )


def selective_scan_cases(shape, state_size=16):
    """Mamba's inner width, twice the model's."""
    batch, time, heads, _, value_dim = shape
    channels = 2 * heads * value_dim
    x, B, C = normal(0, batch, time, channels), normal(1, batch, time, state_size), normal(2, batch, time, state_size)
    dt = jax.nn.softplus(normal(3, *x.shape) - 4)
    A = -jnp.broadcast_to(jnp.arange(1.0, state_size + 1), (channels, state_size))
    functions = implementations(kernels.selective_scan, "chunked", first_result=True)
    if 4 * batch * time * channels * state_size <= STATES_LIMIT:
        functions["associative_scan"] = selective_scan_by_associative_scan
    yield Case("selective_scan", f"D {channels}, N {state_size}", shape, functions, (x, dt, A, B, C))


def selective_scan_by_associative_scan(x, dt, A, B, C):
    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay, written = jnp.exp(dt[..., None] * A), (dt * x)[..., None] * B[..., None, :]
    _, states = jax.lax.associative_scan(combine, (decay, written), axis=1)
    return jnp.einsum("btdn,btn->btd", states, C)


def diagonal_ssm_cases(shape, state_size=32):
    """S4D at the model's width: 64 real numbers of state a channel."""
    batch, time, heads, _, value_dim = shape
    channels = heads * value_dim
    dt = 10 ** jax.random.uniform(jax.random.key(0), (channels, 1), minval=-3, maxval=-1)
    log_a = dt * (-0.5 + 1j * jnp.pi * jnp.arange(state_size))
    b = c = log_a / jnp.abs(log_a)
    functions = implementations(kernels.diagonal_ssm, "chunked", first_result=True)
    arrays = (normal(1, batch, time, channels), log_a, b, c)
    yield Case("diagonal_ssm", f"N {state_size} complex", shape, functions, arrays)


def attention_cases(shape):
    batch, time, heads, key_dim, value_dim = shape
    q, k, v = (normal(i, *shape[:3], dim) for i, dim in enumerate((key_dim, key_dim, value_dim)))
    small = 4 * batch * heads * time**2 <= REFERENCE_SCORES_LIMIT
    for kind, window in {"causal": None, "window 256": 256}.items():
        functions = implementations(kernels.attention, "chunked", reference=small, window=window)
        yield Case("attention", kind, shape, functions, (q, k, v))


def short_conv_cases(shape):
    batch, time, heads, _, value_dim = shape
    x, weight = normal(0, batch, time, heads * value_dim), normal(1, heads * value_dim, 4)
    functions = implementations(kernels.short_conv, "chunked", first_result=True, activation="silu")
    yield Case("short_conv", "4 taps, silu", shape, functions, (x, weight))


def cross_entropy_cases(shape, vocab_size=4096):
    batch, time, heads, _, value_dim = shape
    hidden, head = normal(0, batch * time, heads * value_dim), 0.02 * normal(1, heads * value_dim, vocab_size)
    targets = jax.random.randint(jax.random.key(2), (batch * time,), 0, vocab_size)
    weights = jnp.ones(batch * time)

    def reference(hidden, head):
        logits = jax.nn.log_softmax(hidden @ head)
        return -weights * jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]

    functions = {
        "default": lambda hidden, head: kernels.cross_entropy(hidden, head, targets, weights),
        "reference": reference,
    }
    yield Case("cross_entropy", f"vocabulary {vocab_size}", shape, functions, (hidden, head))


def implementations(op, *names, reference=True, first_result=False, **options):
    def function(implementation):
        def run(*arrays):
            result = op(*arrays, implementation=implementation, **options)
            return result[0] if first_result else result

        return run

    names = ("default", *names, *(("reference",) if reference else ()))
    return {name: function(None if name == "default" else name) for name in names}


CASES = {
    "linear_attention": linear_attention_cases,
    "delta_rule": delta_rule_cases,
    "dplr_delta_rule": dplr_delta_rule_cases,
    "linear_scan": linear_scan_cases,
    "selective_scan": selective_scan_cases,
    "diagonal_ssm": diagonal_ssm_cases,
    "attention": attention_cases,
    "short_conv": short_conv_cases,
    "cross_entropy": cross_entropy_cases,
}


def forward_and_backward(function):
    def run(cotangent, *arrays):
        out, vjp = jax.vjp(function, *arrays)
        return out, vjp(cotangent)

    return run


def measure_case(case, rounds):
    """Rows of the table, one an implementation, and the rate of the yardstick in FLOP/s."""
    yardstick, flops = measure.matmul()
    timed, memory = {"matmul": yardstick}, {}
    for name, function in case.functions.items():
        cotangent = jax.jit(function)(*case.arrays)
        forward = jax.jit(function).lower(*case.arrays).compile()
        both = jax.jit(forward_and_backward(function)).lower(cotangent, *case.arrays).compile()
        timed[name, "forward"] = functools.partial(forward, *case.arrays)
        timed[name, "both"] = functools.partial(both, cotangent, *case.arrays)
        memory[name] = measure.peak_bytes(forward), measure.peak_bytes(both)
    times = measure.interleaved(timed, rounds)
    rate = flops / (1e-3 * times["matmul"].min_ms)
    rows = []
    for name in case.functions:
        forward, both = times[name, "forward"], times[name, "both"]
        row = {
            "op": case.op,
            "kind": case.kind,
            "shape": "x".join(map(str, case.shape)),
            "implementation": name,
            "forward_ms": forward.median_ms,
            "forward_min_ms": forward.min_ms,
            "both_ms": both.median_ms,
            "both_min_ms": both.min_ms,
            "both_runs": both.runs,
            "forward_bytes": memory[name][0],
            "both_bytes": memory[name][1],
            "tokens_per_second": case.shape[0] * case.shape[1] / (1e-3 * both.median_ms),
            "matmul_gflops": rate / 1e9,
        }
        for rival in ("reference", "associative_scan", "package jla"):
            if rival in case.functions:
                row[f"{rival}_over_forward"] = times[rival, "forward"].median_ms / forward.median_ms
                row[f"{rival}_over_both"] = times[rival, "both"].median_ms / both.median_ms
        if case.floor:
            row["forward_over_floor"] = forward.min_ms / (1e3 * 2 * case.floor[0] / rate)
            row["both_over_floor"] = both.min_ms / (1e3 * 2 * case.floor[1] / rate)
        rows.append(row)
    return rows


def linearity_cases():
    """linear_attention with a decay per key, default and chunked, at growing length."""
    for time in LENGTHS:
        *_, case = linear_attention_cases((1, time, *LONG[2:]))
        case.functions = {name: case.functions[name] for name in ("default", "chunked")}
        yield case


HEADER = (
    f"{'op':17}{'kind':19}{'B x T x H x K x V':19}{'implementation':17}{'fwd ms':>9}{'f+b ms':>9}{'f+b MB':>9}"
    f"{'ref/this f':>11}{'f+b':>7}{'assoc/this f':>13}{'f+b':>7}{'jla/this f':>11}{'f+b':>7}{'f+b/floor':>10}"
)


def line(row):
    def ratio(name, width):
        return f"{row[name]:{width}.2f}" if name in row else " " * (width - 1) + "-"

    return (
        f"{row['op']:17}{row['kind']:19}{row['shape']:19}{row['implementation']:17}"
        f"{row['forward_ms']:9.2f}{row['both_ms']:9.2f}{row['both_bytes'] / 1e6:9.1f}"
        + ratio("reference_over_forward", 11)
        + ratio("reference_over_both", 7)
        + ratio("associative_scan_over_forward", 13)
        + ratio("associative_scan_over_both", 7)
        + ratio("package jla_over_forward", 11)
        + ratio("package jla_over_both", 7)
        + ratio("both_over_floor", 10)
    )


def gpu_table(args, error):
    from benchmarks import kernels_gpu

    calls = QUICK_CALLS if args.quick else CALLS
    names = args.calls.split(",") if args.calls else list(calls)
    if unknown := [name for name in names if name not in calls]:
        error(f"unknown call {unknown[0]!r}; expected some of {', '.join(calls)}")
    if args.ops or args.shapes:
        error("the table of a GPU takes --calls, no op and no --shapes")
    print(", ".join(f"{name} {value}" for name, value in record.environment().items()))
    results = kernels_gpu.run({name: calls[name] for name in names}, args.minutes, args.quick)
    if not args.quick:
        record.write("kernels_gpu_calls" if args.calls else "kernels_gpu", results)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--shapes", help="BxTxHxKxV, comma-separated")
    parser.add_argument("--quick", action="store_true", help="one small shape, few runs")
    parser.add_argument("--table", choices=("cpu", "gpu"), help="by default that of jax's device")
    parser.add_argument("--calls", help=f"of the GPU's table, comma-separated: some of {', '.join(CALLS)}")
    parser.add_argument(
        "--minutes",
        type=float,
        default=7,
        help="no call of the GPU's table is begun later, and each is stopped soon after",
    )
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a process beside this one needs memory too
    if (args.table or dispatch.device().platform) == "gpu":
        return gpu_table(args, parser.error)
    if args.calls:
        parser.error("--calls is of the GPU's table; add --table=gpu")
    if unknown := [op for op in args.ops if op not in CASES]:
        parser.error(f"unknown op {unknown[0]!r}; expected some of {', '.join(CASES)}")
    shapes = [QUICK] if args.quick else [LONG, TRAINING, SMALL]
    if args.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
        if any(len(shape) != 5 for shape in shapes):
            parser.error(f"--shapes={args.shapes}: expected BxTxHxKxV, as in 1x4096x4x64x64")

    ops = args.ops or list(CASES)
    cases = [case for op in ops for shape in shapes for case in CASES[op](shape)]
    if "linear_attention" in ops and not args.quick and not args.shapes:
        cases += linearity_cases()
    load = os.getloadavg()[0]
    print(", ".join(f"{name} {value}" for name, value in record.environment().items()) + f", load average {load:.1f}")
    print(HEADER)
    rows = []
    for case in cases:
        rows += (new := measure_case(case, rounds=3 if args.quick else 15))
        print("\n".join(map(line, new)), flush=True)
    rates = [row["matmul_gflops"] for row in rows]
    print(f"matmul 2048 float32: {max(rates):.1f} GFLOP/s at best, {min(rates):.1f} in the busiest run")
    if not args.quick and not args.shapes:
        name = "kernels" if ops == list(CASES) else "kernels_" + "_".join(ops)
        record.write(name, {"load_average": load, "rows": rows})


if __name__ == "__main__":
    main()
