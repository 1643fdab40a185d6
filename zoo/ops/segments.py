"""Sums, maxima, starts and counts of each token's segment."""

import jax.numpy as jnp

from kernels import segments
from zoo.ops.axes import OF_TOKENS
from zoo.ops.recurrences import full_linear_attention, recurrence
from zoo.ops.time import associative_scan, previous, reversed_time
from zoo.taken import Segments


def segment_sum(x, *, segment_ids=None):
    """The sum of x [B, T, H, V] over each token's segment, [B, T, H, V]; without segments [B, 1, H, V]."""
    if segment_ids is None:
        return jnp.sum(x, axis=1, keepdims=True)
    ones = jnp.ones((*x.shape[:3], 1), x.dtype)
    return full_linear_attention(ones, ones, x, segment_ids=segment_ids, scale=1.0)


def segment_max(x, *, segment_ids=None):
    """The largest of x [B, T, H] in each token's segment, [B, T, H]; without segments [B, 1, H]."""
    if segment_ids is None:
        return jnp.max(x, axis=1, keepdims=True)

    def up_to(x, ids):
        closed = jnp.where(segment_starts(ids), -jnp.inf, jnp.zeros(ids.shape, x.dtype))[..., None]
        shut = jnp.broadcast_to(closed, x.shape)
        first = jnp.zeros_like(x[:, 0]), jnp.full_like(x[:, 0], -jnp.inf)
        after = lambda a, b: (a[0] + b[0], jnp.maximum(a[1] + b[0], b[1]))  # noqa: E731
        return associative_scan(after, (shut, x), first)[1]

    return jnp.maximum(up_to(x, segment_ids), reversed_time(up_to(reversed_time(x), reversed_time(segment_ids))))


def segment_starts(segment_ids):
    """`kernels.segments.segment_starts`, on a mesh too."""
    segment_ids = segment_ids.numbers if isinstance(segment_ids, Segments) else segment_ids
    # The id before token 0 is its own.
    before, _ = previous(segment_ids, initial_state=segment_ids[:, 0])
    return segment_ids != before


def tokens_since_start(segment_ids, before):
    """`kernels.segments.tokens_since_start`, `before` [B] being the tokens of the first segment in earlier calls."""
    segment_ids = segment_ids.numbers if isinstance(segment_ids, Segments) else segment_ids
    arrays = {"segment_ids": (segment_ids, OF_TOKENS), "initial_state": (before, ("batch",))}

    def call(segment_ids, initial_state):
        count = segments.tokens_since_start(segment_ids, initial_state)
        return count, count[:, -1] + 1

    def carry(arrays):
        written = call(arrays["segment_ids"], 0)[1]
        return jnp.ones_like(written), written

    return recurrence(call, arrays, (OF_TOKENS, ("batch",)), carry, {})[0]
