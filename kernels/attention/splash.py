"""Softmax attention on TPU: jax's splash attention kernel."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

BLOCKS = (512, 256, 128)  # tokens; the kernel wants a multiple of 128 that divides the length


def splash(q, k, v, *, causal, window, segment_ids, q_positions, kv_positions, scale, softcap, interpret=False):
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
