"""A chunk of 64 tokens of one head, as products of 64 x 64 tiles: on the machine of linear_attention's chunk.py.

With S the state at the chunk's start, R the gradient of that at its end, and A_b, A_k the scores of a with b and k, P_b
and P_k those of q, each pair with the decays between its tokens, as in ../chunked.py:

    (I - A_b) U = a e^before S + A_k V
    out = q e^read S + P_b U + P_k V                 S' = e^total S + (b e^write)^T U + (k e^write)^T V

a reads the state before its token's own decay, q after it: `before` and `read` are the sums of log-decays that count.
The gradients, with E = (I - A_b)^-T dU:

    dU = P_b^T do + b e^write R                      R' = e^total R + (q e^read)^T do + (a e^before)^T E
    dv = P_k^T do + A_k^T E + k e^write R            dP = do [U, V]^T      dA = E [U, V]^T

    dq = e^read (do S^T) + dP_b b + dP_k k           da = e^before (E S^T) + dA_b b + dA_k k
    db = e^write (U R^T) + dP_b^T q + dA_b^T a       dk = e^write (V R^T) + dP_k^T q + dA_k^T a

the decays of each pair of tokens in between; and, without what a token's query reads of its own keys (which is not
decayed), and with db, dk as what is `within` the chunk and what is `written` to its end:

    dg_t = sum_{t' >= t} (q dq - b db_within - k dk_within) + sum_{t' > t} a da
           + sum_{t' < t} (b db_written + k dk_written) + e^total sum_V S R
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from kernels.delta_rule.mosaic_gpu.chunk import Inverse, product, rest
from kernels.linear_attention.mosaic_gpu.chunk import (
    FASTEST,
    Operand,
    PerKey,
    over_levels,
    pairs_of_level,
    sums_over,
)


def _zero(m: Any) -> Operand:
    return jnp.where(m.index(0) == m.index(1), 0.0, 0.0)


def add_scores(
    m: Any, decay: PerKey, q: Operand, b: Operand, k: Operand, earlier: Sequence[Operand] | None
) -> Sequence[Operand]:
    """P_b, P_k of 64 keys, [64, 64] float32, plus those of `earlier` ones: level by level."""
    diagonal = m.index(0) == m.index(1)
    own = tuple(jnp.where(diagonal, m.dots(None, (q, m.transposed(x))), 0.0) for x in (b, k))

    def add_level(level, scores):
        left, here = decay.level(m, level), pairs_of_level(m, level)
        reads = m.half(m.load(q) * left)
        writes = m.stage_all(*(lambda x=x: m.load(x) * left for x in (b, k)))
        found = (m.dots(None, (reads, m.transposed(x))) for x in writes)
        return tuple(y + jnp.where(here, x, 0.0) for x, y in zip(found, scores, strict=True))

    return over_levels(add_level, own if earlier is None else tuple(map(jnp.add, own, earlier)))


def add_system(
    m: Any, decay: PerKey, a: Operand, b: Operand, k: Operand, earlier: Sequence[Operand] | None
) -> Sequence[Operand]:
    """A_b, A_k of 64 keys, [64, 64] float32, plus those of `earlier` ones.

    Of a and b, times what is left of them, the inverse needs more than what bfloat16 holds.
    """

    def add_level(level, system):
        left, here = decay.level(m, level, before=True), pairs_of_level(m, level)
        of_b, of_b_low, of_k = m.stage_all(
            lambda: m.load(b) * left, lambda: rest(m, m.load(b) * left), lambda: m.load(k) * left
        )
        reads = m.load(a) * left
        halves = [m.half(reads), m.half(rest(m, reads))]
        writes, of_k = [m.transposed(of_b), m.transposed(of_b_low)], m.transposed(of_k)
        found = product(m, None, halves, writes), m.dots(None, *((half, of_k) for half in halves))
        return tuple(y + jnp.where(here, x, 0.0) for x, y in zip(found, system, strict=True))

    return over_levels(add_level, (_zero(m), _zero(m)) if earlier is None else earlier)


def correct(m: Any, inverse: Inverse, a: list[Operand], a_k: Operand, v: Operand, state: list[Operand]) -> Operand:
    """U, [64, V] float32; a has e^before; `state`, S: a tile for each 64 keys, as a."""
    return inverse.apply(m, m.dots(None, *zip(a, state, strict=True), (a_k, v)))


def pull(m: Any, inverse: Inverse, b: list[Operand], q_b: Operand, d_out: Operand, d_state: list[Operand]) -> Operand:
    """E, [64, V] float32; b has e^write; q_b is P_b; `d_state`, R: a tile for each 64 keys."""
    d_u = m.dots(None, *zip(b, d_state, strict=True), (m.transposed(q_b), d_out))
    return inverse.apply(m, d_u, transpose=True)


def add_products(
    m: Any, sums: Sequence[Operand] | None, left: Sequence[Operand], right: Sequence[Operand]
) -> Sequence[Operand]:
    """`sums`, or None for none yet, and x y^T for each x of `left` and y of `right`, [64, 64]."""
    pairs = [(x, m.transposed(y)) for x in left for y in right]
    return [m.dots(start, pair) for start, pair in zip(sums or [None] * len(pairs), pairs, strict=True)]


def own(m: Any, pairs: Operand) -> Operand:
    """The diagonal of `pairs`, to multiply with."""
    return m.half(jnp.where(m.index(0) == m.index(1), m.load(pairs), 0.0))


def own_decay(m: Any, decay: PerKey) -> Operand:
    """exp of each token's own log-decay."""
    return jnp.exp(m.load(decay.high) + m.load(decay.low))


def through_levels(
    m: Any,
    decay: PerKey,
    pairs: Sequence[Operand],
    others: Sequence[Callable[[], Operand]],
    gradients: Sequence[Operand],
    transpose: bool,
) -> Sequence[Operand]:
    """`gradients` of q and a with what b and k, the `others`, give by the scores; with `transpose` the reverse."""

    def add_level(level, gradients):
        left, here = decay.level(m, level, before=True), pairs_of_level(m, level)
        *of_level, first, second = m.stage_all(
            *(lambda x=x: jnp.where(here, m.load(x), 0.0) for x in pairs), *(lambda x=x: x() * left for x in others)
        )
        q_b, q_k, a_b, a_k = map(m.transposed, of_level) if transpose else of_level
        rows = ((q_b, a_b), (q_k, a_k)) if transpose else ((q_b, q_k), (a_b, a_k))
        return tuple(
            gradient + left * m.dots(None, (x, first), (y, second))
            for gradient, (x, y) in zip(gradients, rows, strict=True)
        )

    return over_levels(add_level, tuple(gradients))


def reader_gradients(
    m: Any,
    decay: PerKey,
    q: Operand,
    a: Operand,
    b: Operand,
    k: Operand,
    pairs: Sequence[Operand],
    d_reads: Sequence[Operand],
) -> Iterator[Operand]:
    """da, dq, and what they add to dg, of 64 keys, [64, 64] float32: one after the other, for which a thread has not
    registers enough at once.

    pairs: dP_b, dP_k, dA_b, dA_k; d_reads: do S^T, E S^T; bfloat16, with the scale in what is of `do`.
    """
    gate = jnp.exp(decay.sums(m, m.ones("before")))
    from_state = [m.load(x) * gate for x in d_reads]
    writes = [lambda: m.load(b), lambda: m.load(k)]
    dq, da = through_levels(m, decay, pairs, writes, from_state, False)
    yield da
    before = m.load(a) * da
    dq = dq * own_decay(m, decay)
    changes = m.load(q) * dq + before
    yield m.dots(dq, (own(m, pairs[0]), b), (own(m, pairs[1]), k))
    yield sums_over(m, "from", changes) - before


def writer_gradients(
    m: Any,
    decay: PerKey,
    q: Operand,
    a: Operand,
    b: Operand,
    k: Operand,
    pairs: Sequence[Operand],
    d_writes: Sequence[Operand],
    later: Operand,
    changes: Operand,
) -> Iterator[Operand]:
    """db, dk and dg of 64 keys, [64, 64] float32, as `reader_gradients`, whose `changes` and `pairs` these are.

    d_writes: U R^T, V R^T, bfloat16; later [64]: e^total sum_V S R.
    """
    reads = [lambda: m.load(q) * own_decay(m, decay), lambda: m.load(a)]  # q, with its own decay, reads what a reads
    within = through_levels(m, decay, pairs, reads, (_zero(m), _zero(m)), True)
    added = -sums_over(m, "from", m.load(b) * within[0] + m.load(k) * within[1])
    gate, before = decay.gate(m, reads=False), 0.0
    for keys, gradient, d_write, pair in zip((b, k), within, d_writes, pairs[:2], strict=True):
        written = m.load(d_write) * gate
        before = before + m.load(keys) * written
        yield m.dots(gradient + written, (own(m, pair), q))
    added = added + sums_over(m, "before", before) + m.columns(later)
    yield jnp.where(m.load(decay.high) > FASTEST, added + m.load(changes), 0.0)
