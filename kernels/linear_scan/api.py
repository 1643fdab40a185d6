"""`linear_scan`: an elementwise linear recurrence over time, real or complex."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Inexact, Int
from kernels.checks import check_count, check_dtype, check_not_above_zero, check_rank, check_segment_ids, check_shape
from kernels.linear_scan.chunked import chunked
from kernels.linear_scan.mosaic_tpu import mosaic_tpu
from kernels.linear_scan.reference import reference

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked, "mosaic_tpu": mosaic_tpu}
ORDER = {"tpu": ["mosaic_tpu", "chunked"]}
OP = "linear_scan"


def linear_scan(
    x: Inexact[Array, "B T D"],
    log_decay: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    *,
    initial_state: Inexact[Array, "B D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """Elementwise linear recurrence.

        h_t = exp(g_t) h_{t-1} + x_t,        g = log_decay, h_0 = initial_state

    Real, or complex if any argument is complex64. Gradients flow to `x`, `log_decay` and `initial_state`, from `h` and
    the final state; time and memory are linear in T.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      x: inputs.
      log_decay: logarithm of the decay, its real part <= 0; [D] is the same decay at every step.
      initial_state: the state before token 0, zero by default. It belongs to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's starts from a zero state.
      chunk_size: tokens that are scanned step by step, side by side with the other chunks; None chooses.
      implementation: a name, names in order of preference, or None for this device's best.

    Returns:
      h in x's dtype (complex64 if anything is complex), and the state after the last token, float32 or complex64.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a log-decay above 0 (inside of `jax.jit`, where
        none is seen, that is a promise), a chunk below 1, or an unknown implementation.
      NotImplementedError: no implementation supports the call.
    """
    check_rank(OP, "x", x, "B T D")
    B, T, D = x.shape
    check_shape(OP, "log_decay", log_decay, (D,), (B, T, D), like="x", shape=x.shape)
    if initial_state is not None:
        check_shape(OP, "initial_state", initial_state, (B, D), like="x", shape=x.shape)
    check_segment_ids(OP, segment_ids, like="x", shape=x.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
    check_dtype(OP, jnp.inexact, x=x, log_decay=log_decay, initial_state=initial_state)
    check_not_above_zero(OP, log_decay=log_decay)
    dtype = _state_dtype(x, log_decay, initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((B, D), dtype)
    h, final_state = dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        ORDER.get(dispatch.device().platform, ["chunked"]),
        x.astype(dtype) if dtype == jnp.complex64 else x,
        log_decay.astype(dtype),
        initial_state=initial_state.astype(dtype),
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )
    return h, final_state


def linear_scan_step(
    x: Inexact[Array, "B D"],
    log_decay: Inexact[Array, "B D"] | Inexact[Array, " D"],
    *,
    state: Inexact[Array, "B D"],
) -> tuple[Inexact[Array, "B D"], Inexact[Array, "B D"]]:
    """One token of `linear_scan`: returns h_t in x's dtype, and the new state (its float32 or complex64 self).

    Raises:
      ValueError: as `linear_scan`.
    """
    op = "linear_scan_step"
    check_rank(op, "x", x, "B D")
    check_shape(op, "log_decay", log_decay, x.shape[1:], x.shape, like="x", shape=x.shape)
    check_shape(op, "state", state, x.shape, like="x", shape=x.shape)
    check_dtype(op, jnp.inexact, x=x, log_decay=log_decay, state=state)
    check_not_above_zero(op, log_decay=log_decay)
    dtype = _state_dtype(x, log_decay, state)
    state = jnp.exp(log_decay.astype(dtype)) * state.astype(dtype) + x.astype(dtype)
    return state if dtype == jnp.complex64 else state.astype(x.dtype), state


def _state_dtype(*arrays):
    is_complex = any(array is not None and jnp.iscomplexobj(array) for array in arrays)
    return jnp.complex64 if is_complex else jnp.float32
