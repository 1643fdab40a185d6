"""The recurrence in XLA: chunks of time side by side, and inside a chunk a loop that reads and writes in place.

    h_t = a_t h_{t-1} + x_t,   a_t = exp(g_t), 0 where a segment starts

The row is cut into N chunks of C tokens. The chunks' states come first: each chunk is scanned from zero, keeping only
its last state s_n and its decay A_n = prod a_t, and S_n = A_n S_{n-1} + s_n. Then every chunk is scanned again from
the state before it. Only decays that are <= 1 are multiplied, so any log-decay is safe.

A loop over time that updates its output in place moves each element once. On a CPU nothing beats it, so one chunk is
the whole row there; devices that pay for each step take about sqrt(T) tokens a chunk.

Backward is the same loop from right to left. With u_t the gradient of h_t through everything later,

    w_t = a_t u_t,   u_t = dh_t + w_{t+1},   w_{T+1} = dS
    dx_t = u_t,      dg_t = w_t h_{t-1},     dh_0 = w_1

and the only thing kept for it is h, the output.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.segments import segment_starts


def chunked(x, log_decay, *, initial_state, segment_ids, chunk_size):
    """h [B, T, D] and the final state; see `linear_scan`."""
    T = x.shape[1]
    if chunk_size is None:
        chunk_size = T if dispatch.device().platform == "cpu" else 8 * math.ceil(math.sqrt(T) / 8)
    padding = -T % min(chunk_size, T)
    starts = None if segment_ids is None else segment_starts(segment_ids)[..., None]  # [B, T, 1]
    if padding:  # tokens of input 0 and decay 1 leave the state alone
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        shape = (x.shape[0], T, x.shape[2])
        log_decay = jnp.pad(jnp.broadcast_to(log_decay, shape), ((0, 0), (0, padding), (0, 0)))
        starts = None if starts is None else jnp.pad(starts, ((0, 0), (0, padding), (0, 0)))
    h, final_state = _scan(x, log_decay, initial_state, starts, min(chunk_size, T))
    return h[:, :T], final_state


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _scan(x, log_decay, initial_state, starts, chunk_size):
    return _run(x, log_decay, initial_state, starts, chunk_size, reverse=False)


def _forward(x, log_decay, initial_state, starts, chunk_size):
    h, final_state = _run(x, log_decay, initial_state, starts, chunk_size, reverse=False)
    return (h, final_state), (h, log_decay, initial_state, starts)


def _backward(chunk_size, residuals, gradients):
    h, log_decay, initial_state, starts = residuals
    dh, dfinal = gradients
    dx, dinitial = _run(dh, log_decay, dfinal, starts, chunk_size, reverse=True)
    previous = jnp.concatenate([initial_state[:, None], h[:, :-1].astype(initial_state.dtype)], 1)
    dlog_decay = _decay(log_decay, starts) * dx * previous
    if log_decay.ndim == 1:
        dlog_decay = dlog_decay.sum((0, 1))
    return dx, dlog_decay, dinitial, None


_scan.defvjp(_forward, _backward)


def _decay(log_decay, starts):
    return jnp.exp(log_decay) if starts is None else jnp.where(starts, 0, jnp.exp(log_decay))


def _run(x, log_decay, state, starts, chunk_size, reverse):
    """Scan [B, T, D] in chunks from `state`, in either direction: every output, and the state past the end."""
    B, T, D = x.shape
    split = (B, T // chunk_size, chunk_size, -1)
    x = x.reshape(split)  # [B, N, C, D]
    if log_decay.ndim == 3:
        log_decay = log_decay.reshape(split)
    elif starts is None:
        log_decay = log_decay[None, None]
    starts = None if starts is None else starts.reshape(split)

    def step(i, state):  # state [B, N, D]
        t = chunk_size - 1 - i if reverse else i
        at = functools.partial(lax.dynamic_index_in_dim, index=t, axis=2, keepdims=False)
        decay = _decay(at(log_decay) if log_decay.ndim == 4 else log_decay, None if starts is None else at(starts))
        x_t = at(x).astype(state.dtype)
        if reverse:
            u = state + x_t
            return t, u, decay * u
        h = decay * state + x_t
        return t, h, h

    def step_writing(i, carry):
        state, out = carry
        t, out_t, state = step(i, state)
        return state, lax.dynamic_update_index_in_dim(out, out_t.astype(out.dtype), t, 2)

    if split[1] == 1:
        before = state[:, None]
    else:
        zeros = jnp.zeros(x.shape[:2] + (D,), state.dtype)
        local = lax.fori_loop(0, chunk_size, lambda i, state: step(i, state)[2], zeros)  # [B, N, D]
        total = _total_decay(log_decay, starts, chunk_size, local)
        combine = lambda carry, chunk: (chunk[0] * carry + chunk[1], carry)  # noqa: E731
        chunks = (jnp.moveaxis(total, 1, 0), jnp.moveaxis(local, 1, 0))
        before = jnp.moveaxis(lax.scan(combine, state, chunks, reverse=reverse)[1], 0, 1)
    state, out = lax.fori_loop(0, chunk_size, step_writing, (before, jnp.zeros_like(x)))
    return out.reshape(B, T, D), state[:, 0 if reverse else -1]


def _total_decay(log_decay, starts, chunk_size, like):
    total = jnp.exp(log_decay.sum(2) if log_decay.ndim == 4 else log_decay * chunk_size)
    total = jnp.broadcast_to(total, like.shape)
    return total if starts is None else jnp.where(starts.any(2), 0, total)
