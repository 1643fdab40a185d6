"""The delta rule in chunks of C tokens: matmuls within a chunk, a scan of states over chunks. Plain XLA.

Within a chunk, with S at its start and S' at its end, G_i the log-decays from its start to token i and G' to its end:

    (I + A) U = diag(b) (V - (K e^G) S)             A_ij = b_i k_i e^(G_i - G_j) . k_j, j < i
    O         = (Q e^G) S + P U                     P_ij = q_i e^(G_i - G_j) . k_j, j <= i
    S'        = diag(e^G') S + (K e^(G' - G))^T U

U holds what each token corrects, u_i = b_i (v_i - S_i^T k_i) of the state S_i that it finds, decayed by its own g_i. A
and P have decays between two tokens, which kernels/chunks.py makes without a positive exponent; a scalar one
multiplies what is read or written, so that heads of v that share q and k share K S, K^T U, K K^T and Q K^T too.

(I + A)^-1 needs no state: it is made for all chunks at once (inverse.py), and the scan takes three matmuls a chunk.
Applying it to diag(b) V and diag(b) K e^G beforehand would leave two, U = U_0 - W S, for more work in all and no more
digits.

The backward pass computes inverse, U and states again. With F = dU from all that reads U, the transposed scan is

    F = P^T dO + (K e^(G' - G)) dS'      E = (I + A)^-T F      dS = diag(e^G') dS' + (Q e^G)^T dO - (K e^G)^T diag(b) E

and -E U^T, below the diagonal, is the gradient of A without its b. A key is read (through A, and with S) and written.
The gradient of g sums q dq + k dk_read - k dk_write over later tokens, as in linear attention: a token's own q_i . k_i
is in both sides and left out, so that strong decays keep their digits.

All that enters the state is computed in float32 whatever the operands are: a correction answers to what was read, so
that a rounding of the read is written back. Products that only leave, O and gradients, are of v's dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.chunks import (
    DecaySums,
    Layout,
    all_scores,
    decay_sums,
    in_pieces,
    log_decay_gradient,
    score_gradients,
    scores,
    sum_to,
)
from kernels.delta_rule import specs
from kernels.delta_rule.inverse import unit_lower_inverse
from kernels.precision import dot


def chunked(
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
    """Arguments as in `reference`; `chunk_size` is rounded up to a power of two."""
    batch, time, _, value_dim = v.shape
    groups, key_dim = q.shape[2:]
    layout = Layout.of(time, specs.chunk_size(time, chunk_size), groups)
    arrays = jax.tree.map(layout.chunks, (q, k, v, beta[..., None], log_decay))
    starts = None if segment_ids is None else layout.starts(segment_ids)
    state = initial_state.reshape(batch, groups, -1, key_dim, value_dim)

    def piece(arrays, state):
        return correct(*arrays, state, scale)

    out, state = in_pieces(piece, layout.pieces, (*arrays, starts), state)
    return layout.tokens(out), state.reshape(initial_state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def correct(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None,
    starts: Array | None,
    initial_state: Array,
    scale: float,
) -> tuple[Array, Array]:
    """q, k [N, B, G, 1, C, K]; v [N, B, G, R, C, V]; beta, g [N, B, G, R, C, 1|K]; initial_state [B, G, R, K, V]."""
    sums, inverse = prepare(k, beta, g, starts)
    u, state, final_state = states(sums, inverse, k, v, beta, initial_state)
    attention = all_scores(sums, q, k, None)
    out = dot("...ij,...jv->...iv", attention, u, like=v) + read(jnp.exp(sums.read), q, state, like=v)
    return (scale * out).astype(v.dtype), final_state


def correct_forward(*args: Any) -> tuple[Any, ...]:
    return correct(*args), args[:-1]


def correct_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    q, k, v, beta, g, starts, initial_state = residuals
    dtype = initial_state.dtype
    d_out, d_final_state = scale * cotangents[0].astype(dtype), cotangents[1].astype(dtype)
    sums, inverse = prepare(k, beta, g, starts)
    u, state, final_state = states(sums, inverse, k, v, beta, initial_state)
    end = jnp.concatenate([state[1:], final_state[None]])
    e, d_end, d_initial_state = state_gradients(sums, inverse, q, k, beta, d_out, d_final_state, like=v)

    k32, b, written = k.astype(dtype), beta.astype(dtype), u.astype(v.dtype)
    dq, dk_write = score_gradients(sums, q, k, written, d_out)
    dk_read, more = score_gradients(sums, b * k32, k, written, -e)  # as yet without b
    dq += jnp.exp(sums.read) * dot("...cv,...kv->...ck", d_out, state, like=v)
    dk_read -= jnp.exp(sums.read) * dot("...cv,...kv->...ck", e, state, like=v)
    dk_write += more + jnp.exp(sums.write) * dot("...cv,...kv->...ck", u, d_end, like=v)
    d_beta = jnp.sum(e * v.astype(dtype), axis=-1, keepdims=True) + jnp.sum(k32 * dk_read, axis=-1, keepdims=True)
    dk_read = b * dk_read
    d_log_decay = None
    if g is not None:
        d_log_decay = log_decay_gradient(q * dq + k * dk_read, k * dk_write, end * d_end, starts, g)
    own = jnp.sum(u * d_out, axis=-1, keepdims=True)
    dq, dk = sum_to(dq + k32 * own, q), sum_to(dk_read + dk_write + q * own, k)
    return dq, dk, (b * e).astype(v.dtype), d_beta.astype(beta.dtype), d_log_decay, None, d_initial_state


correct.defvjp(correct_forward, correct_backward)


def prepare(k: Array, beta: Array, g: Array | None, starts: Array | None) -> tuple[DecaySums, Array]:
    """Sums of log-decays, and (I + A)^-1, [N, B, G, R, C, C]."""
    dtype = jnp.promote_types(k.dtype, jnp.float32)
    sums = decay_sums(jnp.zeros((*(1,) * 4, *beta.shape[-2:]), dtype) if g is None else g, starts)
    a = beta * scores(sums, k, k, like=sums.read if sums.pairs is None else k)
    return sums, unit_lower_inverse(jnp.broadcast_to(a, (*beta.shape[:-1], beta.shape[-2])))


def read(gate: Array, q: Array, state: Array, like: Array) -> Array:
    """(Q gate) S."""
    if gate.shape[-1] == 1:
        return gate * dot("...ck,...kv->...cv", q, state, like=like)
    return dot("...ck,...kv->...cv", gate * q, state, like=like)


def write(gate: Array, k: Array, u: Array, like: Array) -> Array:
    """(K gate)^T U."""
    if gate.shape[-1] == 1:
        return dot("...ck,...cv->...kv", k, gate * u, like=like)
    return dot("...ck,...cv->...kv", gate * k, u, like=like)


def states(
    sums: DecaySums, inverse: Array, k: Array, v: Array, beta: Array, initial_state: Array
) -> tuple[Array, Array, Array]:
    """U, the states at the chunks' starts, [N, B, G, R, K, V], and the last."""

    def step(state, xs):
        reads, writes, decay, inverse, k, v, beta = xs
        error = v - read(reads, k, state, like=state)
        u = dot("...ij,...jv->...iv", inverse, beta * error, like=state)
        return decay.mT * state + write(writes, k, u, like=state), (u, state)

    xs = (*gates(sums, len(v)), inverse, k, v, beta)
    final_state, (u, state) = jax.lax.scan(step, initial_state, xs)
    return u, state, final_state


def state_gradients(
    sums: DecaySums, inverse: Array, q: Array, k: Array, beta: Array, d_out: Array, d_final_state: Array, like: Array
) -> tuple[Array, Array, Array]:
    """E, the gradients of the states at the chunks' ends, and of the initial one."""
    attention = all_scores(sums, q, k, None)
    d_u = dot("...ij,...iv->...jv", attention, d_out, like=like)
    d_read = write(jnp.exp(sums.read), q, d_out, like=like)

    def step(d_state, xs):
        reads, writes, decay, inverse, k, beta, d_u, d_read = xs
        e = dot("...ij,...iv->...jv", inverse, d_u + read(writes, k, d_state, like=d_state), like=d_state)
        d_start = decay.mT * d_state + d_read - write(reads, k, beta * e, like=d_state)
        return d_start, (e, d_state)

    xs = (*gates(sums, len(k)), inverse, k, beta, d_u, d_read)
    d_initial_state, (e, d_end) = jax.lax.scan(step, d_final_state, xs, reverse=True)
    return e, d_end, d_initial_state


def gates(sums: DecaySums, chunks: int) -> list[Array]:
    """How the state at a chunk's start is read, how the one at its end is written, and what it keeps of the first."""
    return [jnp.broadcast_to(jnp.exp(x), (chunks, *x.shape[1:])) for x in (sums.read, sums.write, sums.total)]
