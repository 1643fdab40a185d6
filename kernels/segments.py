"""Segments of packed rows: a token whose id differs from its left neighbour's starts a new one."""

import jax.numpy as jnp
from jax import lax


def segment_starts(segment_ids):
    """Where a segment starts, bool [B, T]. Token 0 starts none: it continues the initial state."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def tokens_since_start(segment_ids, before: int):
    """How many tokens of its own segment precede each token, int32 [B, T]; the first segment has `before` more."""
    time = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    start = jnp.where(segment_starts(segment_ids), time, -before)
    return time - lax.cummax(start, axis=1)
