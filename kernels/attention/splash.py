"""Softmax attention on TPU: jax's splash attention kernel."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from kernels.array_typing import Array, Float, Int

BLOCKS = (512, 256, 128)  # tokens; the kernel wants a multiple of 128 that divides the length


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B L"]] | None,
    q_positions: Int[Array, "B T"] | None,
    kv_positions: Int[Array, "B L"] | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention`. The gradient of a softcap is jax's, 1 - tanh^2: it has no digits from
    logits of 9 times the cap on."""
    (T, H), L = q.shape[1:3], k.shape[1]
    if q_positions is not None or kv_positions is not None:
        raise NotImplementedError("positions are the tokens' own indices here")
    if T != L:
        raise NotImplementedError(f"queries and keys are the same tokens here, got {T} queries and {L} keys")
    if T % BLOCKS[-1]:
        raise NotImplementedError(f"{T} tokens are not a multiple of {BLOCKS[-1]}")
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        raise NotImplementedError("a query whose segment has no key would not give 0")
    if window is not None and not causal:
        raise NotImplementedError("a window is causal here")
    if not any(jnp.dtype(q.dtype) == dtype for dtype in (jnp.float32, jnp.bfloat16)):
        raise NotImplementedError(f"inputs are float32 or bfloat16 here, got {q.dtype}")

    if window is not None:
        mask = splash_attention.LocalMask((T, T), (window - 1, 0), offset=0)
    else:
        mask = splash_attention.CausalMask((T, T)) if causal else splash_attention.FullMask((T, T))
    block = next(block for block in BLOCKS if T % block == 0)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * H),
        block_sizes=splash_attention.BlockSizes(*[block] * 8),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
    ids = None if segment_ids is None else splash_attention.SegmentIds(*segment_ids)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return heads_first(jax.vmap(kernel)(heads_first(q), heads_first(k), heads_first(v), ids)).astype(v.dtype)
