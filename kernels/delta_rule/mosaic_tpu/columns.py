"""Numbers of tokens, from rows of a tile, as columns over lanes."""

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu.lanes import LANES


def over_lanes(x: Array, width: int) -> Array:
    """x [C, 128] of equal lanes, on `width` lanes, a multiple of 128."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


def lane_broadcast(columns: Array, index: int) -> Array:
    return jnp.broadcast_to(columns[:, index : index + 1], (columns.shape[0], LANES))
