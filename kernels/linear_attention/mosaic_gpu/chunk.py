"""A chunk of 64 tokens of one head, as products of 64 x 64 tiles: what a warpgroup of a Hopper GPU does.

It is written against a machine `m` (blocks.py), of a GPU or of a CPU, whose interpreter cannot multiply in wgmma's way.

    m.index(axis)              row or column numbers of a tile, int32
    m.load(shared)             shared memory -> float32
    m.rows(vector, width)      [64] in shared memory -> [64, width]: one number a row, float32
    m.columns(vector)          [64] in shared memory -> [64, 64]: one number a column
    m.stage_all(x, ...)        each x, or what makes it, rounded to bfloat16, in shared memory until the next such call
    m.stage(x)                 one
    m.transposed(shared)
    m.half(x)                  x rounded to bfloat16
    m.ones(which)              in shared memory, bfloat16: 1 where column t is "upto", "from", "before" or "after" row i
                               (t <= i, t >= i, t < i, t > i), else 0
    m.dots(start, (a, b), ..)  start + sum of a b, float32; start may be None; b in shared memory, a there or bfloat16

With P_ij = exp(sum of g over (j, i]) for j <= i, else 0, A = q k^T o P (per key, P is inside the sum over keys), S the
state at the chunk's start, R the gradient of that at its end, read_i and write_j the sums of g up to i and after j,
total that of all:

    out = scale A v   + scale e^read (q S)                       S' = e^total S + (k e^write)^T v
    dv  = scale A^T do +     e^write (k R)                       R' = e^total R + scale (q e^read)^T do
    dq  = scale (do v^T o P) k + scale e^read (do S^T)           dk = scale (v do^T o P^T) q + e^write (v R^T)

The first two lines are one function each, read from left to right and, with q and k, v and do, S and R, read and write,
<= and >= exchanged, from right to left (`reverse`). The gradient of g_t:

    dg_t = sum_{t' >= t} (q dq - k (dk without its last term))_t' + sum_{t' < t} (k e^write (v R^T))_t'
           + e^total sum_V S R
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

Operand = Any  # an array in registers, or a reference to shared memory
CHUNK = 64  # tokens; and rows and columns of a tile
FASTEST = -50.0  # log-decay: e^-50 leaves nothing, and sums of more extreme ones lose digits
LEVELS = 6  # of pairs: 1, 2, 4 ... 32 tokens and less apart


class Scalar(NamedTuple):
    """Decays that are one number a token. Vectors [64] in shared memory."""

    sums: Any  # of g from the chunk's start
    gate: Any  # e^read, or e^write in reverse


class PerKey(NamedTuple):
    """Decays of 64 keys: g = high + low, tiles [tokens, keys] of bfloat16 in shared memory.

    Every exponent is the sum of the very log-decays between two tokens, by a product with a matrix of zeros and ones:
    never positive, and a decay of -1e4 takes no digits from a mild one after it.
    """

    high: Any
    low: Any

    def sums(self, m: Any, ones: Operand) -> Operand:
        """sum_t ones[i, t] g_t, for each i."""
        return m.dots(None, (ones, self.high), (ones, self.low))

    def gate(self, m: Any, reads: bool) -> Operand:
        """exp of the sum up to each token, or after it."""
        return jnp.exp(self.sums(m, m.ones("upto" if reads else "after")))

    def level(self, m: Any, level: Operand, before: bool = False) -> Operand:
        """exp of the sum between a token and the middle of its block of 2^(level + 1) tokens: [64, 64].

        What reads counts its token's log-decay, or, `before` that, only those of earlier tokens. Every term of the mask
        depends on the level: what does not would be kept in registers over the levels.
        """
        i, t = m.index(0), m.index(1)
        size = lax.shift_left(jnp.int32(1), level)
        upto = (t & (size - 1)) <= (i & (size - 1))
        counted = (i >> level == t >> level) & (((i & size) != 0) == upto)
        counted = counted & (i != t) if before else counted
        return jnp.exp(self.sums(m, m.half(jnp.where(counted, 1.0, 0.0))))


def seen(m: Any, reverse: bool) -> Operand:
    """The pairs of a token (row) and one that it reads, or that reads it: on and below the diagonal, or above."""
    i, j = m.index(0), m.index(1)
    return i <= j if reverse else i >= j


def pairs_of_level(m: Any, level: Operand) -> Operand:
    """A token (row) and an earlier one on both sides of the middle of a block of 2^(level + 1) tokens: the highest bit
    in which they differ."""
    i, j = m.index(0), m.index(1)
    size = lax.shift_left(jnp.int32(1), level)
    return (i >> (level + 1) == j >> (level + 1)) & ((i & size) > (j & size))


def over_levels(step: Callable[..., Any], value: Any) -> Any:
    """`value` after step(level, value) for each level."""
    return lax.fori_loop(0, LEVELS, step, value)


def scalar_pairs(m: Any, decay: Scalar, reverse: bool) -> Operand:
    """exp of the sum of g between the tokens of a pair, 0 for unseen ones."""
    later, earlier = m.rows(decay.sums, CHUNK), m.columns(decay.sums)
    between = earlier - later if reverse else later - earlier
    return jnp.where(seen(m, reverse), jnp.exp(jnp.minimum(between, 0.0)), 0.0)


def update(
    m: Any, decay: PerKey | Scalar, reverse: bool, scale: float, x: Operand, y: Operand, total: Operand, state: Operand
) -> Operand:
    """The next state, or gradient of one, of 64 keys: [64, V] float32. x [64, 64], y [64, V]; total [64], e^total."""
    gate = decay.gate(m, reads=reverse) if isinstance(decay, PerKey) else m.rows(decay.gate, CHUNK)
    written = m.stage(m.load(x) * gate * (scale if reverse else 1.0))
    return m.dots(state * m.rows(total, state.shape[1]), (m.transposed(written), y))


def read(
    m: Any,
    decay: Scalar,
    reverse: bool,
    scale: float,
    x: list[Operand],
    y: list[Operand],
    w: Operand,
    state: list[Operand],
) -> Operand:
    """out (or dv) of scalar decays, [64, V] float32.

    x, y: q, k (or k, q), and `state`, S (or R): a tile for each 64 keys; w: v (or do).
    """
    pairs = m.dots(None, *((a, m.transposed(b)) for a, b in zip(x, y, strict=True)))
    pairs = pairs * scalar_pairs(m, decay, reverse)
    out = m.dots(None, *zip(x, state, strict=True))
    out = out * ((1.0 if reverse else scale) * m.rows(decay.gate, out.shape[1]))
    return m.dots(out, (m.half(scale * pairs), w))


def read_per_key(
    m: Any,
    decays: list[PerKey],
    reverse: bool,
    scale: float,
    x: list[Operand],
    pairs: Operand,
    w: Operand,
    state: list[Operand],
) -> Operand:
    """`read` of decays per key, one for each 64; pairs: A, with the scale in it."""
    out = m.dots(None, (m.transposed(pairs) if reverse else pairs, w))
    for decay, x_tile, state_tile in zip(decays, x, state, strict=True):
        gate = decay.gate(m, reads=not reverse)
        out = m.dots(out, (m.half(m.load(x_tile) * gate * (1.0 if reverse else scale)), state_tile))
    return out


def scores(m: Any, decay: PerKey, q: Operand, k: Operand, earlier: Operand) -> Operand:
    """A of 64 keys, without the scale, [64, 64] float32, plus that of `earlier` ones, which may be None.

    Level by level, each a product of what is left of q and of k at the middle of their block.
    """
    own = m.dots(None, (q, m.transposed(k)))  # a token with itself
    own = jnp.where(m.index(0) == m.index(1), own, 0.0)

    def add_level(level, values):
        left = decay.level(m, level)
        b = m.transposed(m.stage(m.load(k) * left))
        products = m.dots(None, (m.half(m.load(q) * left), b))
        return values + jnp.where(pairs_of_level(m, level), products, 0.0)

    return over_levels(add_level, own if earlier is None else own + earlier)


class Products(NamedTuple):
    """Sums over V, float32: [64, 64] without scales and decays, and `states` [64 keys]."""

    pairs: Any  # do v^T
    dq: Any  # do S^T
    dk: Any  # v R^T
    states: Any  # of S and R


def add_products(
    m: Any, sums: Products | None, v: Operand, d_out: Operand, state: Operand, d_state: Operand
) -> Products:
    """`sums`, or None for none yet, and those over some columns of v, do, S and R: tiles of 64 x 64."""
    pairs, dq, dk, states = sums or (None,) * 4
    new = jnp.sum(m.load(state) * m.load(d_state), axis=1)
    return Products(
        m.dots(pairs, (d_out, m.transposed(v))),
        m.dots(dq, (d_out, m.transposed(state))),
        m.dots(dk, (v, m.transposed(d_state))),
        new if states is None else states + new,
    )


def key_gradients(
    m: Any, reads: Scalar, writes: Scalar, scale: float, q: Operand, k: Operand, products: Products
) -> tuple[Operand, Operand, Operand, Operand]:
    """dq, dk of 64 keys and scalar decays, and the two terms of dg, one number a token: at t' >= t, and at t' < t."""
    pairs = m.stage(scale * products.pairs * scalar_pairs(m, reads, reverse=False))
    dq = m.dots(products.dq * (scale * m.rows(reads.gate, CHUNK)), (pairs, k))
    dk = m.dots(None, (m.transposed(pairs), q))
    written = products.dk * m.rows(writes.gate, CHUNK)
    from_here_on = jnp.sum(m.load(q) * dq - m.load(k) * dk, axis=1)
    before = jnp.sum(m.load(k) * written, axis=1)
    return dq, dk + written, from_here_on, before


def key_gradients_per_key(
    m: Any, decay: PerKey, q: Operand, k: Operand, pairs: Operand, dq: Operand, dk: Operand, later: Operand
) -> tuple[Operand, Operand, Operand]:
    """dq, dk, and dg of 64 keys, [64, 64] float32.

    pairs, dq, dk: of `Products`, with the scale in the first two, bfloat16; later [64]: e^total sum_V S R.
    """
    own = m.half(jnp.where(m.index(0) == m.index(1), m.load(pairs), 0.0))
    dq = m.dots(m.load(dq) * decay.gate(m, reads=True), (own, k))
    within = m.dots(None, (own, q))

    def add_level(level, gradients):
        left = decay.level(m, level)
        of_level = jnp.where(pairs_of_level(m, level), m.load(pairs), 0.0)
        of_level, k_left, q_left = m.stage_all(of_level, m.load(k) * left, m.load(q) * left)
        return (
            gradients[0] + left * m.dots(None, (of_level, k_left)),
            gradients[1] + left * m.dots(None, (m.transposed(of_level), q_left)),
        )

    dq, within = over_levels(add_level, (dq, within))
    written = m.load(dk) * decay.gate(m, reads=False)
    changes = sums_over(m, "from", m.load(q) * dq - m.load(k) * within)
    changes = changes + sums_over(m, "before", m.load(k) * written) + m.columns(later)
    return dq, within + written, jnp.where(m.load(decay.high) > FASTEST, changes, 0.0)


def sums_over(m: Any, which: str, values: Operand) -> Operand:
    """sum_t values_t over the tokens that `m.ones(which)` counts: of what bfloat16 holds, and of the rest."""
    high, low = m.stage_all(values, values - m.half(values).astype(jnp.float32))
    return m.dots(None, (m.ones(which), high), (m.ones(which), low))
