"""A chunk of 64 tokens of one head, as products of 64 x 64 tiles: what a warpgroup of a Hopper GPU does.

The same code runs on registers and shared memory (launch.py) and on plain arrays (tests/kernels/hopper.py), because
wgmma cannot be interpreted: it is written against a machine `m` that multiplies.

    m.index(axis)              row or column numbers of a tile, int32
    m.load(shared)             shared memory -> float32
    m.rows(vector, width)      [64] in shared memory -> [64, width]: one number a row, float32
    m.columns(vector)          [64] in shared memory -> [64, 64]: one number a column
    m.stage(x)                 x rounded to bfloat16, in shared memory until the next `stage`
    m.keep(x)                  as `stage`, until the next `keep`
    m.transposed(shared)
    m.half(x)                  x rounded to bfloat16
    m.dots(start, (a, b), ..)  start + sum of a b, float32; start may be None; b in shared memory, a there or bfloat16

With P_ij = exp(sum of g over (j, i]) for j <= i, else 0, A = q k^T o P (per key, P is inside the sum over keys), S the
state at the chunk's start, R the gradient of that at its end, read_i and write_j the sums of g up to i and after j,
total that of all:

    out = scale A v   + scale e^read (q S)                       S' = e^total S + (k e^write)^T v
    dv  = scale A^T do +     e^write (k R)                       R' = e^total R + scale (q e^read)^T do
    dq  = scale (do v^T o P) k + scale e^read (do S^T)           dk = scale (v do^T o P^T) q + e^write (v R^T)

Each line is one function, read from left to right and, with q and k, v and do, S and R, read and write, <= and >=
exchanged, from right to left (`reverse`).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

CHUNK = 64  # tokens; and rows and columns of a tile
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

    def sums(self, m, counted):
        """sum_t g_t over the tokens t with counted[i, t], for each i."""
        ones = m.half(jnp.where(counted, 1.0, 0.0))
        return m.dots(None, (ones, self.high), (ones, self.low))

    def gate(self, m, reads):
        """exp of the sum up to each token, or after it."""
        i, t = m.index(0), m.index(1)
        return jnp.exp(self.sums(m, t <= i if reads else t > i))

    def level(self, m, level):
        """exp of the sum between a token and the middle of its block of 2^(level + 1) tokens: [64, 64].

        Every term of the mask depends on the level: what does not would be kept in registers over the levels.
        """
        i, t = m.index(0), m.index(1)
        size = lax.shift_left(jnp.int32(1), level)
        upto = (t & (size - 1)) <= (i & (size - 1))
        return jnp.exp(self.sums(m, (i >> level == t >> level) & (((i & size) != 0) == upto)))


def seen(m, reverse):
    """The pairs of a token (row) and one that it reads, or that reads it: on and below the diagonal, or above."""
    i, j = m.index(0), m.index(1)
    return i <= j if reverse else i >= j


def pairs_of_level(m, level, reverse):
    """Pairs on both sides of the middle of a block of 2^(level + 1) tokens: the highest bit in which they differ."""
    i, j = m.index(0), m.index(1)
    size = lax.shift_left(jnp.int32(1), level)
    later, earlier = (j, i) if reverse else (i, j)
    return (i >> (level + 1) == j >> (level + 1)) & ((later & size) > (earlier & size))


def over_levels(step, value):
    """`value` after step(level, value) for each level."""
    return lax.fori_loop(0, LEVELS, step, value)


def scalar_pairs(m, decay, reverse):
    """exp of the sum of g between the tokens of a pair, 0 for unseen ones."""
    later, earlier = m.rows(decay.sums, CHUNK), m.columns(decay.sums)
    between = earlier - later if reverse else later - earlier
    return jnp.where(seen(m, reverse), jnp.exp(jnp.minimum(between, 0.0)), 0.0)


def update(m, decay, reverse, scale, x, y, total, state):
    """The next state, or gradient of one, of 64 keys: [64, V] float32. x [64, 64], y [64, V]; total [64], e^total."""
    gate = decay.gate(m, reads=reverse) if isinstance(decay, PerKey) else m.rows(decay.gate, CHUNK)
    written = m.stage(m.load(x) * gate * (scale if reverse else 1.0))
    return m.dots(state * m.rows(total, state.shape[1]), (m.transposed(written), y))


def read(m, decays, reverse, scale, x, y, w, state):
    """out (or dv), [64, V] float32. x, y: q, k (or k, q), and `decays`, `state`: a tile for each 64 keys; w: v (or do).

    `state` is S (or R). Scalar decays are those of the first entry.
    """
    gate_scale = 1.0 if reverse else scale
    if isinstance(decays[0], PerKey):
        scores = per_key_scores(m, decays, reverse, x, y)
        out = None
        for decay, x_tile, state_tile in zip(decays, x, state, strict=True):
            gate = decay.gate(m, reads=not reverse)
            out = m.dots(out, (m.half(m.load(x_tile) * gate * gate_scale), state_tile))
    else:
        scores = m.dots(None, *((a, m.transposed(b)) for a, b in zip(x, y, strict=True)))
        scores = scores * scalar_pairs(m, decays[0], reverse)
        out = m.dots(None, *zip(x, state, strict=True))
        out = out * (gate_scale * m.rows(decays[0].gate, out.shape[1]))
    return m.dots(out, (m.half(scale * scores), w))


def per_key_scores(m, decays, reverse, x, y):
    """A (or A^T): level by level, each a product of what is left of x and of y at the middle of their block."""
    scores = m.dots(None, *((a, m.transposed(b)) for a, b in zip(x, y, strict=True)))  # a token with itself
    scores = jnp.where(m.index(0) == m.index(1), scores, 0.0)

    def add_level(level, scores):
        products = None
        for decay, x_tile, y_tile in zip(decays, x, y, strict=True):
            left = decay.level(m, level)
            b = m.transposed(m.stage(m.load(y_tile) * left))
            products = m.dots(products, (m.half(m.load(x_tile) * left), b))
        return jnp.where(pairs_of_level(m, level, reverse), products, scores)

    return over_levels(add_level, scores)


def key_gradient(m, decay, reverse, scale, y, u, w, state):
    """dq (or dk) of 64 keys, [64, 64] float32, and the part of it that is not a token's own key.

    y: k (or q) [64, 64]; u, w: do, v (or v, do) [64, V]; state: S (or R) [64, V].
    """
    pairs = scale * m.dots(None, (u, m.transposed(w)))
    gradient = m.dots(None, (u, m.transposed(state))) * (1.0 if reverse else scale)
    if not isinstance(decay, PerKey):
        gradient = gradient * m.rows(decay.gate, CHUNK)
        gradient = m.dots(gradient, (m.half(pairs * scalar_pairs(m, decay, reverse)), y))
        return gradient, gradient  # the own parts of q dq and k dk are the same number
    gradient = gradient * decay.gate(m, reads=not reverse)
    pairs = m.keep(pairs)  # over the levels, registers would not be enough

    def add_level(level, gradient):
        left = decay.level(m, level)
        of_level = m.half(jnp.where(pairs_of_level(m, level, reverse), m.load(pairs), 0.0))
        return gradient + left * m.dots(None, (of_level, m.stage(m.load(y) * left)))

    gradient = over_levels(add_level, gradient)
    own = m.half(jnp.where(m.index(0) == m.index(1), m.load(pairs), 0.0))
    return m.dots(gradient, (own, y)), gradient


def sums_of_later(m, changes):
    """The sums of [64, 64] float32 over each token and all later ones: of what bfloat16 holds, and of the rest."""
    ones = m.half(jnp.where(seen(m, reverse=True), 1.0, 0.0))
    high = m.half(changes)
    sums = m.dots(None, (ones, m.stage(changes)))
    return m.dots(sums, (ones, m.stage(changes - high.astype(jnp.float32))))
