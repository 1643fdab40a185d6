"""`fast_weights`: linear attention whose state decays along its rows and along its columns."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.checks import (
    check_count,
    check_dtype,
    check_not_above_zero,
    check_number,
    check_rank,
    check_segment_ids,
    check_shape,
)
from kernels.fast_weights.chunked import chunked
from kernels.fast_weights.reference import reference

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked}
OP = "fast_weights"


def fast_weights(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    key_log_decay: Float[Array, "B T H K"],
    value_log_decay: Float[Array, "B T H V"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Linear attention with a decay for each key and one for each value (decaying fast weights, arXiv:2210.04243).

        S_t = diag(exp(g_t)) S_{t-1} diag(exp(f_t)) + k_t v_t^T        o_t = scale * S_t^T q_t

    Gradients flow to every float argument, from `out` and the final state. Time and memory are linear in T: the
    backward pass keeps the state of each chunk. Both implementations differentiate in every mode.

    Args:
      key_log_decay: g <= 0.
      value_log_decay: f <= 0.
      initial_state: S_0, zero by default. It belongs to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's starts from a zero state.
      scale: None is K^-0.5.
      chunk_size: tokens a chunk; None chooses.
      implementation: a name, names in order of preference, or None for this device's best.

    Returns:
      out in v's dtype, and the state after the last token, float32.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a log-decay above 0 (inside of `jax.jit`, where
        none is seen, that is a promise), a scale that is not finite, a chunk below 1, or an unknown implementation.
      NotImplementedError: no implementation supports the call.
    """
    check_rank(OP, "q", q, "B T H K")
    B, T, H, K = q.shape
    check_rank(OP, "v", v, "B T H V")
    V = v.shape[3]
    check_shape(OP, "k", k, q.shape, like="q", shape=q.shape)
    check_shape(OP, "v", v, (B, T, H, V), like="q", shape=q.shape)
    check_shape(OP, "key_log_decay", key_log_decay, q.shape, like="q", shape=q.shape)
    check_shape(OP, "value_log_decay", value_log_decay, v.shape, like="v", shape=v.shape)
    if initial_state is not None:
        check_shape(OP, "initial_state", initial_state, (B, H, K, V), like="v", shape=v.shape)
    check_segment_ids(OP, segment_ids, like="v", shape=v.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
    decays = {"key_log_decay": key_log_decay, "value_log_decay": value_log_decay}
    check_dtype(OP, jnp.floating, q=q, k=k, v=v, **decays, initial_state=initial_state)
    check_not_above_zero(OP, **decays)
    check_number(OP, "scale", scale)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V), dtype)
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        ["chunked"],
        q,
        k,
        v,
        key_log_decay,
        value_log_decay,
        initial_state=initial_state.astype(dtype),
        segment_ids=segment_ids,
        scale=K**-0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )


def fast_weights_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    key_log_decay: Float[Array, "B H K"],
    value_log_decay: Float[Array, "B H V"],
    *,
    state: Float[Array, "B H K V"],
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `fast_weights`: its output in v's dtype, and the new state, float32.

    Raises:
      ValueError: as `fast_weights`.
    """
    tokens = (x[:, None] for x in (q, k, v, key_log_decay, value_log_decay))
    out, state = fast_weights(*tokens, initial_state=state, scale=scale, implementation="reference")
    return out[:, 0], state
