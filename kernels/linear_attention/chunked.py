"""Linear attention in chunks of C tokens: matmuls within a chunk, a scan of states over chunks. Plain XLA.

Names and the split into a read of earlier tokens and a token's own key are those of recurrent.py. Within a chunk,
with states S at its start and S' at its end, and all exponents sums of log-decays between two tokens:

    o_i  = (q_i e^read_i) S + sum_{j<i} A_ij v_j + (q_i . u k_i) v_i
    A_ij = sum_K q_i k_j e^(sum of g between j and i)
    S'   = diag(e^total) S + sum_j (k_j e^write_j) v_j^T

read_i sums g from the chunk's start to i, write_j from after j to its end. The sum between j and i is split at a
point m between them, e^(read_i from m) e^(write_j to m), which makes a matmul of it: at the middle of the chunk for
all pairs on both sides of it, then within each half in the same way, log2 C levels down to single tokens. A scalar
decay multiplies q_i . k_j instead, and its sums are made by matmuls with a matrix of zeros and ones. Every exponent
is built by adding log-decays, never as a difference of sums: none is positive, and a decay of -1e4, or of -1e30 where
a segment starts, takes no digits from its neighbours.

The backward pass computes the states again, then their gradients from right to left. A long sequence goes through in
pieces, each from the state the one before it left, so that what is computed for all chunks at once stays small.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.chunks import (
    DecaySums,
    Layout,
    all_scores,
    decay_sums,
    in_pieces,
    log_decay_gradient,
    of_next_token,
    read_gate,
    reads,
    score_gradients,
    sum_to,
    writes,
)
from kernels.linear_attention import specs
from kernels.precision import dot


def chunked(
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
    """Arguments as in `reference`; `chunk_size` is rounded up to a power of two.

    float32 matmuls run at full float32 precision on every platform; bfloat16 ones accumulate in float32.
    """
    batch, time, num_heads, value_dim = v.shape
    groups, key_dim = q.shape[2:]
    layout = Layout.of(time, specs.chunk_size(dispatch.device(), time, chunk_size), groups)
    if layout.padding:  # the padding must not decay
        log_decay = jnp.broadcast_to(log_decay, (log_decay.shape[0], time, *log_decay.shape[2:]))
    g = layout.chunks(log_decay)
    g = jnp.broadcast_to(g, (*g.shape[:4], layout.size, g.shape[5]))
    starts = None if segment_ids is None else layout.starts(segment_ids)
    u = None if bonus is None else bonus.reshape(groups, -1, 1, key_dim)
    state = initial_state.reshape(batch, groups, -1, key_dim, value_dim)

    def piece(arrays, state):
        q, k, v, g, starts = arrays
        return attend(q, k, v, g, u, state, starts, scale)

    out, state = in_pieces(piece, layout.pieces, (*map(layout.chunks, (q, k, v)), g, starts), state)
    return layout.tokens(out), state.reshape(initial_state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attend(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    bonus: Array | None,
    initial_state: Array,
    starts: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """q, k [N, B, G, 1, C, K]; v [N, B, G, R, C, V]; g [N|1, B|1, G, R, C, K|1]; state [B, G, R, K, V]."""
    sums = decay_sums(g, starts, before=bonus is not None)
    state, final_state = states(sums, k, v, initial_state)
    attention = all_scores(sums, q, k, bonus)
    out = dot("...ij,...jv->...iv", attention, v, like=v)
    out += dot("...ck,...kv->...cv", reads(sums, q), state, like=v)
    return (scale * out).astype(v.dtype), final_state


def attend_forward(*args: Any) -> tuple[Any, ...]:
    return attend(*args), args[:-1]


def attend_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    q, k, v, g, bonus, initial_state, starts = residuals
    dtype = initial_state.dtype
    d_out = scale * cotangents[0].astype(dtype)
    sums = decay_sums(g, starts, before=bonus is not None)
    state, _ = states(sums, k, v, initial_state)
    d_end, d_initial_state = state_gradients(sums, q, d_out, cotangents[1].astype(dtype), like=v)
    end = jnp.exp(sums.total).mT * state + dot("...ck,...cv->...kv", writes(sums, k), v, like=v)

    dq, dk = score_gradients(sums, q, k, v, d_out)
    dq += read_gate(sums) * dot("...cv,...kv->...ck", d_out, state, like=v)
    dk += jnp.exp(sums.write) * dot("...cv,...kv->...ck", v, d_end, like=v)
    attention = all_scores(sums, q, k, bonus)
    dv = dot("...ij,...iv->...jv", attention, d_out, like=v)
    dv += dot("...ck,...kv->...cv", writes(sums, k), d_end, like=v)

    q, k = q.astype(dtype), k.astype(dtype)
    read = q * dq if bonus is None else of_next_token(q * dq)
    d_log_decay = log_decay_gradient(read, k * dk, end * d_end, starts, g)
    own = jnp.sum(v.astype(dtype) * d_out, axis=-1, keepdims=True)
    u = jnp.ones((), dtype) if bonus is None else bonus.astype(dtype)
    d_bonus = None if bonus is None else sum_to(q * k * own, bonus)
    dq, dk = sum_to(dq + u * k * own, residuals[0]), sum_to(dk + u * q * own, residuals[1])
    return dq, dk, dv.astype(v.dtype), d_log_decay, d_bonus, d_initial_state, None


attend.defvjp(attend_forward, attend_backward)


def states(sums: DecaySums, k: Array, v: Array, initial_state: Array) -> tuple[Array, Array]:
    """The states at the chunks' starts, [N, B, G, R, K, V], and the last."""
    updates = dot("...ck,...cv->...kv", writes(sums, k), v, like=v)
    return scan_states(sums, updates, initial_state, reverse=False)


def state_gradients(sums: DecaySums, q: Array, d_out: Array, d_final_state: Array, like: Array) -> tuple[Array, Array]:
    """The gradients of the states at the chunks' ends, and of the initial one."""
    updates = dot("...ck,...cv->...kv", reads(sums, q), d_out, like=like)
    return scan_states(sums, updates, d_final_state, reverse=True)


def scan_states(sums: DecaySums, updates: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    decay = jnp.exp(sums.total).mT
    xs = jnp.broadcast_to(decay, (len(updates), *decay.shape[1:])), updates
    last, before = jax.lax.scan(lambda state, x: (x[0] * state + x[1], state), state, xs, reverse=reverse)
    return before, last
