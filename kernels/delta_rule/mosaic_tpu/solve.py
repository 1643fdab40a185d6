"""The resolvent of a triangular system: what the tokens of a chunk correct in each other.

For B [C, C] strictly lower triangular and b the diagonal matrix of the betas, X solves

    X = B - B b X = B - X b B        (I + B b)^-1 = I - X b        (I + b B)^-1 = I - b X

so that one matrix serves the system and its transpose, and the ones on the diagonals are never stored or rounded.
Inside blocks of 8 tokens, X comes row after row (exact substitution, on the vector unit: the blocks side by side in
the lanes). Two blocks become one of twice the size, with C the part of B below them:

    X_21 = (I - X_2 b) C (I - b X_1)

in products of float32 (`products`): one bfloat16 pass would lose near-parallel keys with betas towards 2, whose
resolvent multiplies errors by the size of the chunk.

A compact [s, TILE] array holds the blocks [s, s] of a block diagonal side by side.
"""

from collections.abc import Generator

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.passes import parts
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu.dots import Dots

BASE = 8  # tokens of the blocks that are solved by substitution
SUBLANES = 8


def resolvents(dots: Dots, systems: list[Array], betas: list[Array], chunk: int) -> Generator[None, None, list[Array]]:
    """X of each B, both compact [chunk, TILE], in steps. systems: zero but below the diagonals; betas: [1, TILE]."""
    result = yield from substitute([fold(system, BASE, 0) for system in systems], betas)
    size = BASE
    while size < chunk:
        result = yield from double(dots, result, systems, betas, size)
        size *= 2
    return result


def lane_block(shape: tuple[int, int], size: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, 1) >> (size.bit_length() - 1)


def fold(x: Array, size: int, below: int) -> Array:
    """The blocks [size, size] that lie `below` blocks below the diagonals of a compact x, compact; with `below` 1
    those of odd rows, in the lanes of even blocks, and anything in the others."""
    count = x.shape[0] // size
    lanes = lane_block((size, x.shape[1]), size) & (count - 1)
    result = x[below * size : (below + 1) * size]
    for block in range(1 + 2 * below, count, 1 + below):
        result = jnp.where(lanes == block - below, x[block * size : (block + 1) * size], result)
    return result


def spread(x: Array, size: int, below: int) -> Array:
    """[TILE, TILE], zero but for the compact blocks of x, each `below` blocks below the diagonal (or in the corner)."""
    lanes, count = lane_block(x.shape, size), x.shape[1] // size
    return jnp.concatenate([jnp.where(lanes == (block - below) % count, x, 0.0) for block in range(count)])


def substitute(systems: list[Array], betas: list[Array]) -> Generator[None, None, list[Array]]:
    """X of compact systems [BASE, TILE]: row i less B_ij b_j times row j, for each j < i."""
    count, tiles = len(systems), range(BASE // SUBLANES)
    x = [jnp.concatenate([system[SUBLANES * n : SUBLANES * (n + 1)] for system in systems]) for n in tiles]
    over = jnp.concatenate([jnp.broadcast_to(beta, (SUBLANES, TILE)) for beta in betas])
    coefficients = [part * over for part in x]
    lane = lax.broadcasted_iota(jnp.int32, x[0].shape, 1)
    for j in range(BASE - 1):
        row = x[j // SUBLANES].reshape(count, SUBLANES, TILE)[:, j % SUBLANES : j % SUBLANES + 1]
        row = jnp.broadcast_to(row, (count, SUBLANES, TILE)).reshape(x[0].shape)
        for n in tiles[(j + 1) // SUBLANES :]:
            column = jnp.take_along_axis(coefficients[n], (lane & -BASE) | j, axis=1, mode="promise_in_bounds")
            x[n] = x[n] - column * row
        yield
    return [jnp.concatenate([part[SUBLANES * h : SUBLANES * (h + 1)] for part in x]) for h in range(count)]


def double(
    dots: Dots, solved: list[Array], systems: list[Array], betas: list[Array], size: int
) -> Generator[None, None, list[Array]]:
    """X of blocks of twice the size, compact.

    Half of the blocks take part in either product: those of a second head, moved by one, lie in the lanes between."""
    count = len(solved)
    pairs = [(index, min(index + 1, count - 1)) for index in range(0, count, 2)]
    even = (lane_block(solved[0].shape, size) & 1) == 0
    betas = [jnp.broadcast_to(beta, solved[0].shape) for beta in betas]
    moved = [(move(solved[second], size), move(betas[second], size)) for _, second in pairs]
    below = [
        jnp.where(even, fold(systems[first], size, 1), move(fold(systems[second], size, 1), size))
        for first, second in pairs
    ]
    left = [
        c * jnp.where(even, betas[first], beta) for c, (first, _), (_, beta) in zip(below, pairs, moved, strict=True)
    ]
    right = [jnp.where(even, solved[first], x) for (first, _), (x, _) in zip(pairs, moved, strict=True)]
    below = [c - x for c, x in zip(below, products(dots, left, right, size, 0), strict=True)]
    yield
    left = [
        jnp.where(even, x * beta, solved[first] * betas[first])
        for (first, _), (x, beta) in zip(pairs, moved, strict=True)
    ]
    below = [c - x for c, x in zip(below, products(dots, left, below, size, 1), strict=True)]
    yield
    result = []
    for both, pair in zip(below, pairs, strict=True):
        for x, c in zip((solved[index] for index in pair), (both, move(both, TILE - size)), strict=True):
            result.append(jnp.concatenate([jnp.where(even, x, 0.0), jnp.where(even, c, x)]))
    return result[:count]


def move(x: Array, lanes: int) -> Array:
    return pltpu.roll(x, lanes, axis=1)


def products(dots: Dots, a: list[Array], b: list[Array], size: int, below: int) -> list[Array]:
    """Each a spread(b), float32: operands are split into a bfloat16 and the rest, and three of the four products of the
    parts are added, so that an element loses no more than 2^-15 of itself."""
    if dots.exact:
        return [dots.nn(x, spread(y, size, below)) for x, y in zip(a, b, strict=True)]
    a, b = [parts(x) for x in a], [parts(x) for x in b]
    both = [
        dots.nn(jnp.concatenate([x, x_low]), spread(y, size, below)) for (x, x_low), (y, _) in zip(a, b, strict=True)
    ]
    low = [dots.nn(x, spread(y_low, size, below)) for (x, _), (_, y_low) in zip(a, b, strict=True)]
    return [x[:size] + x[size:] + y for x, y in zip(both, low, strict=True)]
