"""Keys and values of the last tokens as a state, for attention that looks no further back.

A call's keys are those kept, then its own: [B, slots + T, ...], where the query of its token t stands at slots + t
(`q_start`). Kept are the last `slots` of all tokens, and how many the segment that goes on has had.
"""

import jax
import jax.numpy as jnp

from zoo import ops
from zoo.taken import Segments, last

State = dict[str, jax.Array]  # k, v [B, slots, heads, K], count [B]: tokens of the current segment


def init_recent(batch: int, slots: int, heads: int, width: int, dtype: jnp.dtype) -> State:
    cache = jnp.zeros((batch, slots, heads, width), dtype)
    return {"k": cache, "v": cache, "count": jnp.zeros((batch,), jnp.int32)}


def counted(x: jax.Array, segment_ids: jax.Array | Segments | None, state: State | None) -> jax.Array:
    """[B, T] how many tokens of its own segment come before each, those of earlier calls too."""
    before = jnp.zeros(x.shape[:1], jnp.int32) if state is None else state["count"]
    if segment_ids is None:
        return before[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
    return ops.tokens_since_start(segment_ids, before)


def with_recent(
    k: jax.Array,
    v: jax.Array,
    ids: jax.Array,
    state: State,
    *,
    seen: jax.Array,
    count: jax.Array,
    segment_ids: jax.Array | Segments | None,
) -> tuple[jax.Array, jax.Array, jax.Array, State]:
    """All keys, values and ids, and the state after the call.

    Args:
      ids: [B, T], a kernel's `segment_ids`. The `seen` [B] tokens before token 0 get its id, those before them another.
      count: of `counted`.
      segment_ids: of the call, which say what the state takes in.
    """
    slots = state["k"].shape[1]
    keys, values = (jnp.concatenate([state[name], x.astype(state[name].dtype)], 1) for name, x in (("k", k), ("v", v)))
    age = jnp.arange(slots, 0, -1, dtype=jnp.int32)
    kept = jnp.where(age <= seen[:, None], ids[:, :1], ids[:, :1] - 1)
    taken = segment_ids.count()[:, None] if isinstance(segment_ids, Segments) else k.shape[1]
    at = jnp.broadcast_to(taken + jnp.arange(slots), (len(k), slots))[..., None, None]
    after = {name: jnp.take_along_axis(x, at, axis=1) for name, x in (("k", keys), ("v", values))}
    after["count"] = last(count + 1, segment_ids, state["count"])
    return keys.astype(k.dtype), values.astype(v.dtype), jnp.concatenate([kept, ids], 1), after
