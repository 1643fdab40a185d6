"""Linear attention, step by step: the definition."""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts


def reference(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "..."],
    *,
    bonus: Float[Array, "H K"] | None,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = scale * S_t^T q_t. One `lax.scan`, arrays of float32.

    `log_decay` comes as [B|1, T|1, H, K|1] (see api.py); `chunk_size` is nothing to a step-by-step scan.
    """
    state_dtype = initial_state.dtype
    batch, time, num_heads, _ = v.shape
    q, k = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (q, k))
    log_decay = jnp.broadcast_to(log_decay, (batch, time, *log_decay.shape[2:]))
    starts = jnp.zeros((batch, time), bool) if segment_ids is None else segment_starts(segment_ids)

    def step(state, xs):
        q, k, v, decay, start = (x.astype(state_dtype) if x.dtype != bool else x for x in xs)
        state = jnp.where(start[:, None, None, None], 0, state)
        update = jnp.einsum("bhk,bhv->bhkv", k, v)
        decayed = state * jnp.exp(decay)[..., None]
        read = decayed + update if bonus is None else state + bonus.astype(state_dtype)[..., None] * update
        return decayed + update, scale * jnp.einsum("bhk,bhkv->bhv", q, read, precision="highest")

    xs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, log_decay, starts))
    final_state, out = jax.lax.scan(step, initial_state, xs)
    return jnp.swapaxes(out, 0, 1).astype(v.dtype), final_state
