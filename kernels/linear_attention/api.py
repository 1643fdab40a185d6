"""`linear_attention`: one recurrence for retention, GLA, Mamba-2, RWKV-6 and their kin."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.checks import (
    check_count,
    check_dtype,
    check_not_above_zero,
    check_number,
    check_operands,
    check_rank,
    check_segment_ids,
    check_shape,
)
from kernels.linear_attention import specs
from kernels.linear_attention.chunked import chunked
from kernels.linear_attention.jla import jla
from kernels.linear_attention.mosaic_gpu import mosaic_gpu
from kernels.linear_attention.mosaic_tpu import mosaic_tpu
from kernels.linear_attention.recurrent import recurrent
from kernels.linear_attention.reference import reference

IMPLEMENTATIONS = {
    "reference": reference,
    "recurrent": recurrent,
    "chunked": chunked,
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
    "jla": jla,
}
OP = "linear_attention"


def linear_attention(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | Float[Array, " H"] | None = None,
    *,
    bonus: Float[Array, "H K"] | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention, with any decay.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t
        with a bonus u:                                 o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t

    With a bonus, S_{t-1} is read before the decay g_t (RWKV-6, arXiv:2404.05892). Head h of v reads head
    h // (H // G) of q and k. Gradients flow to every float argument, from `out` and the final state. Time and memory
    are linear in T, and no state of a single token is kept for the backward pass.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      q, k: G heads; G divides H.
      v: H heads.
      log_decay: g <= 0. None: no decay; [H]: fixed (retention, arXiv:2307.08621); [B, T, H]: a scalar (Mamba-2,
        arXiv:2405.21060); [B, T, H, K]: a vector over the rows of the state (GLA, arXiv:2312.06635).
      bonus: u, the weight of a token's own key.
      initial_state: S_0, zero by default. It belongs to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's starts from a zero state.
      scale: None is K^-0.5.
      chunk_size: tokens a chunk, for the implementations that have chunks; None chooses.
      implementation: a name, names in order of preference, or None for this device's best.

    Returns:
      out in v's dtype, and the state after the last token, float32.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a log-decay above 0 (inside of `jax.jit`, where
        none is seen, that is a promise), a scale that is not finite, a chunk below 1, or an unknown implementation.
      NotImplementedError: no implementation supports the call.
    """
    check_rank(OP, "v", v, "B T H V")
    check_rank(OP, "q", q, "B T G K")
    B, T, H, V = v.shape
    K = q.shape[3]
    check_operands(OP, q, k, v)
    if log_decay is not None:
        check_shape(OP, "log_decay", log_decay, (H,), (B, T, H), (B, T, H, K), like="v", shape=v.shape)
    check_state_arguments(OP, bonus, "initial_state", initial_state, (B, H, K, V), v)
    check_segment_ids(OP, segment_ids, like="v", shape=v.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
    check_values(OP, q, k, v, log_decay, bonus, "initial_state", initial_state, scale)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), dtype)
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        specs.order(dispatch.device(), q, v, log_decay),
        q,
        k,
        v,
        broadcastable(log_decay, H),
        bonus=bonus,
        initial_state=initial_state.astype(dtype),
        segment_ids=segment_ids,
        scale=K**-0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )


def linear_attention_step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    log_decay: Float[Array, "B H K"] | Float[Array, "B H"] | Float[Array, " H"] | None = None,
    *,
    state: Float[Array, "B H K V"],
    bonus: Float[Array, "H K"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `linear_attention`: its output in v's dtype, and the new state, float32.

    Raises:
      ValueError: as `linear_attention`.
    """
    op = "linear_attention_step"
    check_rank(op, "v", v, "B H V")
    check_rank(op, "q", q, "B G K")
    B, H, V = v.shape
    K = q.shape[2]
    check_operands(op, q, k, v)
    if log_decay is not None:
        check_shape(op, "log_decay", log_decay, (H,), (B, H), (B, H, K), like="v", shape=v.shape)
    check_state_arguments(op, bonus, "state", state, (B, H, K, V), v)
    check_values(op, q, k, v, log_decay, bonus, "state", state, scale)
    out, state = reference(
        *(x[:, None] for x in (q, k, v)),
        broadcastable(log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, None], H),
        bonus=bonus,
        initial_state=state.astype(jnp.promote_types(v.dtype, jnp.float32)),
        segment_ids=None,
        scale=K**-0.5 if scale is None else scale,
    )
    return out[:, 0], state


def check_state_arguments(
    op: str, bonus: Array | None, name: str, state: Array | None, state_shape: tuple[int, ...], v: Array
) -> None:
    """Raise ValueError unless `bonus` [H, K] and the state `name` [B, H, K, V] fit, where they are given."""
    if bonus is not None:
        check_shape(op, "bonus", bonus, state_shape[1:3], like="v", shape=v.shape)
    if state is not None:
        check_shape(op, name, state, state_shape, like="v", shape=v.shape)


def check_values(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    bonus: Array | None,
    name: str,
    state: Array | None,
    scale: float | None,
) -> None:
    """Raise ValueError for dtypes, growth and a scale that no call may have; `name` is the state's."""
    check_dtype(op, jnp.floating, q=q, k=k, v=v, log_decay=log_decay, bonus=bonus, **{name: state})
    check_not_above_zero(op, log_decay=log_decay)
    check_number(op, "scale", scale)


def broadcastable(log_decay: Array | None, num_heads: int) -> Array:
    """log_decay as the implementations take it: [B, T, H, K], with 1 for an axis that it does not vary along."""
    if log_decay is None:
        return jnp.zeros((1, 1, num_heads, 1), jnp.float32)
    if log_decay.ndim == 1:
        return log_decay[None, None, :, None]
    return log_decay if log_decay.ndim == 4 else log_decay[..., None]
