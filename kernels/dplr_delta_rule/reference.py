"""The general delta rule, step by step: the definition."""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts


def reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,  o_t = scale * S_t^T q_t.

    One `lax.scan`, arrays of float32; `chunk_size` is nothing to it.
    """
    state_dtype = initial_state.dtype
    starts = jnp.zeros(v.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)

    def read(state, key):
        return jnp.einsum("bhk,bhkv->bhv", key, state, precision="highest")

    def written(key, value):
        return jnp.einsum("bhk,bhv->bhkv", key, value, precision="highest")

    def step(state, xs):
        q, k, v, a, b, decay, start = (x.astype(state_dtype) if x.dtype != bool else x for x in xs)
        state = jnp.where(start[:, None, None, None], 0, state)
        state = jnp.exp(decay)[..., None] * state + written(b, read(state, a)) + written(k, v)
        return state, scale * read(state, q)

    xs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k, v, a, b, log_decay, starts))
    final_state, out = jax.lax.scan(step, initial_state, xs)
    return jnp.swapaxes(out, 0, 1).astype(v.dtype), final_state
