"""A chunk of 64 tokens of one head, as products of 64 x 64 tiles: on the machine of linear_attention's chunk.py.

With P, read, write, total, scale, S and R of that file, A_ij = beta_i (k_i . k_j) P_ij for j < i, else 0, and U the
corrections that the chunk writes:

    (I + A) U = diag(beta) (V - e^read (K S))

The rest is linear attention with U for its values: out from q, k, U and S, the next state from k, U and S, and the
gradients of both. So what is computed here is the inverse of I + A, U by it, and what U adds to the gradients. With
dU that of U from all that reads it, linear attention's dv, and dY = (I + A)^-T dU:

    dv = beta dY      R' = e^total R + scale (q e^read)^T do - (k e^read)^T dv      E_ij = -(dY U^T)_ij P_ij for j < i
    C = E k - e^read (dY S^T)          dk += beta C + (beta E)^T k          dbeta = sum_V dY v + sum_K k C
    of what linear attention's dg_t sums over t' >= t:    beta sum_K k C - sum_K k ((beta E)^T k)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from kernels.linear_attention.mosaic_gpu.chunk import (
    CHUNK,
    FASTEST,
    LEVELS,
    Operand,
    PerKey,
    Scalar,
    over_levels,
    pairs_of_level,
    scalar_pairs,
    sums_over,
)


class Inverse(NamedTuple):
    """(I + A)^-1 = high + low, tiles of bfloat16 in shared memory."""

    high: Any
    low: Any

    def apply(self, m: Any, x: Operand, transpose: bool = False) -> Operand:
        """Times x [64, n], which is staged."""
        a, b = (m.transposed(each) for each in self) if transpose else self
        return product(m, None, (a, b), stage_halves(m, x))


def stage_halves(m: Any, x: Operand) -> tuple[Operand, Operand]:
    """Staged: what bfloat16 holds of x, and the rest."""
    high, low = m.stage_all(x, rest(m, x))
    return high, low


def sum_halves(m: Any, halves: Sequence[Operand]) -> Operand:
    high, low = halves
    return m.load(high) + m.load(low)


def rest(m: Any, x: Operand) -> Operand:
    return x - m.half(x).astype(jnp.float32)


def product(m: Any, start: Operand | None, x: Sequence[Operand], y: Sequence[Operand]) -> Operand:
    """start + x y of halves, to about 2^-16 of the sum of its terms' sizes."""
    return m.dots(start, (x[0], y[0]), (x[0], y[1]), (x[1], y[0]))


def invert(m: Any, other: Any, a: Sequence[Operand]) -> Operand:
    """(I + a)^-1 of a strictly lower triangular matrix, [64, 64] float32; a: halves in shared memory.

    From the inverses of diagonal blocks of n rows those of 2 n: a block between two, C, becomes -D^-1 C A^-1. So no
    power of `a` is ever formed, which would reach 1e17 for repeated keys. `m` and `other` stage in different tiles.
    """
    identity = jnp.where(m.index(0) == m.index(1), 1.0, 0.0)
    inverse = identity - jnp.where(pairs_of_level(m, jnp.int32(0)), sum_halves(m, a), 0.0)

    def double(level, inverse):
        halves = stage_halves(m, inverse)
        between = [m.half(jnp.where(pairs_of_level(m, level), m.load(half), 0.0)) for half in a]
        added = stage_halves(other, -product(m, None, between, halves))
        return product(m, sum_halves(m, halves), halves, added)

    return lax.fori_loop(1, LEVELS, double, inverse)


def corrections(m: Any, decay: Scalar | None, beta: Operand, pairs: Operand) -> Operand:
    """A, [64, 64] float32; pairs: k k^T, with a decay that is per key in it."""
    if decay is not None:
        pairs = pairs * scalar_pairs(m, decay, reverse=False)
    return before(m, m.rows(beta, CHUNK) * pairs)


def before(m: Any, pairs: Operand) -> Operand:
    """`pairs` below the diagonal, else 0."""
    return jnp.where(m.index(0) > m.index(1), pairs, 0.0)


def add_pairs_per_key(m: Any, decay: PerKey, k: Operand, earlier: Operand | None) -> Operand:
    """A of 64 keys without beta, [64, 64] float32, plus that of `earlier` ones: level by level, as chunk.scores.

    Of the keys, times what is left of them, the inverse needs more than what bfloat16 holds.
    """
    if earlier is None:
        earlier = jnp.where(m.index(0) == m.index(1), 0.0, 0.0)

    def add_level(level, pairs):
        left = m.load(k) * decay.level(m, level)
        halves = [m.half(left), m.half(rest(m, left))]
        products = product(m, None, halves, [m.transposed(half) for half in stage_halves(m, left)])
        return pairs + jnp.where(pairs_of_level(m, level), products, 0.0)

    return over_levels(add_level, earlier)


def correct(
    m: Any, gate: Operand | None, beta: Operand, inverse: Inverse, k: list[Operand], v: Operand, state: list[Operand]
) -> Operand:
    """U, [64, V] float32; gate [64]: e^read, or None if k has it; `state`, S: a tile for each 64 keys."""
    read = gated(m, gate, m.dots(None, *zip(k, state, strict=True)))
    return inverse.apply(m, m.rows(beta, read.shape[1]) * (m.load(v) - read))


def gated(m: Any, gate: Operand | None, x: Operand) -> Operand:
    """Rows of x times gate [64]."""
    return x if gate is None else x * m.rows(gate, x.shape[1])


def scores(m: Any, decay: Scalar, scale: float, pairs: Operand) -> Operand:
    """What a token's query reads of itself and of earlier tokens, [64, 64] float32; pairs: q k^T."""
    return scale * pairs * scalar_pairs(m, decay, reverse=False)


def pull(
    m: Any,
    gate: Operand | None,
    inverse: Inverse,
    scores: Operand,
    k: list[Operand],
    d_out: Operand,
    d_state: list[Operand],
) -> Operand:
    """dY, [64, V] float32; gate [64]: e^write, or None if k has it; `d_state`, R: a tile for each 64 keys."""
    written = gated(m, gate, m.dots(None, *zip(k, d_state, strict=True)))
    d_u = m.dots(written, (m.transposed(scores), d_out))
    return inverse.apply(m, d_u, transpose=True)


class Products(NamedTuple):
    """Sums over V, float32: [64, 64], and `values` [64]."""

    pairs: Any  # dY U^T
    read: Any  # dY S^T
    values: Any  # of dY and v


def add_products(m: Any, sums: Products | None, d_y: Operand, u: Operand, v: Operand, state: Operand) -> Products:
    """`sums`, or None for none yet, and those over some columns of dY, U, v and S: tiles of 64 x 64."""
    pairs, read, values = sums or (None,) * 3
    new = jnp.sum(m.load(d_y) * m.load(v), axis=1)
    return Products(
        m.dots(pairs, (d_y, m.transposed(u))),
        m.dots(read, (d_y, m.transposed(state))),
        new if values is None else values + new,
    )


def key_gradients(
    m: Any, reads: Scalar, beta: Operand, k: Operand, dk: Operand, products: Products
) -> tuple[Operand, Operand, Operand]:
    """dk of 64 keys, `dk` being linear attention's; what they add to dbeta, without the sum over V, and to dg: [64]."""
    beta = m.rows(beta, CHUNK)
    pairs = before(m, -products.pairs * scalar_pairs(m, reads, reverse=False))
    pairs, of_beta = m.stage_all(pairs, beta * pairs)
    read = m.dots(None, (pairs, k)) - m.rows(reads.gate, CHUNK) * products.read
    written = m.dots(None, (m.transposed(of_beta), k))
    keys = m.load(k)
    d_beta, changes = jnp.sum(keys * read, axis=1), jnp.sum(keys * (beta * read - written), axis=1)
    return m.load(dk) + beta * read + written, d_beta, changes


def key_gradients_per_key(
    m: Any, decay: PerKey, beta: Operand, k: Operand, dk: Operand, pairs: Operand, read: Operand, d_g: Operand
) -> tuple[Operand, Operand, Operand]:
    """dk and dg of 64 keys, [64, 64] float32, `dk` and `d_g` being linear attention's; and dbeta [64], as above.

    pairs, read: of `Products`, bfloat16.
    """
    corrected = -m.load(read) * decay.gate(m, reads=True)
    none = jnp.where(m.index(0) == m.index(1), 0.0, 0.0)

    def add_level(level, gradients):
        left = decay.level(m, level)
        of_level = jnp.where(pairs_of_level(m, level), -m.load(pairs), 0.0)
        of_level, of_beta, k_left = m.stage_all(of_level, m.rows(beta, CHUNK) * of_level, m.load(k) * left)
        return (
            gradients[0] + left * m.dots(None, (of_level, k_left)),
            gradients[1] + left * m.dots(None, (m.transposed(of_beta), k_left)),
        )

    corrected, written = over_levels(add_level, (corrected, none))
    d_beta = jnp.sum(m.load(k) * corrected, axis=1)
    corrected = m.rows(beta, CHUNK) * corrected
    d_g = m.load(d_g) + sums_over(m, "from", m.load(k) * (corrected - written))
    return m.load(dk) + corrected + written, jnp.where(m.load(decay.high) > FASTEST, d_g, 0.0), d_beta
