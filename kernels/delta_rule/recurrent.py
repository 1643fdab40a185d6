"""The delta rule token by token, with a backward pass that keeps no states: the form for CPUs.

With D_t = diag(exp(g_t)), P_t = D_t S_{t-1}, and e_t the error that token t corrects,

    e_t = v_t - P_t^T k_t        u_t = beta_t e_t        S_t = P_t + k_t u_t^T        o_t = S_t^T q_t

The errors are kept, [B, T, H, V]: with them the states are those of linear attention with values u, and no sweep has
to run backwards. With R_t the gradient of S_t from all later tokens, from right to left

    du_t = R_t^T k_t + (q_t . k_t) do_t        R_{t-1} = D_t (R_t + q_t do_t^T - k_t (beta_t du_t)^T)

and the other reads are R_t u_t on the way, and P_t do_t, P_t (beta_t du_t) in a sweep from left to right:

    dq_t = P_t do_t + (u_t . do_t) k_t        dk_t = R_t u_t + (u_t . do_t) q_t - P_t (beta_t du_t)
    dv_t = beta_t du_t        dbeta_t = e_t . du_t
    dg_t = sum_{s >= t} (q_s P_s do_s - k_s R_s u_s - k_s P_s (beta_s du_s)) + sum_v S_T dS_T

dg, a number a row of the state, is sum_v P_t dP_t, which the terms of later tokens add up to; what cancels within a
token is left out of them, so that the sum is as small as its terms when decays are strong. The start of a segment is
D_t = 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.recurrent import decays, dot, log_decay_gradient, outer, read, read_transposed, scaled, shift, sweep
from kernels.segments import segment_starts


def recurrent(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"] | None,
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`. Computes in the state's dtype; copies q and k for every head of v."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    starts = None if segment_ids is None else segment_starts(segment_ids)[:, :, None, None]
    return attend(q, k, v, beta[..., None], log_decay, initial_state, starts, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attend(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    initial_state: Array,
    starts: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """q, k [B, T, H, K]; v [B, T, H, V]; beta, starts [B, T, H|1, 1]; log_decay [B, T, H, K|1]."""
    (out,), final_state = attend_sweep(q, k, v, beta, log_decay, initial_state, starts, scale, keep_errors=False)
    return out.astype(v.dtype), final_state


def attend_forward(q: Array, k: Array, v: Array, *args: Any) -> tuple[Any, ...]:
    (out, errors), final_state = attend_sweep(q, k, v, *args, keep_errors=True)
    return (out.astype(v.dtype), final_state), (q, k, *args[:-1], errors)


def attend_sweep(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    initial_state: Array,
    starts: Array | None,
    scale: float,
    *,
    keep_errors: bool,
) -> tuple[list[Array], Array]:
    dtype = initial_state.dtype
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))

    def step(state, q, k, v, beta, decay):
        error = v - read(state, scaled(k, decay))
        state = scaled(state, decay) + outer(k, beta * error)
        out = read(state, q)
        return state, (out, error) if keep_errors else (out,)

    return sweep(step, initial_state, (scale * q, k, v, beta, decays(log_decay, starts, dtype)))


def attend_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    *operands, log_decay, initial_state, starts, errors = residuals
    q, k, beta, do, end = (x.astype(initial_state.dtype) for x in (*operands, *cotangents))
    decay = decays(log_decay, starts, initial_state.dtype)
    do, u, qk = scale * do, beta * errors, dot(q, k)

    def correct(grad, q, k, beta, do, qk, decay, next_u):
        du = read(grad, k) + qk * do
        grad = scaled(grad + outer(q, do) - outer(k, beta * du), decay)
        return grad, (du, read_transposed(grad, next_u))

    (du, dk), d_initial_state = sweep(correct, end, (q, k, beta, do, qk, decay), (u,), reverse=True)
    dk = shift(dk, read_transposed(end, u[:, -1]), reverse=True)
    dv = beta * du

    def add(state, k, u, decay, next_do, next_dv):
        state = scaled(state, decay) + outer(k, u)
        return state, (read_transposed(state, next_do), read_transposed(state, next_dv))

    (dq, dk_read), final_state = sweep(add, initial_state, (k, u, decay), (do, dv))
    dq = scaled(shift(dq, read_transposed(initial_state, do[:, 0])), decay)
    dk_read = scaled(shift(dk_read, read_transposed(initial_state, dv[:, 0])), decay)

    d_log_decay = None
    if log_decay is not None:
        d_log_decay = log_decay_gradient(q * dq - k * (dk + dk_read), final_state * end, starts, log_decay)
    u_do = dot(u, do)
    dq, dk, d_beta = dq + u_do * k, dk + u_do * q - dk_read, dot(errors, du)
    dq, dk, d_beta = (x.astype(operand.dtype) for x, operand in zip((dq, dk, d_beta), operands, strict=True))
    return dq, dk, dv.astype(cotangents[0].dtype), d_beta, d_log_decay, d_initial_state, None


attend.defvjp(attend_forward, attend_backward)
