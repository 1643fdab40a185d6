"""A tile of a slot of heads whose states decay by a number a key.

With b the cumulative sum of g in a chunk, in powers of two, and q scaled:

    B_ij = sum_K k_i k_j 2^(b_i - b_j), j < i      tril(q k^T)_ij likewise, j <= i      read = 2^b, write = 2^(b_C - b)

The pairs (i, j) are split by the highest bit in which i and j differ, their level s, a power of two
(../../linear_attention/mosaic_tpu/per_key.py): at level s they lie on both sides of the middle m of a block of 2 s
tokens, and (q_i 2^(b_i - m)) . (k_j 2^(m - b_j)) has no large exponent, whatever the decays.

For bfloat16 inputs each m is an integer, so that what a key is rounded by, its mantissa times that of 2^b, is the same
at all levels and in the reads and writes of the state: what is computed is the delta rule of keys a rounding away, and
no error is multiplied by the resolvent of near-parallel keys. Between b_i and b_j there need be no integer: q_i takes
the one above the middle and k_j the one below it, so that no exponent is positive, and the product is doubled. For
float32 inputs each exponent is
the sum of the very log-decays between two tokens, by a matmul with a matrix of ones. States are transposed, [V, K]:
decays are then rows, which broadcast.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu import passes
from kernels.delta_rule.mosaic_tpu.columns import over_lanes
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index
from kernels.linear_attention.mosaic_tpu.per_key import (
    COMPACT,
    at_middle,
    head_products,
    interleave,
    level_sizes,
    second,
)

LOG2_E = math.log2(math.e)


class Head:
    """Operands of one head, or of those of a slot: q, k [C, (h, K)]; g likewise, float32; beta [C, 128]."""

    def __init__(self, dots: Dots, q: Array, k: Array, g: Array, beta: Array, plan: Any):
        self.dots, self.scale, self.chunk, self.size = dots, plan.scale, plan.tiles.chunk, plan.tokens
        self.q, self.k, self.beta = plan.scale * q.astype(jnp.float32), k.astype(jnp.float32), beta
        decays = exact_decays if dots.exact else rounded_decays
        self.levels, self.read, self.write, self.totals, self.tails = decays(dots, g, self.chunk)
        self.times = 1.0 if dots.exact else 2.0  # what the levels' exponents leave out
        self.q_read, self.k_read = self.q * self.read, self.k * self.read
        self.k_write = self.k * self.write

    def scores(self) -> tuple[Array, Array]:
        """B and tril(q k^T), compact."""
        dots, size, count = self.dots, self.size, self.size // self.chunk
        i, j = passes.places(self.chunk)
        bits = i ^ j
        systems = attention = jnp.zeros(bits.shape, jnp.float32)
        for level, e in self.levels.items():
            k = self.k * e
            if level < COMPACT:
                both = dots.nt(jnp.concatenate([self.q * e, k]), dots.stack(k))
                of_q, of_k = (passes.beside(x, count) for x in (both[:size], both[size:]))
            else:
                reads = jnp.concatenate([second(self.q, level) * second(e, level), second(k, level)])
                both = dots.nt(reads, dots.stack(k))
                of_q, of_k = (passes.beside(x, count) for x in (both[: size // 2], both[size // 2 :]))
                of_q, of_k = (interleave(x, x, level) for x in (of_q, of_k))
            systems = jnp.where(bits >= level, of_k, systems)
            attention = jnp.where(bits >= level, of_q, attention)
        own = jnp.broadcast_to(head_products(dots, self.q, self.k), (size, TILE))
        # Factors: an operand on the left whose elements were selected has the profiler abort.
        below, diagonal = jnp.where(i > j, self.times, 0.0), jnp.where(i == j, 1.0, 0.0)
        return below * systems, below * attention + diagonal * passes.beside(own, count)

    def reads(self, rows: slice, state: Array) -> tuple[Array, Array]:
        """What the keys and the queries of a chunk find in the state before it, [c, V] each."""
        size = rows.stop - rows.start
        found = self.dots.nt(jnp.concatenate([self.k_read[rows], self.q_read[rows]]), self.dots.state(state))
        return found[:size], found[size:]

    def update(self, rows: slice, error: Array, state: Array) -> Array:
        """The next state. error: e, [c, V]."""
        dots, number = self.dots, rows.start // self.chunk
        u = over_lanes(self.beta[rows], error.shape[1]) * error
        k = self.k_write if dots.exact else jnp.concatenate([self.k_write[rows]] * 2)
        return self.totals[number] * state + self.tails[number] * dots.outer(passes.written(dots, u, number), k)

    def writes(self, rows: slice, d_state: Array) -> Array:
        """The gradient of what a chunk's tokens write, [c, V]."""
        return self.dots.nt(self.k_write[rows], self.dots.state(self.tails[rows.start // self.chunk] * d_state))

    def state_gradients(
        self, rows: slice, state: Array, d_end: Array, d_out: Array, dv: Array, u: Array
    ) -> tuple[Array, ...]:
        """Through the states: parts of dq, dk as what reads, dk as what writes [c, K], and the gradient of a state."""
        dots, size, index = self.dots, rows.stop - rows.start, rows.start // self.chunk
        d_found = jnp.concatenate([d_out, -dv]).astype(dots.dtype)
        d_read = dots.nn(d_found, dots.state(state)) * jnp.concatenate([self.read[rows]] * 2)
        d_write = self.write[rows] * dots.nn(u, dots.state(self.tails[index] * d_end))
        d_state = dots.outer(d_found, jnp.concatenate([self.q_read[rows], self.k_read[rows]]))
        return d_read[:size], d_read[size:], d_write, self.totals[index] * d_end + d_state

    def score_gradients(self, d_attention: Array, d_system: Array) -> tuple[Array, Array, Array]:
        """Through the scores: parts of dq, dk as what reads, dk as what writes [C, K]."""
        dots, size = self.dots, self.size
        i, j = grid_index(size, dots.pack)
        bits = jnp.where(i > j, i ^ j, 0)
        self.d_own = head_products(dots, d_attention, jnp.where(i == j, 1.0, 0.0))
        dq = dk_reads = dk_writes = jnp.zeros_like(self.q)
        for level, e in self.levels.items():
            here = jnp.where((bits >= level) & (bits < 2 * level), self.times, 0.0)
            q, k = self.q * e, self.k * e
            both = jnp.concatenate([d_attention * here, d_system * here])
            if level < COMPACT:
                d_read = dots.nn(both, dots.stack(k))
                dq, dk_reads = dq + e * d_read[:size], dk_reads + e * d_read[size:]
                dk_writes = dk_writes + e * dots.outer(both, jnp.concatenate([q, k]))
                continue
            rows = second(both, level).astype(dots.dtype)
            d_read = dots.nn(rows, dots.stack(k))
            e2 = second(e, level)
            zero = jnp.zeros_like(e2)
            dq = dq + interleave(zero, e2 * d_read[: size // 2], level)
            dk_reads = dk_reads + interleave(zero, e2 * d_read[size // 2 :], level)
            d_write = dots.outer(rows, jnp.concatenate([second(q, level), second(k, level)]))
            dk_writes = dk_writes + e * d_write
        return dq, dk_reads, dk_writes

    def later(self, next_state: Array, d_end: Array) -> Array:
        """What all later tokens add to the gradient of g, [1, K]."""
        return jnp.sum(next_state * d_end, axis=0, keepdims=True)

    def finish(self, dq: Array, dk_reads: Array, dk_writes: Array, later: list[Array]) -> tuple[Array, Array, Array]:
        """dq, dk and the gradient of g, [C, K]."""
        change = self.dots.count(
            lambda i, j: (j >= i) & ((i ^ j) < self.chunk), self.q * dq + self.k * (dk_reads - dk_writes)
        )
        change = change + jnp.concatenate([jnp.broadcast_to(x, (self.chunk, x.shape[1])) for x in later])
        # What a query gets of its own token's write decays nowhere.
        dq, dk = dq + self.d_own * self.k, dk_reads + dk_writes + self.d_own * self.q
        return self.scale * dq, dk, change


Decays = tuple[dict[int, Array], Array, Array, list[Array], list[Array]]


def rounded_decays(dots: Dots, g: Array, chunk: int) -> Decays:
    """Of each level, read, write [C, K]; of each chunk the total, and what writes lack of it, [1, K]."""
    sums = dots.count(lambda i, j: (j <= i) & ((i ^ j) < chunk), LOG2_E * g)
    row, levels = lax.broadcasted_iota(jnp.int32, g.shape, 0), {}
    for level in level_sizes(chunk):
        if level == 1:
            middle = jnp.where((row & 1) != 0, pltpu.roll(sums, 1, axis=0), sums)
        else:
            middle = at_middle(sums, row, level)
        past = sums - jnp.ceil(middle)
        levels[level] = jnp.exp2(jnp.minimum(jnp.where((row & level) != 0, past, -1.0 - past), 0.0))
    lasts = [sums[end - 1 : end] for end in range(chunk, g.shape[0] + 1, chunk)]
    write = [jnp.floor(last) - sums[n * chunk : (n + 1) * chunk] for n, last in enumerate(lasts)]
    write = jnp.exp2(jnp.minimum(jnp.concatenate(write), 0.0))
    tails = [2.0 * jnp.exp2(last - jnp.floor(last) - 1.0) for last in lasts]
    return levels, jnp.exp2(jnp.minimum(sums, 0.0)), write, [jnp.exp2(last) for last in lasts], tails


def exact_decays(dots: Dots, g: Array, chunk: int) -> Decays:
    i, j = grid_index(g.shape[0])
    inside = (i ^ j) < chunk

    def total_of(mask):
        return dots.nn(mask.astype(jnp.float32), g)

    levels = {}
    for level in level_sizes(chunk):
        middle = (i & -2 * level) + level - 1
        after = (j > i) & (j <= middle)
        before = (j > middle) & (j <= i)
        levels[level] = jnp.exp(total_of(after | before))
    read = jnp.exp(total_of((j <= i) & inside))
    write = jnp.exp(total_of((j > i) & inside))
    totals = [read[end - 1 : end] for end in range(chunk, g.shape[0] + 1, chunk)]
    return levels, read, write, totals, [jnp.ones_like(total) for total in totals]
