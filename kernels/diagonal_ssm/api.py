"""`diagonal_ssm`: a time-invariant state-space model with a complex diagonal state, which is a long convolution."""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Inexact, Int
from kernels.checks import check_count, check_dtype, check_not_above_zero, check_rank, check_segment_ids, check_shape
from kernels.diagonal_ssm.chunked import chunked
from kernels.diagonal_ssm.reference import reference

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked}
OP = "diagonal_ssm"


def diagonal_ssm(
    x: Float[Array, "B T D"],
    log_a: Inexact[Array, "D N"],
    b: Inexact[Array, "D N"],
    c: Inexact[Array, "D N"],
    d: Float[Array, " D"] | None = None,
    *,
    initial_state: Inexact[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
    """Diagonal state-space model in discrete time (S4D, Gu et al. 2022, arXiv:2206.11893).

        h_t = exp(log_a) h_{t-1} + b x_t        y_t = 2 Re(c . h_t) + d x_t

    which from a zero state is the convolution y = K * x with K_t = 2 Re(sum_n c_n exp(t log_a_n) b_n) + [t = 0] d.
    Gradients flow to every float and complex argument, from y and the final state. Time and memory are linear in T, and
    [B, T, D, N] is never held.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      x: inputs.
      log_a: logarithm of the decay and turn of a step, its real part <= 0; real or complex, as are b and c.
      b, c: how an input writes to the state, and how it is read.
      d: weight of the token's own input in the output; None leaves it out.
      initial_state: h_0, zero by default. It belongs to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's starts from a zero state.
      chunk_size: tokens that are convolved at once, states passing between; None chooses.
      implementation: a name, names in order of preference, or None for this device's best.

    Returns:
      y in x's dtype, and the state after the last token, complex64.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a real part of log_a above 0 (inside of `jax.jit`,
        where none is seen, that is a promise), a chunk below 1, or an unknown implementation.
      NotImplementedError: no implementation supports the call.
    """
    check_rank(OP, "x", x, "B T D")
    _check(OP, x, log_a, b, c, d, "initial_state", initial_state)
    check_segment_ids(OP, segment_ids, like="x", shape=x.shape)
    check_count(OP, "chunk_size", chunk_size, "token")
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        ["chunked"],
        x,
        *(array.astype(jnp.complex64) for array in (log_a, b, c)),
        d,
        initial_state=None if initial_state is None else initial_state.astype(jnp.complex64),
        segment_ids=segment_ids,
        chunk_size=chunk_size,
    )


def diagonal_ssm_step(
    x: Float[Array, "B D"],
    log_a: Inexact[Array, "D N"],
    b: Inexact[Array, "D N"],
    c: Inexact[Array, "D N"],
    d: Float[Array, " D"] | None = None,
    *,
    state: Inexact[Array, "B D N"],
) -> tuple[Float[Array, "B D"], Inexact[Array, "B D N"]]:
    """One token of `diagonal_ssm`: its output in x's dtype, and the new state, complex64.

    Raises:
      ValueError: as `diagonal_ssm`.
    """
    op = "diagonal_ssm_step"
    check_rank(op, "x", x, "B D")
    _check(op, x, log_a, b, c, d, "state", state)
    log_a, b, c, state = (array.astype(jnp.complex64) for array in (log_a, b, c, state))
    y, state = reference(x[:, None], log_a, b, c, d, initial_state=state, segment_ids=None, chunk_size=None)
    return y[:, 0], state


def _check(op, x, log_a, b, c, d, state_name, state):
    check_rank(op, "log_a", log_a, "D N")
    channels, size = x.shape[-1], log_a.shape[1]
    check_shape(op, "log_a", log_a, (channels, size), like="x", shape=x.shape)
    for name, array in (("b", b), ("c", c)):
        check_shape(op, name, array, log_a.shape, like="log_a", shape=log_a.shape)
    if d is not None:
        check_shape(op, "d", d, (channels,), like="x", shape=x.shape)
    if state is not None:
        check_shape(op, state_name, state, (x.shape[0], channels, size), like="log_a", shape=log_a.shape)
    check_dtype(op, jnp.floating, x=x, d=d)
    check_dtype(op, jnp.inexact, log_a=log_a, b=b, c=c, **{state_name: state})
    check_not_above_zero(op, log_a=log_a)
