"""The general delta rule token by token, with a backward pass that keeps no states: the form for CPUs.

With D_t = diag(exp(g_t)), and w_t what token t reads and writes again,

    w_t = S_{t-1}^T a_t        S_t = D_t S_{t-1} + b_t w_t^T + k_t v_t^T        o_t = S_t^T q_t

The w are kept, [B, T, H, V]: with them the states are sums of outer products, and no sweep has to run backwards. With
R_t the gradient of S_t from all later tokens, from right to left

    dw_t = R_t^T b_t + (q_t . b_t) do_t        R_{t-1} = D_t (R_t + q_t do_t^T) + a_t dw_t^T

and the other reads are R_t^T k_t, R_t v_t and R_t w_t in sweeps in that direction, S_{t-1} do_t and S_{t-1} dw_t in
one from left to right:

    dq_t = D_t S_{t-1} do_t + (w_t . do_t) b_t + (v_t . do_t) k_t        da_t = S_{t-1} dw_t
    db_t = R_t w_t + (w_t . do_t) q_t                                    dk_t = R_t v_t + (v_t . do_t) q_t
    dv_t = R_t^T k_t + (q_t . k_t) do_t
    dg_t = sum_{s >= t} (q_s D_s S_{s-1} do_s - b_s R_s w_s - k_s R_s v_s) + sum_{s > t} a_s da_s + sum_v S_T dS_T

dg a number a row of the state. The start of a segment is D_t = 0 and a_t = 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.recurrent import decays, dot, log_decay_gradient, outer, read, read_transposed, scaled, shift, sweep
from kernels.segments import segment_starts


def recurrent(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`. Computes in the state's dtype."""
    starts = None if segment_ids is None else segment_starts(segment_ids)[:, :, None, None]
    if starts is not None:
        a = jnp.where(starts, 0, a)
    return attend(q, k, v, a, b, log_decay, initial_state, starts, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def attend(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    log_decay: Array,
    initial_state: Array,
    starts: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """As `recurrent`, with starts [B, T, 1, 1], where a is 0."""
    (out,), final_state = attend_sweep(q, k, v, a, b, log_decay, initial_state, starts, scale, keep_reads=False)
    return out.astype(v.dtype), final_state


def attend_forward(q: Array, k: Array, v: Array, a: Array, b: Array, *args: Any) -> tuple[Any, ...]:
    (out, w), final_state = attend_sweep(q, k, v, a, b, *args, keep_reads=True)
    return (out.astype(v.dtype), final_state), (q, k, v, a, b, *args[:-1], w)


def attend_sweep(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    log_decay: Array,
    initial_state: Array,
    starts: Array | None,
    scale: float,
    *,
    keep_reads: bool,
) -> tuple[list[Array], Array]:
    dtype = initial_state.dtype
    q, k, v, a, b = (x.astype(dtype) for x in (q, k, v, a, b))

    def step(state, q, k, v, a, b, decay):
        w = read(state, a)
        state = scaled(state, decay) + outer(b, w) + outer(k, v)
        out = read(state, q)
        return state, (out, w) if keep_reads else (out,)

    return sweep(step, initial_state, (scale * q, k, v, a, b, decays(log_decay, starts, dtype)))


def attend_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    *operands, log_decay, initial_state, starts, w = residuals
    q, k, v, a, b, do, end = (x.astype(initial_state.dtype) for x in (*operands, *cotangents))
    decay = decays(log_decay, starts, initial_state.dtype)
    do, qb, qk = scale * do, dot(q, b), dot(q, k)

    def correct(grad, q, a, b, do, qb, decay, next_w):
        dw = read(grad, b) + qb * do
        grad = scaled(grad + outer(q, do), decay) + outer(a, dw)
        return grad, (dw, read_transposed(grad, next_w))

    (dw, db), d_initial_state = sweep(correct, end, (q, a, b, do, qb, decay), (w,), reverse=True)
    db = shift(db, read_transposed(end, w[:, -1]), reverse=True)

    def write(grad, q, a, do, dw, decay, next_k, next_v):
        grad = scaled(grad + outer(q, do), decay) + outer(a, dw)
        return grad, (read(grad, next_k), read_transposed(grad, next_v))

    (dv, dk), _ = sweep(write, end, (q, a, do, dw, decay), (k, v), reverse=True)
    dv = shift(dv, read(end, k[:, -1]), reverse=True)
    dk = shift(dk, read_transposed(end, v[:, -1]), reverse=True)

    def add(state, k, v, b, w, decay, next_do, next_dw):
        state = scaled(state, decay) + outer(b, w) + outer(k, v)
        return state, (read_transposed(state, next_do), read_transposed(state, next_dw))

    (dq, da), final_state = sweep(add, initial_state, (k, v, b, w, decay), (do, dw))
    dq = decay * shift(dq, read_transposed(initial_state, do[:, 0]))
    da = shift(da, read_transposed(initial_state, dw[:, 0]))

    later = shift(a * da, jnp.zeros_like(da[:, 0]), reverse=True)
    d_log_decay = log_decay_gradient(q * dq - b * db - k * dk + later, final_state * end, starts, log_decay)
    w_do, v_do = dot(w, do), dot(v, do)
    gradients = (dq + w_do * b + v_do * k, dk + v_do * q, dv + qk * do, da, db + w_do * q)
    gradients = (x.astype(operand.dtype) for x, operand in zip(gradients, operands, strict=True))
    return *gradients, d_log_decay, d_initial_state, None


attend.defvjp(attend_forward, attend_backward)
