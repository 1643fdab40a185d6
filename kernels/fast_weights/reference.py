"""Decaying fast weights, step by step: the definition."""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts


def reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    key_log_decay: Float[Array, "B T H K"],
    value_log_decay: Float[Array, "B T H V"],
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """One `lax.scan`, arrays of float32. `chunk_size` is nothing to a step-by-step scan."""
    dtype = initial_state.dtype
    starts = jnp.zeros(v.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)

    def step(state, xs):
        (q, k, v, g, f), start = (x.astype(dtype) for x in xs[:5]), xs[5]
        state = jnp.where(start[:, None, None, None], 0, state)
        state = state * jnp.exp(g)[..., None] * jnp.exp(f)[..., None, :] + jnp.einsum("bhk,bhv->bhkv", k, v)
        return state, scale * jnp.einsum("bhk,bhkv->bhv", q, state, precision="highest")

    xs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, key_log_decay, value_log_decay, starts))
    final_state, out = jax.lax.scan(step, initial_state, xs)
    return jnp.swapaxes(out, 0, 1).astype(v.dtype), final_state
