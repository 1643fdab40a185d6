"""Softmax attention on TPU: jax's splash attention kernel."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from kernels.array_typing import Array, Float, Int

_NONE, _ALL = np.zeros((1, 1), bool), np.ones((1, 1), bool)
BLOCKS = (512, 256, 128)  # tokens; the kernel wants a multiple of 128 that divides the length


def splash(
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
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention`. The gradient of a softcap is jax's, 1 - tanh^2: it has no digits from
    logits of 9 times the cap on."""
    (T, H), L = q.shape[1:3], k.shape[1]
    if log_decay is not None:
        raise NotImplementedError("splash attention knows no decays")
    if kv_positions is not None or (q_positions is not None and q_start is None):
        raise NotImplementedError("positions are the tokens' own indices here")
    if T != L and q_start is None:
        raise NotImplementedError(f"queries and keys are the same tokens here, got {T} queries and {L} keys")
    if T % BLOCKS[-1] or L % BLOCKS[-1]:
        raise NotImplementedError(f"{T} queries or {L} keys are not a multiple of {BLOCKS[-1]}")
    if segment_ids is not None and q_start is None and segment_ids[0] is not segment_ids[1]:
        raise NotImplementedError("a query whose segment has no key would not give 0")
    if not any(jnp.dtype(q.dtype) == dtype for dtype in (jnp.float32, jnp.bfloat16)):
        raise NotImplementedError(f"inputs are float32 or bfloat16 here, got {q.dtype}")

    # Which blocks are visible is known when the kernel is made: of a part that is not, for all parts, and then chosen.
    known = q_start is None or not isinstance(q_start, jax.core.Tracer)
    shape, offset = ((T, L), int(q_start or 0)) if known else ((L, L), 0)
    if window is not None:
        mask = _Local(shape, (window - 1, 0 if causal else window - 1), offset=offset)
    else:
        mask = _Causal(shape, offset) if causal else splash_attention.FullMask(shape)
    block = next(block for block in BLOCKS if T % block == 0 and L % block == 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * H),
        block_sizes=splash_attention.BlockSizes(*[block] * 8),
        head_shards=1,
        q_seq_shards=shape[0] // T,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    if not known:
        kernel = jax.tree.map(lambda array: _part(array, q_start // T, L // T), kernel)
    heads_first = lambda x: x.swapaxes(1, 2)  # noqa: E731
    ids = None if segment_ids is None else splash_attention.SegmentIds(*segment_ids)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return heads_first(jax.vmap(kernel)(heads_first(q), heads_first(k), heads_first(v), ids)).astype(v.dtype)


class _ByBlocks:
    """A mask of which a block that is visible as a whole, or not at all, is one entry.

    The kernel looks at every block of T x L when it is made, and asks of it `any` and `all`: a million tokens on 64
    devices are four million blocks of 512 x 512, of which all but those of the diagonal are alike.
    """

    def __getitem__(self, block):
        (first, last), (start, end) = ((part.start, part.stop - 1) for part in block)
        before, after = getattr(self, "window_size", (None, 0))  # keys that a query sees on its sides; None: all
        first, last = first + self.offset, last + self.offset
        if end < (start if before is None else first - before) or start > last + after:
            return _NONE
        if (before is None or start >= last - before) and end <= first + after:
            return _ALL
        return super().__getitem__(block)


class _Causal(_ByBlocks, splash_attention.CausalMask):
    pass


class _Local(_ByBlocks, splash_attention.LocalMask):
    pass


def _part(array, index, parts):
    """One part of a mask for all queries: of queries, or of heads, blocks of queries and blocks of keys."""
    axis = {1: 0, 3: 1}[array.ndim]
    size = array.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)
