"""Linear attention token by token, with a backward pass that keeps no states: the fastest form on a CPU.

With d_t = exp(g_t), and r_t = d_t q_t (or q_t with a bonus), everything is a read of the state before token t,

    o_t = S_{t-1}^T r_t + (q_t . u k_t) v_t        S_t = diag(d_t) S_{t-1} + k_t v_t^T

(u = 1 without a bonus), and so is its transpose, with R_t the gradient of S_t from all later tokens:

    R_{t-1} = diag(d_t) R_t + r_t do_t^T
    dr_t = S_{t-1} do_t        dk_t = R_t v_t + u q_t (v_t . do_t)        dv_t = R_t^T k_t + (q_t . u k_t) do_t

S is never needed together with R: dr is a sweep from left to right, dk and dv are one from right to left
(kernels/recurrent.py). The gradient of the decay follows from them,

    dg_t = sum_{s >= t} (r_s dr_s - k_s R_s v_s) + sum_v S_T dS_T        with a bonus s > t for the reads

Adding to g_t is scaling S_{t-1}: what later tokens read of it grows, and the state at the end, less what was written
on the way. The terms of a token's own key cancel and are left out, so that the sum is as small as its terms when
decays are strong. The terms of a whole segment sum to zero, so nothing has to be cut. The start of a segment is
d_t = r_t = 0.
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
    log_decay: Float[Array, "..."],
    *,
    bonus: Float[Array, "H K"] | None,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`. Computes in the state's dtype; copies q and k for every head of v."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    log_decay = jnp.broadcast_to(log_decay, (*v.shape[:3], log_decay.shape[3]))
    starts = None if segment_ids is None else segment_starts(segment_ids)[:, :, None, None]
    return attend(q, k, v, log_decay, bonus, initial_state, starts, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attend(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    starts: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """q, k [B, T, H, K]; v [B, T, H, V]; log_decay [B, T, H, K|1]; bonus [H, K]; starts [B, T, 1, 1]."""
    dtype = initial_state.dtype
    q, k, v32 = (x.astype(dtype) for x in (scale * q.astype(dtype), k, v))
    decay = decays(log_decay, starts, dtype)
    if bonus is None:  # a read after the write has the token's own key in it

        def step(state, q, k, v, decay):
            state = scaled(state, decay) + outer(k, v)
            return state, (read(state, q),)

        (out,), final_state = sweep(step, initial_state, (q, k, v32, decay))
        return out.astype(v.dtype), final_state

    def step(state, k, v, decay, next_r):
        state = scaled(state, decay) + outer(k, v)
        return state, (read(state, next_r),)

    r = scaled(q, read_gate(decay, bonus, starts))
    (out,), final_state = sweep(step, initial_state, (k, v32, decay), (r,))
    out = shift(out, read(initial_state, r[:, 0])) + dot(q, bonus.astype(dtype) * k) * v32
    return out.astype(v.dtype), final_state


def attend_forward(*args: Any) -> tuple[Any, ...]:
    return attend(*args), args[:-1]


def attend_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    *operands, log_decay, bonus, initial_state, starts = residuals
    dtype = initial_state.dtype
    q, k, v, do, end = (x.astype(dtype) for x in (*operands, *cotangents))
    decay = decays(log_decay, starts, dtype)
    gate = read_gate(decay, bonus, starts)
    do, r = scale * do, scaled(q, gate)

    def add(state, k, v, decay, next_do):
        state = scaled(state, decay) + outer(k, v)
        return state, (read_transposed(state, next_do),)

    (dr,), final_state = sweep(add, initial_state, (k, v, decay), (do,))
    dr = shift(dr, read_transposed(initial_state, do[:, 0]))

    def add_reads(grad, r, do, decay, next_k, next_v):
        grad = scaled(grad, decay) + outer(r, do)
        return grad, (read(grad, next_k), read_transposed(grad, next_v))

    (dv, dk), d_initial_state = sweep(add_reads, end, (r, do, decay), (k, v), reverse=True)
    dv = shift(dv, read(end, k[:, -1]), reverse=True)
    dk = shift(dk, read_transposed(end, v[:, -1]), reverse=True)

    reads = r * dr if bonus is None else shift(r * dr, jnp.zeros_like(dr[:, 0]), reverse=True)
    d_log_decay = log_decay_gradient(reads - k * dk, final_state * end, starts, log_decay)
    uq, uk = (q, k) if bonus is None else (bonus.astype(dtype) * q, bonus.astype(dtype) * k)
    v_do = dot(v, do)
    gradients = (scaled(dr, gate) + v_do * uk, dk + v_do * uq, dv + dot(q, uk) * do)
    gradients = (x.astype(operand.dtype) for x, operand in zip(gradients, operands, strict=True))
    d_bonus = None if bonus is None else jnp.sum(q * k * v_do, axis=(0, 1)).astype(bonus.dtype)
    return *gradients, d_log_decay, d_bonus, d_initial_state, None


attend.defvjp(attend_forward, attend_backward)


def read_gate(decay: Array, bonus: Array | None, starts: Array | None) -> Array | None:
    """r_t / q_t, None for 1."""
    if bonus is None:
        return decay
    return None if starts is None else (~starts).astype(decay.dtype)
