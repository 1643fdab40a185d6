"""The definition: a masked softmax over all keys at once, in float32 (float64 for float64 inputs)."""

import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.attention.decay import between
from kernels.softcap import soft_cap


def reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B L"]] | None,
    q_start: int | Int[Array, ""] | None,
    q_positions: Int[Array, "B T"] | None,
    kv_positions: Int[Array, "B L"] | None,
    scale: float,
    softcap: float | None,
    log_decay: tuple[Float[Array, "B T H 2"], Float[Array, "B L H 2"]] | None,
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention`."""
    (B, T, H, _), (L, G) = q.shape, k.shape[1:3]
    q_positions = jnp.arange(T)[None] if q_positions is None else q_positions
    kv_positions = jnp.arange(L)[None] if kv_positions is None else kv_positions
    visible = jnp.ones((B, T, L), bool)
    if segment_ids is not None:
        visible &= segment_ids[0][:, :, None] == segment_ids[1][:, None]
    distance = q_positions[:, :, None] - kv_positions[:, None]  # [B, T, L]
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    visible = visible[:, None]  # [B, 1, T, L]

    dtype = v.dtype
    q, k, v = (x.astype(jnp.promote_types(dtype, jnp.float32)) for x in (q, k, v))
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k, v))
    logits = scale * jnp.einsum("bthk,blhk->bhtl", q, k, precision="highest")
    if softcap is not None:
        logits = soft_cap(logits, softcap)
    if log_decay is not None:
        of_queries, of_keys = (x.swapaxes(1, 2) for x in log_decay)
        logits += between(of_queries[:, :, :, None], of_keys[:, :, None])
    logits = jnp.where(visible, logits, -1e30)  # finite: a row without keys must not become NaN
    weights = jnp.where(visible, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    return jnp.einsum("bhtl,blhv->bthv", weights, v, precision="highest").astype(dtype)
