"""The delta rule, step by step: the definition."""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts


def reference(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"] | None,
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = D_t S_{t-1} + k_t u_t^T,  u_t = beta_t (v_t - (D_t S_{t-1})^T k_t),  o_t = scale * S_t^T q_t.

    D_t = diag(exp(g_t)). One `lax.scan`, arrays of float32; `chunk_size` is nothing to it.
    """
    state_dtype = initial_state.dtype
    batch, time, num_heads, _ = v.shape
    q, k = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (q, k))
    if log_decay is None:
        log_decay = jnp.zeros((batch, time, num_heads, 1), state_dtype)
    starts = jnp.zeros((batch, time), bool) if segment_ids is None else segment_starts(segment_ids)

    def read(state, key):
        return jnp.einsum("bhk,bhkv->bhv", key, state, precision="highest")

    def step(state, xs):
        q, k, v, beta, decay, start = (x.astype(state_dtype) if x.dtype != bool else x for x in xs)
        state = jnp.where(start[:, None, None, None], 0, state) * jnp.exp(decay)[..., None]
        correction = beta[..., None] * (v - read(state, k))
        state = state + jnp.einsum("bhk,bhv->bhkv", k, correction, precision="highest")
        return state, scale * read(state, q)

    xs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, beta, log_decay, starts))
    final_state, out = jax.lax.scan(step, initial_state, xs)
    return jnp.swapaxes(out, 0, 1).astype(v.dtype), final_state
