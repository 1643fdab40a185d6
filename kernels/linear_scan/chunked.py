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

and what is kept for it is h, the output. Complex decays are kept too: a loop takes exp of real ones as it needs them,
but the sines and cosines of complex ones cost more than all the rest.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.array_typing import Array, Inexact, Int
from kernels.segments import segment_starts


def chunked(
    x: Inexact[Array, "B T D"],
    log_decay: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    *,
    initial_state: Inexact[Array, "B D"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
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
    return _forward(x, log_decay, initial_state, starts, chunk_size)[0]


def _forward(x, log_decay, initial_state, starts, chunk_size):
    kept = jnp.exp(log_decay) if jnp.iscomplexobj(log_decay) else log_decay
    h, final_state = _run(x, kept, initial_state, starts, chunk_size, reverse=False)
    return (h, final_state), (h, kept, initial_state, starts)


def _backward(chunk_size, residuals, gradients):
    h, kept, initial_state, starts = residuals
    dh, dfinal = gradients
    dx, dinitial = _run(dh, kept, dfinal, starts, chunk_size, reverse=True)
    previous = jnp.concatenate([initial_state[:, None], h[:, :-1].astype(initial_state.dtype)], 1)
    dlog_decay = _decay(kept, starts) * dx * previous
    if kept.ndim == 1:
        dlog_decay = dlog_decay.sum((0, 1))
    return dx, dlog_decay, dinitial, None


_scan.defvjp(_forward, _backward)


def _decay(kept, starts):
    decay = kept if jnp.iscomplexobj(kept) else jnp.exp(kept)
    return decay if starts is None else jnp.where(starts, 0, decay)


def _run(x, kept, state, starts, chunk_size, reverse):
    """Scan [B, T, D] in chunks from `state`, in either direction: every output, and the state past the end."""
    B, T, D = x.shape
    split = (B, T // chunk_size, chunk_size, -1)
    x = x.reshape(split)  # [B, N, C, D]
    if kept.ndim == 3:
        kept = kept.reshape(split)
    elif starts is None:
        kept = kept[None, None]
    starts = None if starts is None else starts.reshape(split)

    def step(i, state):  # state [B, N, D]
        t = chunk_size - 1 - i if reverse else i
        at = functools.partial(lax.dynamic_index_in_dim, index=t, axis=2, keepdims=False)
        decay = _decay(at(kept) if kept.ndim == 4 else kept, None if starts is None else at(starts))
        x_t = at(x).astype(state.dtype)
        if reverse:
            u = state + x_t
            return t, decay, u, decay * u
        h = decay * state + x_t
        return t, decay, h, h

    def step_alone(i, carry):
        state, total = carry
        _, decay, _, state = step(i, state)
        return state, decay * total

    def step_writing(i, carry):
        state, out = carry
        t, _, out_t, state = step(i, state)
        return state, lax.dynamic_update_index_in_dim(out, out_t.astype(out.dtype), t, 2)

    if split[1] == 1:
        before = state[:, None]
    else:
        zeros = jnp.zeros(x.shape[:2] + (D,), state.dtype)
        local, total = lax.fori_loop(0, chunk_size, step_alone, (zeros, zeros + 1))  # [B, N, D]
        combine = lambda carry, chunk: (chunk[0] * carry + chunk[1], carry)  # noqa: E731
        chunks = (jnp.moveaxis(total, 1, 0), jnp.moveaxis(local, 1, 0))
        before = jnp.moveaxis(lax.scan(combine, state, chunks, reverse=reverse)[1], 0, 1)
    state, out = lax.fori_loop(0, chunk_size, step_writing, (before, jnp.zeros_like(x)))
    return out.reshape(B, T, D), state[:, 0 if reverse else -1]
