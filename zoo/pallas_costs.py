"""What Pallas kernels of a traced program do: a compiler sees them as one call and counts nothing.

A kernel's products are those of its body times its grid; its bytes are its operands and results, each once. On TPUs the
kernels of this package have been counted in cycles (`python -m benchmarks.tpu_static`); TPU_CYCLES says how many times
the larger of both floors that was.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

# Of kernels by a part of their name: cycles over the larger floor, forward and backward, on v5e. From
# benchmarks/results/tpu_static.json: gla_1.3b, mamba2_8b, mamba_1.3b. The linear scan reads below its floor.
TPU_CYCLES = {
    "linear_attention_per_key_forward": 1.05,
    "linear_attention_per_key_backward": 1.20,
    "linear_attention_scalar_forward": 1.0,
    "linear_attention_scalar_backward": 1.56,
    "selective_scan_forward": 3.32,
    "selective_scan_backward": 5.59,
}


class Kernel(NamedTuple):
    """One Pallas call: floating-point operations of its products (dimensions rounded up to `matrix`), bytes that it
    reads and writes at least, and the bytes of its results."""

    name: str
    flops: int
    bytes: int
    results: int


def kernels(jaxpr: Any, matrix: int = 1) -> list[Kernel]:
    """The different Pallas calls of a jaxpr, as `jax.jit(f).trace(...).jaxpr.jaxpr`.

    Args:
      matrix: width of the matrix unit. Each dimension of a product counts up to a multiple of it.
    """
    found = {}
    for equation, _ in equations(jaxpr):
        if equation.primitive.name == "pallas_call":
            costs = kernel(equation, matrix)
            found[costs] = None
    return list(found)


def kernel(equation: Any, matrix: int = 1) -> Kernel:
    """The costs of a Pallas call."""
    body, grid = equation.params["jaxpr"], equation.params["grid_mapping"].grid
    products = sum(dot_flops(inner, matrix) * times for inner, times in equations(body))
    results = sum(map(_bytes, equation.outvars))
    return Kernel(_name(equation), math.prod(grid) * products, sum(map(_bytes, equation.invars)) + results, results)


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations with how often each runs; both sides of a branch. A Pallas call is one equation."""
    for equation in jaxpr.eqns:
        yield equation, times
        if equation.primitive.name == "pallas_call":
            continue
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inner_times)


def dot_flops(equation: Any, matrix: int = 1) -> int:
    """Of a matrix product, else 0."""
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    sides = len(left) - len(contracted) - len(batch)  # of the left operand, in the result
    batched, rows, columns = out[: len(batch)], out[len(batch) : len(batch) + sides], out[len(batch) + sides :]
    rounded = (-(-math.prod(size) // matrix) * matrix for size in (rows, columns, (depth,)))
    return 2 * math.prod(batched) * math.prod(rounded)


def _name(equation: Any) -> str:
    info = equation.params.get("name_and_src_info")
    return equation.params.get("name") or getattr(info, "name", None) or str(info or "")


def _bytes(variable: Any) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize
