"""`dplr_delta_rule`: the delta rule whose transition is diagonal plus low rank, of RWKV-7."""

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
from kernels.dplr_delta_rule import specs
from kernels.dplr_delta_rule.chunked import chunked
from kernels.dplr_delta_rule.mosaic_gpu import mosaic_gpu
from kernels.dplr_delta_rule.mosaic_tpu import mosaic_tpu
from kernels.dplr_delta_rule.recurrent import recurrent
from kernels.dplr_delta_rule.reference import reference

IMPLEMENTATIONS = {
    "reference": reference,
    "recurrent": recurrent,
    "chunked": chunked,
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
}
OP = "dplr_delta_rule"


def dplr_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The general delta rule: a transition that is diagonal plus a matrix of rank one.

        S_t = (diag(exp(g_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    RWKV-7 (arXiv:2503.14456) has a = -kappa and b = kappa * (its in-context learning rate), kappa of unit length.
    `delta_rule` is the case a = -exp(g) k, b = beta k, with beta k as the key, and costs half as much: what is written
    and what is corrected have one key there. That the state does not grow (g <= 0 and, for a = -b / beta of unit
    length, beta at most 1 + exp(g)) is the caller's promise. Gradients flow to every float argument, from `out` and the
    final state. Time and memory are linear in T, and no state of a single token is kept for the backward pass.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      q, k, v: H heads each.
      a, b: what the state before token t is read with, and where that is written.
      log_decay: g <= 0.
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
    check_rank(OP, "q", q, "B T H K")
    B, T, H, V = v.shape
    K = q.shape[3]
    check_values(OP, q, k, v, a, b, log_decay, "initial_state", initial_state, scale)
    check_segment_ids(OP, segment_ids, like="v", shape=v.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
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
        a,
        b,
        log_decay,
        initial_state=initial_state.astype(dtype),
        segment_ids=segment_ids,
        scale=K**-0.5 if scale is None else scale,
        chunk_size=chunk_size,
    )


def dplr_delta_rule_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    log_decay: Float[Array, "B H K"],
    *,
    state: Float[Array, "B H K V"],
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `dplr_delta_rule`: its output in v's dtype, and the new state, float32.

    Raises:
      ValueError: as `dplr_delta_rule`.
    """
    op = "dplr_delta_rule_step"
    check_rank(op, "v", v, "B H V")
    check_rank(op, "q", q, "B H K")
    check_values(op, q, k, v, a, b, log_decay, "state", state, scale)
    out, state = reference(
        *(x[:, None] for x in (q, k, v, a, b, log_decay)),
        initial_state=state.astype(jnp.promote_types(v.dtype, jnp.float32)),
        segment_ids=None,
        scale=q.shape[2] ** -0.5 if scale is None else scale,
    )
    return out[:, 0], state


def check_values(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    log_decay: Array,
    name: str,
    state: Array | None,
    scale: float | None,
) -> None:
    """Raise ValueError for shapes, dtypes, growth and a scale that no call may have; `name` is the state's."""
    check_shape(op, "q", q, (*v.shape[:-1], q.shape[-1]), like="v", shape=v.shape)
    for other, array in {"k": k, "a": a, "b": b, "log_decay": log_decay}.items():
        check_shape(op, other, array, q.shape, like="q", shape=q.shape)
    if state is not None:
        check_shape(op, name, state, (v.shape[0], *v.shape[-2:-1], q.shape[-1], v.shape[-1]), like="v", shape=v.shape)
    check_dtype(op, jnp.floating, q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, **{name: state})
    check_not_above_zero(op, log_decay=log_decay)
    check_number(op, "scale", scale)
