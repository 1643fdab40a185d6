"""Softmax attention on NVIDIA GPUs: cuDNN's fused attention, through jax."""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int

MASK_BYTES = 2**30  # of segments, which cuDNN takes as numbers added to the logits, [B, 1, T, L]


def cudnn(
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
    log_decay: tuple[Float[Array, "B T H 2"], Float[Array, "B L H 2"]] | None = None,
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention`."""
    (B, T), L = q.shape[:2], k.shape[1]
    if log_decay is not None:
        raise NotImplementedError("cuDNN knows no decays")
    mask = None
    if q_start is not None and L != T:
        raise NotImplementedError("queries are those of all keys here")
    if segment_ids is not None:
        if segment_ids[0] is not segment_ids[1]:
            raise NotImplementedError("queries and keys have the same segments here, so that no query sees no key")
        if (size := 2 * B * T * L) > MASK_BYTES:
            raise NotImplementedError(f"segments are a mask of {size} bytes here, above {MASK_BYTES}")
        mask = segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :]
    if softcap is not None:
        raise NotImplementedError("cuDNN knows no softcap")
    if q_positions is not None or kv_positions is not None:
        raise NotImplementedError("positions are the tokens' own indices here")
    if not all(x.dtype in (jnp.bfloat16, jnp.float16) for x in (q, k, v)) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(f"inputs are all bfloat16 or all float16 here, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.shape[-1] != v.shape[-1]:
        raise NotImplementedError(f"keys and values have the same width here, got {k.shape[-1]} and {v.shape[-1]}")
    if window is not None and not causal:
        raise NotImplementedError("a window is causal here")
    if window is not None and L < T:
        raise NotImplementedError(f"a query that sees no key would not give 0 ({T} queries, {L} keys, window {window})")
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:  # no cuDNN beside this jax
        raise NotImplementedError(str(error)) from error
