"""`delta_rule`: one recurrence for DeltaNet, Gated DeltaNet, its products and Kimi Delta Attention."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.checks import (
    check_count,
    check_dtype,
    check_not_above_zero,
    check_not_below_zero,
    check_number,
    check_operands,
    check_rank,
    check_segment_ids,
    check_shape,
)
from kernels.delta_rule import specs
from kernels.delta_rule.chunked import chunked
from kernels.delta_rule.mosaic_gpu import mosaic_gpu
from kernels.delta_rule.mosaic_tpu import mosaic_tpu
from kernels.delta_rule.recurrent import recurrent
from kernels.delta_rule.reference import reference

IMPLEMENTATIONS = {
    "reference": reference,
    "recurrent": recurrent,
    "chunked": chunked,
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
}
OP = "delta_rule"


def delta_rule(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H"] | None = None,
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The delta rule, with any decay: what the state holds for a key is corrected, not added to.

        S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t

    DeltaNet without g (arXiv:2406.06484), Gated DeltaNet with a number a head (arXiv:2412.06464), Kimi Delta Attention
    with a vector over the rows of the state (arXiv:2510.26692). Head h of v reads head h // (H // G) of q and k. The
    state cannot grow as long as beta |k|^2 is at most 2: keys of unit length and beta up to 2 (above 1 the transition
    has negative eigenvalues, arXiv:2411.12537). Gradients flow to every float argument, from `out` and the final state.
    Time and memory are linear in T, and no state of a single token is kept for the backward pass.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      q, k: G heads; G divides H. Used as they come: normalising keys is the caller's.
      v: H heads.
      beta: how much of the error is corrected, at least 0.
      log_decay: g <= 0. None: no decay; [B, T, H]: a scalar; [B, T, H, K]: a vector.
      initial_state: S_0, zero by default. It belongs to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's starts from a zero state.
      scale: None is K^-0.5.
      chunk_size: tokens a chunk, for the implementations that have chunks; None chooses.
      implementation: a name, names in order of preference, or None for this device's best.

    Returns:
      out in v's dtype, and the state after the last token, float32.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a log-decay above 0 or a beta below 0 (inside of
        `jax.jit`, where none is seen, that is a promise), a scale that is not finite, a chunk below 1, or an unknown
        implementation.
      NotImplementedError: no implementation supports the call.
    """
    check_rank(OP, "v", v, "B T H V")
    check_rank(OP, "q", q, "B T G K")
    B, T, H, V = v.shape
    K = q.shape[3]
    check_operands(OP, q, k, v)
    check_shape(OP, "beta", beta, (B, T, H), like="v", shape=v.shape)
    if log_decay is not None:
        check_shape(OP, "log_decay", log_decay, (B, T, H), (B, T, H, K), like="v", shape=v.shape)
    if initial_state is not None:
        check_shape(OP, "initial_state", initial_state, (B, H, K, V), like="v", shape=v.shape)
    check_segment_ids(OP, segment_ids, like="v", shape=v.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
    check_values(OP, q, k, v, beta, log_decay, "initial_state", initial_state, scale)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), dtype)
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        specs.order(dispatch.device()),
        q,
        k,
        v,
        beta,
        log_decay if log_decay is None or log_decay.ndim == 4 else log_decay[..., None],
        initial_state=initial_state.astype(dtype),
        segment_ids=segment_ids,
        scale=K**-0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )


def delta_rule_step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    beta: Float[Array, "B H"],
    log_decay: Float[Array, "B H K"] | Float[Array, "B H"] | None = None,
    *,
    state: Float[Array, "B H K V"],
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `delta_rule`: its output in v's dtype, and the new state, float32.

    Raises:
      ValueError: as `delta_rule`.
    """
    op = "delta_rule_step"
    check_rank(op, "v", v, "B H V")
    check_rank(op, "q", q, "B G K")
    B, H, V = v.shape
    K = q.shape[2]
    check_operands(op, q, k, v)
    check_shape(op, "beta", beta, (B, H), like="v", shape=v.shape)
    if log_decay is not None:
        check_shape(op, "log_decay", log_decay, (B, H), (B, H, K), like="v", shape=v.shape)
        log_decay = log_decay[:, None] if log_decay.ndim == 3 else log_decay[:, None, :, None]
    check_shape(op, "state", state, (B, H, K, V), like="v", shape=v.shape)
    check_values(op, q, k, v, beta, log_decay, "state", state, scale)
    out, state = reference(
        *(x[:, None] for x in (q, k, v, beta)),
        log_decay,
        initial_state=state.astype(jnp.promote_types(v.dtype, jnp.float32)),
        segment_ids=None,
        scale=K**-0.5 if scale is None else scale,
    )
    return out[:, 0], state


def check_values(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    name: str,
    state: Array | None,
    scale: float | None,
) -> None:
    """Raise ValueError for dtypes, growth and a scale that no call may have; `name` is the state's."""
    check_dtype(op, jnp.floating, q=q, k=k, v=v, beta=beta, log_decay=log_decay, **{name: state})
    check_not_above_zero(op, log_decay=log_decay)
    check_not_below_zero(op, beta=beta)
    check_number(op, "scale", scale)
