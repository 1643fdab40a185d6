"""A tile of TILE tokens of one head whose state decays by one number a token.

    P_ij = exp(sum of g over (j, i]), 0 above the diagonal and between chunks        read_i, write_j, total: likewise

The decays act on rows of values and outputs, so that heads of v may share q and k. States are [K, V].

For bfloat16 inputs the exponents are differences of cumulative sums; for float32 ones they are sums of the very
log-decays between two tokens, by a matmul with a matrix of ones, which takes no digits from a mild decay after a
strong one.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu.columns import lane_broadcast, over_lanes
from kernels.delta_rule.mosaic_tpu.solve import product
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index


def rows_per_head(dots: Dots) -> int:
    """Rows of sums of log-decays in a chunk that the caller prepares: up to a token; if exact, after it, and g."""
    return 3 if dots.exact else 1


@dataclasses.dataclass
class Group:
    """What heads of v that share q and k share: q, k [C, K] and their products."""

    q: Array
    k: Array
    q32: Array  # float32: registers of bfloat16 are not cut
    k32: Array
    qk: Array  # [C, C]
    kk: Array
    k_transposed: Array  # [K, C], float32


def group(dots: Dots, q: Array, k: Array) -> Group:
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    return Group(q, k, q32, k32, dots.nt(q, k), dots.nt(k, k), k32.T)


class Head:
    """Operands of one head. rows [., C], columns their transpose; of each of `rows_per_head`, `num_heads` rows."""

    def __init__(self, dots: Dots, group: Group, rows: Array, columns: Array, head: int, num_heads: int, plan: Any):
        i, j = grid_index(TILE)
        self.dots, self.group, self.scale = dots, group, plan.scale
        chunk = plan.tiles.chunk
        row, column = rows[head : head + 1], lane_broadcast(columns, head)
        starts = range(0, TILE, chunk)
        lasts = [row[:, start + chunk - 1 : start + chunk] for start in starts]
        if dots.exact:
            write_row = rows[num_heads + head : num_heads + head + 1]
            write = lane_broadcast(columns, num_heads + head)
            log_decay = over_lanes(lane_broadcast(columns, 2 * num_heads + head), TILE)
            between = dots.nn((j <= i).astype(jnp.float32), jnp.where(i > j, log_decay, 0.0))
        else:
            parts = [(last, start) for last, start in zip(lasts, starts, strict=True)]
            write_row = jnp.concatenate([last - row[:, start : start + chunk] for last, start in parts], axis=1)
            write = jnp.concatenate([last - column[start : start + chunk] for last, start in parts])
            between = over_lanes(column, TILE) - row
        self.strict = (i > j) & ((i ^ j) < chunk)
        self.pairs = jnp.where((i >= j) & ((i ^ j) < chunk), jnp.exp(jnp.minimum(between, 0.0)), 0.0)
        self.read, self.write = jnp.exp(column), jnp.exp(write)
        self.write_row = jnp.exp(write_row)
        self.totals = [jnp.exp(last) for last in lasts]

    def scores(self) -> tuple[Array, Array]:
        """B, of which what is below the diagonal in chunks counts, and tril(q k^T) of each chunk, scaled."""
        system = jnp.where(self.strict, self.group.kk * self.pairs, 0.0)
        return system, self.scale * self.group.qk * self.pairs

    def reads(self, rows: slice, state: Array) -> tuple[Array, Array]:
        """What the keys and the queries of a chunk find in the state before it, [c, V] each, the latter scaled."""
        size = rows.stop - rows.start
        found = self.dots.nn(jnp.concatenate([self.group.k32[rows], self.group.q32[rows]]), state)
        read = over_lanes(self.read[rows], state.shape[1])
        return read * found[:size], (self.scale * read) * found[size:]

    def within(self, attention: Array, rows: slice, padded: Array, beta: Array, state: Array) -> tuple[Array, Array]:
        """What the chunk's outputs get from its own tokens [c, V], and the next state.

        padded: e on all rows of the tile, 0 outside of the chunk."""
        return product(self.dots, attention[rows], padded), self.update(rows, padded, beta, state)

    def update(self, rows: slice, padded: Array, beta: Array, state: Array) -> Array:
        size = rows.stop - rows.start
        write = self.group.k_transposed * (self.write_row * beta)
        return self.totals[rows.start // size] * state + product(self.dots, write, padded)

    def writes(self, rows: slice, d_state: Array) -> Array:
        """The gradient of what a chunk's tokens write, [c, V]."""
        return over_lanes(self.write[rows], d_state.shape[1]) * self.dots.nn(self.group.k32[rows], d_state)

    def state_gradients(
        self, rows: slice, state: Array, d_end: Array, d_out: Array, dv: Array, u: Array
    ) -> tuple[Array, ...]:
        """Through the states: parts of dq, dk as what reads, dk as what writes [c, K], and the gradient of a state."""
        dots, size = self.dots, rows.stop - rows.start
        read = over_lanes(self.read[rows], dv.shape[1])
        d_found = jnp.concatenate([(self.scale * read) * d_out, -read * dv])
        d_read = dots.nt(d_found, state)
        d_write = dots.nt(over_lanes(self.write[rows], dv.shape[1]) * u, d_end)
        d_state = dots.tn(jnp.concatenate([self.group.q32[rows], self.group.k32[rows]]), d_found)
        d_state = self.totals[rows.start // size] * d_end + d_state
        return d_read[:size], d_read[size:], d_write, d_state

    def score_gradients(self, d_attention: Array, d_system: Array) -> tuple[Array, Array, Array]:
        """Through the scores: parts of dq, dk as what reads, dk as what writes [C, K]."""
        dots, group = self.dots, self.group
        d_attention = self.scale * self.pairs * d_attention
        d_system = jnp.where(self.strict, self.pairs * d_system, 0.0)
        both = jnp.concatenate([d_attention, d_system])
        d_read = dots.nn(both, group.k)
        return d_read[:TILE], d_read[TILE:], dots.tn(both, jnp.concatenate([group.q, group.k]))

    def later(self, next_state: Array, d_end: Array) -> Array:
        """What all later tokens add to the gradient of g, [1, 1]."""
        return jnp.sum(jnp.sum(next_state * d_end, axis=0, keepdims=True), axis=1, keepdims=True)

    def finish(self, dq: Array, dk_reads: Array, dk_writes: Array, later: list[Array]) -> tuple[Array, Array, Array]:
        """dq, dk [C, K], and the terms of the gradient of g, [C, 1]."""
        q, k, size = self.group.q, self.group.k, TILE // len(later)
        token = lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
        change = jnp.sum(q * dq + k * (dk_reads - dk_writes), axis=1, keepdims=True)
        for index, x in enumerate(later):
            # What later chunks add to every token's sum goes to the last token.
            change = change + jnp.where(token == (index + 1) * size - 1, x, 0.0)
        return dq, dk_reads + dk_writes, change
