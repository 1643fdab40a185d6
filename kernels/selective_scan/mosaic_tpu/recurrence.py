"""One token of the recurrence and of its gradient, and sums over the state: the arithmetic of the kernels.

The N numbers of a channel's state lie in the sublanes and W channels in the lanes, h [N, W]. What belongs to a
channel (dt, u, dy) is a row [1, W] that is the same for all N; what belongs to a number of the state (B, C) is
[N, 128], the same in every lane. So nothing is moved but in sums over N, and these are put off: `fold` adds the vector
registers of a token to one, [8, W], and `row_sums` finishes eight tokens together, in 7 rotations instead of 24.

Rates come times log2 e, `A2`: a TPU's exponential is one of base 2.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array

LANES = 128
ROWS = 8  # sublanes of a vector register of float32


def over_lanes(x: Array, width: int) -> Array:
    """x [N, 128] of equal lanes, on `width` lanes."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def decay(dt: Array, A2: Array) -> Array:
    return jnp.exp2(dt * A2)


def advance(h: Array, dt: Array, u: Array, A2: Array, B: Array) -> Array:
    """h_t = exp(dt A) h_{t-1} + u B, [N, W]."""
    return decay(dt, A2) * h + over_lanes(B, h.shape[1]) * u


def read(h: Array, C: Array) -> Array:
    """C . h before the last sum, [8, W]."""
    return fold(over_lanes(C, h.shape[1]) * h)


def pull(
    W: Array, dA: Array, h_before: Array, h: Array, dt: Array, u: Array, dy: Array, A2: Array, B: Array, C: Array
) -> tuple[Array, ...]:
    """The gradient of a token, given what all later ones say of its state, W = W_{t+1} [N, W].

    G = C dy + W_{t+1}      W_t = a G      P = W_t h_{t-1}      dA += dt P

    Returns W_t, dA, and of the token du = B . G and A2 . P before their last sums [8, W], and u G and dy h [N, 128],
    whose sums over lanes are dB and dC.
    """
    width = h.shape[1]
    G = over_lanes(C, width) * dy + W
    W = decay(dt, A2) * G
    P = W * h_before
    return W, dA + dt * P, fold(over_lanes(B, width) * G), fold(A2 * P), fold_lanes(u * G), fold_lanes(dy * h)


def fold(x: Array) -> Array:
    """The sum of the groups of eight rows, [8, W]."""
    return sum(x[n : n + ROWS] for n in range(ROWS, x.shape[0], ROWS)) + x[:ROWS] if x.shape[0] > ROWS else x


def fold_lanes(x: Array) -> Array:
    """The sum of the groups of 128 lanes, [N, 128]."""
    first, *others = (x[:, n : n + LANES] for n in range(0, x.shape[1], LANES))
    return sum(others, first)


def row_sums(parts: list[Array]) -> Array:
    """Eight arrays [8, W] -> [8, W], whose row s is the sum of the rows of parts[s].

    A pair becomes one array: after a step of `shift`, row r holds a sum of twice as many rows of the member that bit
    `shift` of r names. Rows that are `shift` apart, counted in a circle, hold the same part.
    """
    row, shift = lax.broadcasted_iota(jnp.int32, parts[0].shape, 0), 1
    while len(parts) > 1:
        first = (row & shift) == 0
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [jnp.where(first, a, b) + pltpu.roll(jnp.where(first, b, a), shift, 0) for a, b in pairs]
        shift *= 2
    return parts[0]
