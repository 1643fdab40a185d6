"""The decays of a chunk of C tokens, a number a key: of each level of pairs, and to the chunk's start and end.

With b the cumulative sum of g, what token i reads has decayed by b_{i-1} = b_i - g_i: it reads before its own decay.
The pairs j < i are split by the highest bit in which i and j differ, their level
(../../linear_attention/mosaic_tpu/per_key.py): at a level they lie on both sides of the middle m of a block, and

    exp(b_{i-1} - b_j) = exp(b_{i-1} - b_m) exp(b_m - b_j)

neither of which is above 1. For bfloat16 inputs, in powers of two, an integer stands for each b_m, so that what a key
is rounded by is the same at all levels, at the start and at the end (../../delta_rule/mosaic_tpu/per_key.py): the one
above it for reads, the one below that for writes, which leaves a factor of two, `times`. For float32 ones each exponent
is the sum of the very log-decays, by a matmul with a matrix of ones.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index
from kernels.linear_attention.mosaic_tpu.per_key import COMPACT, at_middle, first, level_sizes, second
from kernels.linear_attention.mosaic_tpu.plan import LOG2E


class Decays(NamedTuple):
    # Of each level those of writes in the first halves of blocks and of reads in the second, [C, (h, K)], from COMPACT
    # on as two arrays [C / 2, (h, K)]; a read times a write lacks a factor `times`.
    levels: dict[int, tuple[Array, ...]]
    times: float
    own: Array  # exp(g)
    read: Array  # from the start of the chunk to before a token
    write: Array  # from a token to the end of the chunk, but for `tail`, [1, (h, K)]
    total: Array  # [1, (h, K)]
    tail: Array


def decays(dots: Dots, g: Array) -> Decays:
    """Of log-decays [C, (h, K)], float32."""
    return exact_decays(dots, g) if dots.exact else rounded_decays(dots, g)


def rounded_decays(dots: Dots, g: Array) -> Decays:
    g = LOG2E * g
    sums = dots.count(lambda i, j: j <= i, g)
    before = sums - g
    row, levels = lax.broadcasted_iota(jnp.int32, g.shape, 0), {}
    for level in level_sizes(g.shape[0]):
        if level == 1:
            middle = jnp.where((row & 1) != 0, pltpu.roll(sums, 1, axis=0), sums)
        else:
            middle = at_middle(sums, row, level)
        if level < COMPACT:
            middle = jnp.ceil(middle)
            levels[level] = (jnp.exp2(jnp.where((row & level) != 0, before - middle, middle - 1.0 - sums)),)
        else:
            middle = jnp.ceil(first(middle, level))
            levels[level] = jnp.exp2(middle - 1.0 - first(sums, level)), jnp.exp2(second(before, level) - middle)
    last = sums[-1:]
    end = jnp.ceil(last)
    own, read, write, total, tail = map(jnp.exp2, (g, before, end - 1.0 - sums, last, last - end))
    return Decays(levels, 2.0, own, read, write, total, 2.0 * tail)


def exact_decays(dots: Dots, g: Array) -> Decays:
    i, j = grid_index(g.shape[0])

    def total_of(mask):
        return dots.nn(mask.astype(jnp.float32), g)

    levels = {}
    for level in level_sizes(g.shape[0]):
        middle = (i & -2 * level) + level - 1
        e = jnp.exp(total_of(((j > i) & (j <= middle)) | ((j > middle) & (j < i))))
        levels[level] = (e,) if level < COMPACT else (first(e, level), second(e, level))
    total = jnp.exp(jnp.sum(g, axis=0, keepdims=True))
    own, read, write = jnp.exp(g), jnp.exp(total_of(j < i)), jnp.exp(total_of(j > i))
    return Decays(levels, 1.0, own, read, write, total, jnp.ones_like(total))
