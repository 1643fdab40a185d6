"""The general delta rule in chunks of C tokens, as delta_rule/chunked.py. Plain XLA.

Within a chunk, with S at its start and S' at its end, G_i the log-decays from its start to token i, G_i- those before
it, and G' to its end:

    (I - A_b) U = (A e^G-) S + A_k V              A_b_ij = a_i e^(G_i- - G_j) . b_j, j < i; A_k with k
    O           = (Q e^G) S + P_b U + P_k V       P_b_ij = q_i e^(G_i - G_j) . b_j, j <= i; P_k with k
    S'          = diag(e^G') S + (B e^(G' - G))^T U + (K e^(G' - G))^T V

u_i = S_{i-1}^T a_i is a read of the state before token i, as a bonus has in linear attention. q reads after it; as
q e^g it reads before it, too, but for what the token itself writes, (q_i . b_i) u_i + (q_i . k_i) v_i: one set of sums
of log-decays serves both.

In the backward pass, with F = dU from all that reads U,

    F = P_b^T dO + (B e^(G' - G)) dS'      E = (I - A_b)^-T F      dS = diag(e^G') dS' + (Q e^G)^T dO + (A e^G-)^T E

and E U^T and E V^T, below the diagonal, are the gradients of A_b and A_k. That of g_t sums q dq of tokens from t on and
a da of those after it, less b db and k dk from t on, without a token's own products.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.chunks import (
    DecaySums,
    Layout,
    decay_sums,
    in_pieces,
    log_decay_gradient,
    of_next_token,
    own_scores,
    read_gate,
    reads,
    score_gradients,
    scores,
    writes,
)
from kernels.delta_rule import specs
from kernels.delta_rule.inverse import unit_lower_inverse
from kernels.precision import dot


def chunked(
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
    """Arguments as in `reference`; `chunk_size` is rounded up to a power of two."""
    time, heads = v.shape[1:3]
    layout = Layout.of(time, specs.chunk_size(time, chunk_size), heads)
    arrays = tuple(map(layout.chunks, (q, k, v, a, b, log_decay)))
    starts = None if segment_ids is None else layout.starts(segment_ids)

    def piece(arrays, state):
        return correct(*arrays, state, scale)

    out, state = in_pieces(piece, layout.pieces, (*arrays, starts), initial_state[:, :, None])
    return layout.tokens(out), state[:, :, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def correct(
    q: Array,
    k: Array,
    v: Array,
    a: Array,
    b: Array,
    g: Array,
    starts: Array | None,
    initial_state: Array,
    scale: float,
) -> tuple[Array, Array]:
    """q, k, a, b, g [N, B, H, 1, C, K]; v [N, B, H, 1, C, V]; initial_state [B, H, 1, K, V]."""
    chunk = prepare(q, k, v, a, b, g, starts)
    u, state, final_state = states(chunk, k, v, a, b, initial_state)
    out = dot("...ij,...jv->...iv", chunk.attention, pair(u, v), like=v)
    out = jnp.sum(out, axis=3, keepdims=True) + dot("...ck,...kv->...cv", reads(chunk.sums, chunk.q), state, like=v)
    return (scale * out).astype(v.dtype), final_state


def correct_forward(*args: Any) -> tuple[Any, ...]:
    return correct(*args), args[:-1]


def correct_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    q, k, v, a, b, g, starts, initial_state = residuals
    dtype = initial_state.dtype
    d_out, d_final_state = scale * cotangents[0].astype(dtype), cotangents[1].astype(dtype)
    chunk = prepare(q, k, v, a, b, g, starts)
    u, state, final_state = states(chunk, k, v, a, b, initial_state)
    end = jnp.concatenate([state[1:], final_state[None]])
    from_out = dot("...ij,...iv->...jv", chunk.attention, d_out, like=v)
    e, d_end, d_initial_state = state_gradients(chunk, a, b, from_out[:, :, :, :1], d_out, d_final_state, like=v)

    sums, written, values = chunk.sums, pair(b, k), pair(u, v)
    da, d_writes = score_gradients(sums, a, written, values.astype(v.dtype), e)
    dq, more = score_gradients(sums, chunk.q, written, values.astype(v.dtype), d_out)
    da, dq = (jnp.sum(x, axis=3, keepdims=True) for x in (da, dq))
    da += read_gate(sums) * dot("...cv,...kv->...ck", e, state, like=v)
    dq += read_gate(sums) * dot("...cv,...kv->...ck", d_out, state, like=v)
    d_writes += more + jnp.exp(sums.write) * dot("...cv,...kv->...ck", values, d_end, like=v)
    dv = from_out[:, :, :, 1:] + dot("...ij,...iv->...jv", chunk.a_k, e, like=v)
    dv += dot("...ck,...kv->...cv", writes(sums, k), d_end, like=v)

    read, write = chunk.q * dq + of_next_token(a * da), jnp.sum(written * d_writes, axis=3, keepdims=True)
    d_log_decay = log_decay_gradient(read, write, end * d_end, starts, g)
    own = jnp.sum(values * d_out, axis=-1, keepdims=True)
    dq = jnp.exp(g.astype(dtype)) * dq + jnp.sum(own * written, axis=3, keepdims=True)
    db, dk = jnp.split(d_writes + own * q, 2, axis=3)
    gradients = (x.astype(y.dtype) for x, y in zip((dq, dk, dv, da, db), residuals, strict=False))
    return *gradients, d_log_decay, None, d_initial_state


correct.defvjp(correct_forward, correct_backward)


class Chunk(NamedTuple):
    """What needs no state: sums of log-decays, Q e^g, P_b and P_k, A_k, (I - A_b)^-1."""

    sums: DecaySums
    q: Array
    attention: Array
    a_k: Array
    inverse: Array


def pair(x: Array, y: Array) -> Array:
    """Two that a token writes, as a group of two heads that one key reads: [N, B, H, 2, C, X] of x's dtype."""
    return jnp.concatenate([x, y.astype(x.dtype)], axis=3)


def prepare(q: Array, k: Array, v: Array, a: Array, b: Array, g: Array, starts: Array | None) -> Chunk:
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    sums = decay_sums(g, starts, before=True)
    decayed = jnp.exp(g.astype(dtype)) * q
    written = pair(b, k)
    attention = scores(sums, decayed, written, like=v) + own_scores(q, written, None)
    a_b, a_k = jnp.split(jnp.broadcast_to(scores(sums, a, written, like=sums.read), attention.shape), 2, axis=3)
    return Chunk(sums, decayed, attention, a_k, unit_lower_inverse(-a_b))


def states(chunk: Chunk, k: Array, v: Array, a: Array, b: Array, initial_state: Array) -> tuple[Array, Array, Array]:
    """U, the states at the chunks' starts, [N, B, H, 1, K, V], and the last."""
    right = dot("...ij,...jv->...iv", chunk.a_k, v, like=initial_state)
    updates = dot("...ck,...cv->...kv", writes(chunk.sums, k), v, like=initial_state)

    def step(state, xs):
        inverse, a, b, decay, right, update = xs
        right += dot("...ck,...kv->...cv", a, state, like=state)
        u = dot("...ij,...jv->...iv", inverse, right, like=state)
        return decay.mT * state + update + dot("...ck,...cv->...kv", b, u, like=state), (u, state)

    final_state, (u, state) = jax.lax.scan(step, initial_state, (*gated(chunk, a, b), right, updates))
    return u, state, final_state


def state_gradients(
    chunk: Chunk, a: Array, b: Array, d_u: Array, d_out: Array, d_final_state: Array, like: Array
) -> tuple[Array, Array, Array]:
    """E, the gradients of the states at the chunks' ends, and of the initial one."""
    d_reads = dot("...ck,...cv->...kv", reads(chunk.sums, chunk.q), d_out, like=like)

    def step(d_state, xs):
        inverse, a, b, decay, d_u, d_read = xs
        d_u += dot("...ck,...kv->...cv", b, d_state, like=d_state)
        e = dot("...ij,...iv->...jv", inverse, d_u, like=d_state)
        return decay.mT * d_state + d_read + dot("...ck,...cv->...kv", a, e, like=d_state), (e, d_state)

    xs = (*gated(chunk, a, b), d_u, d_reads)
    d_initial_state, (e, d_end) = jax.lax.scan(step, d_final_state, xs, reverse=True)
    return e, d_end, d_initial_state


def gated(chunk: Chunk, a: Array, b: Array) -> tuple[Array, ...]:
    """The inverse; A as it reads the state at a chunk's start, B as it writes the one at its end, what that keeps."""
    return chunk.inverse, reads(chunk.sums, a), writes(chunk.sums, b), jnp.exp(chunk.sums.total)
