"""A causal filter as a matrix."""

import jax
import jax.numpy as jnp


def toeplitz(taps: jax.Array) -> jax.Array:
    """[D, size] -> [D, size, size], entry [u, t] the tap u - t, 0 above the diagonal.

    Rows of one vector, each shifted by one more: reading rows of 2 size - 1 from rows of 2 size does that, and its
    transpose is no scatter.
    """
    channels, size = taps.shape
    row = jnp.pad(jnp.flip(taps, -1), ((0, 0), (0, size)))
    rows = jnp.broadcast_to(row[:, None], (channels, size, 2 * size)).reshape(channels, -1)
    rows = rows[:, size - 1 : size - 1 + size * (2 * size - 1)]
    return rows.reshape(channels, size, -1)[..., :size]
