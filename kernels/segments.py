"""Segments of packed rows: a token whose id differs from its left neighbour's starts a new one."""

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Bool, Int


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a segment starts. Token 0 starts none: it continues the initial state."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def segment_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2, ... from left to right, int32: equal for two tokens of a row only if they are of the same segment."""
    return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)


def tokens_since_start(segment_ids: Int[Array, "B T"], before: int | Int[Array, "B"] = 0) -> Int[Array, "B T"]:
    """How many tokens of its own segment precede each token, int32; the first segment has `before` more."""
    time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    first = -jnp.broadcast_to(jnp.asarray(before, jnp.int32), segment_ids.shape[:1])
    start = jnp.where(segment_starts(segment_ids), time, first[:, None])
    return time - lax.cummax(start, axis=1)
