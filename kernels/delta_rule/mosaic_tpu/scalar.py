"""A tile of a slot of heads whose states decay by one number a token.

    P_ij = exp(sum of g over (j, i]), 0 above the diagonal        read_i, write_j, total: up to i, after j, of all

tokens of a chunk. The decays act on rows of values and outputs, so that heads of v may share q and k. States are
[K, V]; scores are compact (passes.py).

For bfloat16 inputs the exponents are differences of cumulative sums, to the base 2; for float32 ones they are sums of
the very log-decays between two tokens, by a matmul with a matrix of ones, which takes no digits from a mild decay after
a strong one.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array
from kernels.delta_rule.mosaic_tpu import passes
from kernels.delta_rule.mosaic_tpu.columns import Numbers, over_lanes
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index

# Kinds of numbers of a token: those that the caller prepares, sums of log-decays in a chunk among them (up to a token,
# after it), and, if exact, the log-decay; in the kernels, what of a token's correction is left at the chunk's end.
BETA, UPTO, AFTER, LOG_DECAY = range(4)


def kinds(dots: Dots) -> int:
    return 4 if dots.exact else 3


def with_written(dots: Dots, numbers: Numbers) -> Numbers:
    return numbers.more(numbers.kind(BETA) * exp(dots, numbers.kind(AFTER)))


def exp(dots: Dots, x: Array) -> Array:
    return jnp.exp(x) if dots.exact else jnp.exp2(x)


@dataclasses.dataclass
class Group:
    """What slots of v that share q and k share: q, k [C, (h, K)] and their products."""

    q: Array
    k: Array
    qk: Array  # compact
    kk: Array
    keys: list[Array]  # of each chunk, k^T


def group(dots: Dots, q: Array, k: Array, chunk: int) -> Group:
    both, size = dots.nt(jnp.concatenate([q, k]), dots.stack(k)), k.shape[0]
    qk, kk = (passes.beside(x, size // chunk) for x in (both[:size], both[size:]))
    return Group(q, k, qk, kk, passes.keys(dots, k, chunk))


class Head:
    """Operands of one head, or of those of a slot."""

    def __init__(self, dots: Dots, group: Group, numbers: Numbers, head: int, plan: Any):
        self.dots, self.group, self.scale, self.chunk = dots, group, plan.scale, plan.tiles.chunk
        self.numbers, self.head = numbers, head
        row, column = numbers.row(UPTO, head), numbers.column(UPTO, head)
        i, j = passes.places(self.chunk)
        # Factors: an operand on the left whose elements were selected has the profiler abort.
        self.below, self.upto = (jnp.where(x, 1.0, 0.0) for x in (i > j, i >= j))
        if dots.exact:
            (i, j), (read, write) = grid_index(plan.tokens), grid_index(plan.tokens, plan.pack)
            log_decay = jnp.where(read > write, numbers.column(LOG_DECAY, head), 0.0)
            between = passes.beside(dots.nn((j <= i).astype(jnp.float32), log_decay), plan.chunks)
        else:
            between = passes.beside(column, plan.chunks) - row
        self.pairs = exp(dots, jnp.minimum(between, 0.0))
        ends = [row[:, end - 1 : end] for end in range(self.chunk, TILE + 1, self.chunk)]
        if plan.pack > 1:
            ends = [lanes.over_lanes([jnp.broadcast_to(x, (1, lanes.LANES)) for x in ends], lanes.LANES // plan.pack)]
        self.totals = [exp(dots, x) for x in ends]

    def scores(self) -> tuple[Array, Array]:
        """B, and tril(q k^T), scaled."""
        system = self.group.kk * self.pairs * self.below
        return system, self.scale * self.group.qk * self.pairs * self.upto

    def reads(self, rows: slice, state: Array) -> tuple[Array, Array]:
        """What the keys and the queries of a chunk find in the state before it, [c, V] each, the latter scaled."""
        size = rows.stop - rows.start
        found = self.dots.nn(jnp.concatenate([self.group.k[rows], self.group.q[rows]]), self.dots.state(state))
        read = over_lanes(self.read(rows), state.shape[1])
        return read * found[:size], (self.scale * read) * found[size:]

    def update(self, rows: slice, error: Array, state: Array) -> Array:
        """The next state. error: e, [c, V]."""
        number = rows.start // self.chunk
        written = over_lanes(self.numbers.column(kinds(self.dots), self.head, rows), error.shape[1])
        more = self.dots.nn(self.group.keys[number], passes.written(self.dots, written * error, number))
        return self.totals[number] * state + lanes.blocks(more, self.dots.pack)

    def writes(self, rows: slice, d_state: Array) -> Array:
        """The gradient of what a chunk's tokens write, [c, V]."""
        found = self.dots.nn(self.group.k[rows], self.dots.state(d_state))
        return over_lanes(self.write(rows), d_state.shape[1]) * found

    def read(self, rows: slice) -> Array:  # [c, 128]
        return exp(self.dots, self.numbers.column(UPTO, self.head, rows))

    def write(self, rows: slice) -> Array:  # [c, 128]
        return exp(self.dots, self.numbers.column(AFTER, self.head, rows))

    def state_gradients(
        self, rows: slice, state: Array, d_end: Array, d_out: Array, dv: Array, u: Array
    ) -> tuple[Array, ...]:
        """Through the states: parts of dq, dk as what reads, dk as what writes [c, K], and the gradient of a state."""
        dots, size = self.dots, rows.stop - rows.start
        read = over_lanes(self.read(rows), dv.shape[1])
        d_found = jnp.concatenate([(self.scale * read) * d_out, -read * dv])
        d_read = dots.nt(d_found, dots.state(state))
        d_write = dots.nt(over_lanes(self.write(rows), dv.shape[1]) * u, dots.state(d_end))
        number = rows.start // size
        d_state = dots.tn(self.group.q[rows], d_found[:size])
        d_state = d_state + dots.nn(self.group.keys[number], passes.written(dots, d_found[size:], number))
        d_state = self.totals[number] * d_end + lanes.blocks(d_state, dots.pack)
        return d_read[:size], d_read[size:], d_write, d_state

    def score_gradients(self, d_attention: Array, d_system: Array) -> tuple[Array, Array, Array]:
        """Through the scores [C, (h, C)]: parts of dq, dk as what reads, dk as what writes [C, (h, K)]."""
        dots, group, size = self.dots, self.group, self.group.k.shape[0]
        d_attention, d_system = (passes.beside(x, size // self.chunk) for x in (d_attention, d_system))
        d_attention = self.scale * self.pairs * d_attention * self.upto
        d_system = self.pairs * d_system * self.below
        both = jnp.concatenate([passes.of_tile(dots, x) for x in (d_attention, d_system)])
        d_read = dots.nn(both, dots.stack(group.k))
        return d_read[:size], d_read[size:], dots.outer(both, jnp.concatenate([group.q, group.k]))

    def later(self, next_state: Array, d_end: Array) -> Array:
        """What all later tokens add to the gradient of g, [h, 1]."""
        sums = jnp.sum(next_state * d_end, axis=0, keepdims=True)
        return jnp.concatenate(lanes.head_sums([sums], self.dots.pack))

    def finish(self, dq: Array, dk_reads: Array, dk_writes: Array, later: list[Array]) -> tuple[Array, Array, Array]:
        """dq, dk [C, (h, K)], and the terms of the gradient of g, [(h, C), 1]."""
        q, k = self.group.q, self.group.k
        token = lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
        change = jnp.concatenate(lanes.head_sums([q * dq + k * (dk_reads - dk_writes)], self.dots.pack))
        for index, x in enumerate(x[head : head + 1] for x in later for head in range(self.dots.pack)):
            # What later chunks add to every token's sum goes to the last token.
            change = change + jnp.where(token == (index + 1) * self.chunk - 1, x, 0.0)
        return dq, dk_reads + dk_writes, change
