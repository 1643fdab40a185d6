"""Linear attention by the package jax-linear-attention: Mosaic GPU kernels on Hopper, its chunked XLA form elsewhere.

Chosen by name only. The kernels take bfloat16, K and V of 64 or 128, and no bonus; any other call runs the package's
XLA form, on a Hopper GPU too.
"""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.linear_attention import specs

# In both of the package's forms a decay between two tokens is the difference of cumulative sums over a chunk, so that
# one log-decay of -1e4 takes the digits of all later ones (the suite's extreme decays: an error of 5e-4 unclamped).
# e^-20 of a state is nothing beside a float32 rounding, and sums of 16 such terms keep the digits (chunks of 64 miss
# 1e-6 by a factor of 2). Halves have the kernels' chunks of 64.
LOWEST_LOG_DECAY = -20.0
FLOAT32_CHUNK = 16


def jla(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "..."],
    *,
    bonus: Float[Array, "H K"] | None,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """out [B, T, H, V] and the final state; see `linear_attention`. `chunk_size` can only make chunks smaller."""
    ops = dispatch.optional("jla.ops", extra="jla")
    if initial_state.dtype != jnp.float32:
        raise NotImplementedError(f"the package computes in float32, not {initial_state.dtype}")
    (B, T, H, _), (G, K) = v.shape, q.shape[2:]
    dtype = jnp.result_type(q, k, v)
    per_key = bonus is not None or log_decay.shape[3] > 1
    decay = jnp.maximum(log_decay.astype(jnp.float32), LOWEST_LOG_DECAY)
    gates = {"g": jnp.broadcast_to(decay, (B, T, H, K)) if per_key else jnp.broadcast_to(decay[..., 0], (B, T, H))}
    if bonus is not None:
        gates["u"] = bonus
    kind = "rwkv6" if bonus is not None else "gla" if per_key else "simple_gla"
    options = {"scale": scale, "initial_state": initial_state, "segment_ids": segment_ids, "output_final_state": True}
    if dtype == jnp.float32:
        options["chunk_size"] = specs.chunk_size(dispatch.device(), T, min(chunk_size or FLOAT32_CHUNK, FLOAT32_CHUNK))
        if per_key:
            options["sub_chunk"] = options["chunk_size"]
    inputs = tuple(x.astype(dtype) for x in (q, k, v))
    if G < H and not _shares_heads(kind, *inputs, gates["g"], options):
        inputs = (*(jnp.repeat(x, H // G, axis=2) for x in inputs[:2]), inputs[2])
    out, final_state = ops.linear_attention(kind, *inputs, **gates, **options)
    return out.astype(v.dtype), final_state


def _shares_heads(kind, q, k, v, g, options):
    """Whether the call runs on the one kernel that takes fewer heads of q and k."""
    kernel = dispatch.optional("jla.ops.mosaic_gpu.scalar_gate", extra="jla") if kind == "simple_gla" else None
    return kernel is not None and kernel.supports_simple_gla(q, k, v, g, **options)
