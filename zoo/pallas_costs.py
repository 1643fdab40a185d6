"""What Pallas kernels of a traced program do: a compiler sees them as one call and counts nothing.

A kernel's products are those of its body times its grid; its bytes are its operands and results, each once. On TPUs the
kernels of this package have been counted in cycles (`python -m benchmarks.tpu_static`); TPU_CYCLES says how many times
the larger of both floors that was.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# Of kernels by a part of their name: cycles over the larger floor on each of COUNTED, at least 1. From
# benchmarks/results/tpu_static.json: gla_1.3b, mamba2_8b, delta_rule_vector and _scalar, mamba_1.3b. The linear scan
# reads below its floor.
COUNTED = ("TPU v5 lite", "TPU v5", "TPU v6")
TPU_CYCLES = {
    "linear_attention_per_key_forward": (1.05, 1.47, 1.27),
    "linear_attention_per_key_backward": (1.20, 1.21, 1.60),
    "linear_attention_scalar_forward": (1.16, 1.73, 1.54),
    "linear_attention_scalar_backward": (2.25, 2.28, 3.56),
    "delta_rule_per_key_forward": (1.61, 1.88, 2.34),
    "delta_rule_per_key_backward": (1.59, 1.77, 4.05),
    "delta_rule_scalar_forward": (1.12, 2.02, 1.65),
    "delta_rule_scalar_backward": (2.17, 2.47, 2.92),
    "selective_scan_forward": (3.31, 5.32, 5.71),
    "selective_scan_backward": (5.50, 8.56, 8.97),
}
LANES = 128  # of a TPU's registers and matrix units


def over_floor(name: str, device_kind: str) -> float:
    """How many times its floor a kernel takes by its static count; 1 if it was not counted, v5p's on other TPUs."""
    # Not those of an op whose name ends with another's, as dplr_delta_rule's.
    ratios = next((ratios for part, ratios in TPU_CYCLES.items() if re.search(rf"(?<![a-z_]){part}", name)), None)
    if ratios is None or not device_kind.startswith("TPU"):
        return 1.0
    return ratios[COUNTED.index(device_kind) if device_kind in COUNTED else 1]


class Kernel(NamedTuple):
    """One Pallas call: floating-point operations of its products, bytes that it reads and writes at least, and those
    of its results."""

    name: str
    flops: int
    bytes: int
    results: int


def kernels(jaxpr: Any, lanes: int = LANES) -> list[Kernel]:
    """The different Pallas calls of a jaxpr, as `jax.jit(f).trace(...).jaxpr.jaxpr`.

    Args:
      lanes: rows, columns and depth of a product count up to a multiple of it.
    """
    calls = (equation for equation, _ in equations(jaxpr) if equation.primitive.name == "pallas_call")
    return list(dict.fromkeys(kernel(call, lanes) for call in calls))


def kernel(equation: Any, lanes: int = 1) -> Kernel:
    """The costs of a Pallas call. Of the sides of a branch the one with more products runs."""
    products = math.prod(equation.params["grid_mapping"].grid) * _products(equation.params["jaxpr"], lanes)
    if _name(equation).startswith("splash_mha"):  # jax's attention, causal here: nothing above the diagonal is computed
        rows, columns = equation.invars[0].aval.shape[-2:]  # of blocks, with a window those in reach
        products = products * (rows + 1) // (2 * rows) if rows == columns else products
    results = sum(map(_bytes, equation.outvars))
    return Kernel(_name(equation), products, sum(map(_bytes, equation.invars)) + results, results)


def _products(jaxpr: Any, lanes: int) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += dot_flops(equation, lanes)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inside = [_products(inner, lanes) for inner in _inner(equation)]
        total += times * (max(inside, default=0) if equation.primitive.name == "cond" else sum(inside))
    return total


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations with how often each runs; both sides of a branch. A Pallas call is one equation."""
    for equation in jaxpr.eqns:
        yield equation, times
        if equation.primitive.name != "pallas_call":
            inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
            for inner in _inner(equation):
                yield from equations(inner, inner_times)


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def dot_flops(equation: Any, lanes: int = 1) -> int:
    """Of a matrix product, else 0."""
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    sides = len(left) - len(contracted) - len(batch)  # of the left operand, in the result
    batched, rows, columns = out[: len(batch)], out[len(batch) : len(batch) + sides], out[len(batch) + sides :]
    rounded = (-(-math.prod(size) // lanes) * lanes for size in (rows, columns, (depth,)))
    return 2 * math.prod(batched) * math.prod(rounded)


def _name(equation: Any) -> str:
    info = equation.params.get("name_and_src_info")
    return equation.params.get("name") or getattr(info, "name", None) or str(info or "")


def _bytes(variable: Any) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize
