"""`selective_scan`: Mamba's S6, a diagonal state-space model whose step, input and read depend on the token."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.checks import (
    check_count,
    check_dtype,
    check_not_above_zero,
    check_not_below_zero,
    check_rank,
    check_segment_ids,
    check_shape,
)
from kernels.selective_scan.chunked import chunked
from kernels.selective_scan.jla import jla
from kernels.selective_scan.mosaic_gpu import mosaic_gpu
from kernels.selective_scan.mosaic_tpu import mosaic_tpu
from kernels.selective_scan.reference import reference

IMPLEMENTATIONS = {
    "reference": reference,
    "chunked": chunked,
    "mosaic_tpu": mosaic_tpu,
    "mosaic_gpu": mosaic_gpu,
    "jla": jla,
}
OP = "selective_scan"


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None = None,
    *,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Selective state-space model (Gu & Dao 2023, arXiv:2312.00752); each channel has a state of N numbers.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t + D x_t

    Gradients flow to every float argument, from y and the final state. [B, T, D, N] is never held: for the backward
    pass the states between chunks are kept, the others recomputed.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      x: inputs.
      dt: step sizes, >= 0: how far each channel's clock moves at a token.
      A: rates, <= 0.
      B, C: how a token writes to the state, and how it reads.
      D: weight of the token's own input in the output; None leaves it out.
      initial_state: h_0, zero by default. It belongs to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's starts from a zero state.
      chunk_size: most tokens between two states that are kept for the backward pass; None chooses.
      implementation: a name, names in order of preference, or None for this device's best.

    Returns:
      y in x's dtype, and the state after the last token, float32.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, an A above or a dt below 0 (inside of `jax.jit`,
        where none is seen, that is a promise), a chunk below 1, or an unknown implementation.
      NotImplementedError: no implementation supports the call.
    """
    check_rank(OP, "x", x, "B T D")
    _check(OP, x, dt, A, B, C, D, "initial_state", initial_state)
    check_segment_ids(OP, segment_ids, like="x", shape=x.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), jnp.float32)
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        ["mosaic_tpu", "chunked"] if dispatch.device().platform == "tpu" else ["chunked"],
        x,
        dt,
        A,
        B,
        C,
        D,
        initial_state=initial_state.astype(jnp.float32),
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )


def selective_scan_step(
    x: Float[Array, "B D"],
    dt: Float[Array, "B D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B N"],
    C: Float[Array, "B N"],
    D: Float[Array, " D"] | None = None,
    *,
    state: Float[Array, "B D N"],
) -> tuple[Float[Array, "B D"], Float[Array, "B D N"]]:
    """One token of `selective_scan`: its output in x's dtype, and the new state, float32.

    Raises:
      ValueError: as `selective_scan`.
    """
    op = "selective_scan_step"
    check_rank(op, "x", x, "B D")
    _check(op, x, dt, A, B, C, D, "state", state)
    tokens = (array[:, None] for array in (x, dt, B, C))
    x, dt, B, C = tokens
    y, state = reference(x, dt, A, B, C, D, initial_state=state.astype(jnp.float32), segment_ids=None, chunk_size=None)
    return y[:, 0], state


def _check(op, x, dt, A, B, C, D, state_name, state):
    check_shape(op, "dt", dt, x.shape, like="x", shape=x.shape)
    check_rank(op, "A", A, "D N")
    channels, size = x.shape[-1], A.shape[1]
    check_shape(op, "A", A, (channels, size), like="x", shape=x.shape)
    for name, array in (("B", B), ("C", C)):
        check_shape(op, name, array, (*x.shape[:-1], size), like="A", shape=A.shape)
    if D is not None:
        check_shape(op, "D", D, (channels,), like="x", shape=x.shape)
    if state is not None:
        check_shape(op, state_name, state, (x.shape[0], channels, size), like="A", shape=A.shape)
    check_dtype(op, jnp.floating, x=x, dt=dt, A=A, B=B, C=C, D=D, **{state_name: state})
    check_not_above_zero(op, A=A)
    check_not_below_zero(op, dt=dt)
