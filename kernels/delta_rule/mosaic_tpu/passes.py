"""Products with the tokens of a chunk, in as many bfloat16 passes as their digits need.

A float32 operand is a bfloat16 and what is left of it, x = high + low. A matrix unit contracts 128 numbers or more at a
time, the tokens of a chunk are 64: both parts of what is contracted fit, and the product of both costs what one costs.

    [x   x ] [y_high; y_low]        `left`, `right`: x rounded, as it is for a product of the inputs' dtype
    [x_high  x_low] [y; y]          `left_split`, `rounded`: y rounded before, everywhere that it is used

A rounding of y that all see is a rounding of what was given, and as harmless; a rounding of the resolvent is not: it
adds up over near-parallel keys. For float32 inputs a matmul takes six passes itself; rows of other chunks are zeros.

A compact [c, TILE] array holds the blocks [c, c] of the chunks of a tile side by side, or those of the heads that share
lanes, [c, (h, c)]: they fill the contraction, and both parts are two of them.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots


def places(chunk: int) -> tuple[Array, Array]:
    """i and j in their chunk of the elements of a compact array."""
    i, lane = (lax.broadcasted_iota(jnp.int32, (chunk, TILE), axis) for axis in (0, 1))
    return i, lane & (chunk - 1)


def beside(x: Array, count: int) -> Array:
    """[count n, TILE] -> [n, TILE]: the rows of each of `count` chunks, in its lanes."""
    size, width = x.shape[0] // count, TILE // count
    result = x[:size]
    for chunk in range(1, count):
        lane = lax.broadcasted_iota(jnp.int32, result.shape, 1)
        result = jnp.where(lane >= chunk * width, x[chunk * size : (chunk + 1) * size], result)
    return result


def of_tile(dots: Dots, x: Array) -> Array:
    """A compact x as an operand on the left, [tokens, TILE]: of several chunks with zeros between them."""
    return x if dots.pack > 1 else spread_left(x, x.shape[0])


def spread_left(x: Array, size: int) -> Array:
    """[TILE, TILE], zero but for the blocks of a compact x, by products: an operand on the left whose elements were
    selected has the profiler abort."""
    place = lax.broadcasted_iota(jnp.int32, x.shape, 1) >> (size.bit_length() - 1)
    return jnp.concatenate([x * jnp.where(place == block, 1.0, 0.0) for block in range(x.shape[1] // size)])


def left(dots: Dots, x: Array) -> list[Array]:
    """Of each chunk, what multiplies `right`; x compact."""
    if dots.exact:
        return [x] * _chunks(dots, x)
    return [side.astype(dots.dtype) for side in _sides(dots, x, x)]


def left_split(dots: Dots, x: Array) -> list[Array]:
    """Of each chunk, what multiplies `rounded`; x compact."""
    if dots.exact:
        return [x] * _chunks(dots, x)
    return [side.astype(dots.dtype) for side in _sides(dots, *parts(x))]


def left_split_transposed(dots: Dots, x: Array) -> list[Array]:
    """`left_split` of each block transposed."""
    size = x.shape[0]
    if dots.pack > 1:
        blocks = [lanes.transpose(x, dots.pack)]
    else:
        blocks = jnp.concatenate([x] * (TILE // size)).T
        blocks = [blocks[start : start + size] for start in range(0, TILE, size)]  # each at the places of all
    if dots.exact:
        return blocks
    first = lax.broadcasted_iota(jnp.int32, x.shape, 1) < size
    split = (parts(block) for block in blocks)
    sides = [jnp.concatenate(x, axis=1) if len(blocks) == 1 else jnp.where(first, *x) for x in split]
    return [side.astype(dots.dtype) for side in sides]


def _chunks(dots, x):
    """How many a compact x holds."""
    return TILE // (x.shape[0] * dots.pack)


def _sides(dots, a, b):
    """[a b] of each chunk, of compact arrays."""
    size = a.shape[0]
    if _chunks(dots, a) == 1:
        return [jnp.concatenate([a, b], axis=1)]
    first, moved = lax.broadcasted_iota(jnp.int32, a.shape, 1) < size, pltpu.roll(b, size, axis=1)
    return [jnp.where(first, a, moved), jnp.where(first, moved, a)]


def keys(dots: Dots, k: Array, chunk: int) -> list[Array]:
    """Of each chunk, k^T as `left` has it, what multiplies `written`; k [tokens, K] in the inputs' dtype."""
    if dots.exact:
        return [k.T] * (k.shape[0] // chunk)
    return [jnp.concatenate([k[start : start + chunk]] * 2).T for start in range(0, k.shape[0], chunk)]


def right(dots: Dots, y: Array, number: int) -> Array:
    """y [c, (h, V)], of the chunk of that number; heads that share lanes lie below one another."""
    return written(dots, lanes.spread(y, dots.pack), number)


def written(dots: Dots, y: Array, number: int) -> Array:
    """As `right`, heads as they lie in y."""
    if not dots.exact:
        return jnp.concatenate(parts(y)).astype(dots.dtype)
    if dots.pack > 1:
        return y
    chunks = [y if index == number else jnp.zeros_like(y) for index in range(TILE // y.shape[0])]
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks)


def rounded(dots: Dots, y: Array, number: int) -> Array:
    """As `right`, of a y of `round_to`."""
    if dots.exact:
        return right(dots, y, number)
    return jnp.concatenate([lanes.spread(y, dots.pack)] * 2).astype(dots.dtype)


def round_to(dots: Dots, x: Array) -> Array:
    """float32 with the digits of the inputs' dtype. By Veltkamp's splitting (1968): libtpu's profiler aborts on a
    bfloat16 in between."""
    if dots.exact:
        return x
    shifted = x * (2.0**16 + 1.0)
    return shifted - (shifted - x)


def parts(x: Array) -> tuple[Array, Array]:
    """x = a bfloat16 + what is left of it, both float32."""
    x = x.astype(jnp.float32)
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16), jnp.float32)
    return high, x - high
