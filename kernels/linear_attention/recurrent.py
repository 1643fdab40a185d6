"""Linear attention token by token, with a backward pass that keeps no states: the fastest form on a CPU.

With d_t = exp(g_t), and r_t = d_t q_t (or q_t with a bonus), everything is a read of the state before token t,

    o_t = S_{t-1}^T r_t + (q_t . u k_t) v_t        S_t = diag(d_t) S_{t-1} + k_t v_t^T

(u = 1 without a bonus), and so is its transpose, with R_t the gradient of S_t from all later tokens:

    R_{t-1} = diag(d_t) R_t + r_t do_t^T
    dr_t = S_{t-1} do_t        dk_t = R_t v_t + u q_t (v_t . do_t)        dv_t = R_t^T k_t + (q_t . u k_t) do_t

S is never needed together with R, so each gradient is one sweep that carries one state: dr from left to right, dk
and dv from right to left. The gradient of the decay follows from them (`log_decay_gradient`). A sweep's step is one
elementwise update and one vector-matrix product along the rows of a state that stays in the cache; dr and dk
carry their state transposed for that. The start of a segment is d_t = r_t = 0.

Sequences are independent: blocks of them, as many as the cache holds the states of, run one after the other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.array_typing import Array, Float, Int
from kernels.linear_attention import specs
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
    batch, time, num_heads, value_dim = v.shape
    key_dim = q.shape[-1]
    batch_block, head_block = specs.state_block(batch, num_heads, key_dim * value_dim)
    blocks = (batch // batch_block, batch_block, num_heads // head_block, head_block)

    def sequences(x):  # [B|1, T|1, heads, X] -> [blocks, T, sequences of a block, X]
        x = jnp.repeat(x, num_heads // x.shape[2], axis=2)
        x = jnp.broadcast_to(x, (batch, time, *x.shape[2:]))
        x = x.reshape(*blocks[:2], time, *blocks[2:], x.shape[-1]).transpose(0, 3, 2, 1, 4, 5)
        return x.reshape(-1, time, batch_block * head_block, x.shape[-1])

    state = initial_state.reshape(*blocks, key_dim, value_dim).transpose(0, 2, 1, 3, 4, 5)
    state = state.reshape(-1, batch_block * head_block, key_dim, value_dim)
    u = None if bonus is None else sequences(bonus[None, None])[:, 0]
    starts = None if segment_ids is None else sequences(segment_starts(segment_ids)[:, :, None, None])
    out, state = attend(*map(sequences, (q, k, v, log_decay)), u, state, starts, scale)
    out = out.reshape(blocks[0], blocks[2], time, blocks[1], blocks[3], value_dim).transpose(0, 3, 2, 1, 4, 5)
    state = state.reshape(blocks[0], blocks[2], blocks[1], blocks[3], key_dim, value_dim).transpose(0, 2, 1, 3, 4, 5)
    return out.reshape(v.shape), state.reshape(initial_state.shape)


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
    """All with a leading axis of blocks: q, k [T, N, K]; v [T, N, V]; log_decay [T, N, K|1]; bonus [N, K];
    initial_state [N, K, V]; starts [T, N, 1]."""
    args = (q, k, v, log_decay, bonus, initial_state, starts)
    return jax.lax.map(lambda args: attend_block(*args, scale), args)


def attend_forward(*args: Any) -> tuple[Any, ...]:
    out, final_state = attend(*args)
    return (out, final_state), (*args[:-1], final_state)


def attend_backward(
    scale: float, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]
) -> tuple[Array | None, ...]:
    gradients = jax.lax.map(lambda args: attend_block_backward(*args, scale), (*residuals, *cotangents))
    return *gradients, None


attend.defvjp(attend_forward, attend_backward)


def attend_block(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    starts: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    dtype = initial_state.dtype
    decay, read_gate = gates(log_decay, bonus, starts, dtype)
    if bonus is None:  # a read after the write has the token's own key in it
        out, final_state = sweep(k, v, decay, q, initial_state, read_after=True)
        return (scale * out).astype(v.dtype), final_state
    out, final_state = sweep(k, v, decay, read_gate * q.astype(dtype), initial_state)
    own = jnp.sum(q.astype(dtype) * bonus.astype(dtype) * k.astype(dtype), axis=-1, keepdims=True)
    return (scale * (out + own * v.astype(dtype))).astype(v.dtype), final_state


def attend_block_backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    bonus: Array | None,
    initial_state: Array,
    starts: Array | None,
    final_state: Array,
    d_out: Array,
    d_final_state: Array,
    scale: float,
) -> tuple[Array | None, ...]:
    dtype = initial_state.dtype
    q32, k32, v32 = (x.astype(dtype) for x in (q, k, v))
    d_out, d_final_state = scale * d_out.astype(dtype), d_final_state.astype(dtype)
    decay, read_gate = gates(log_decay, bonus, starts, dtype)
    u = jnp.ones((), dtype) if bonus is None else bonus.astype(dtype)
    r = read_gate * q32

    dr, _ = sweep(v, k, decay, d_out, initial_state.mT, decay_columns=True)
    dk, _ = sweep(d_out, r, decay, v, d_final_state.mT, decay_columns=True, reverse=True)
    dv, d_initial_state = sweep(r, d_out, decay, k, d_final_state, reverse=True)

    own = jnp.sum(v32 * d_out, axis=-1, keepdims=True)
    d_log_decay = log_decay_gradient(r * dr, k32 * dk, final_state * d_final_state, bonus, starts, log_decay)
    d_bonus = None if bonus is None else jnp.sum(q32 * k32 * own, axis=0).astype(bonus.dtype)
    dq = read_gate * dr + u * k32 * own
    dk = dk + u * q32 * own
    dv = dv + jnp.sum(q32 * u * k32, axis=-1, keepdims=True) * d_out
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_log_decay, d_bonus, d_initial_state


def gates(log_decay: Array, bonus: Array | None, starts: Array | None, dtype: DTypeLike) -> tuple[Array, Array]:
    """What a token leaves of the state, and how q reads the state before it."""
    decay = jnp.exp(log_decay.astype(dtype))
    decay = decay if starts is None else jnp.where(starts, 0, decay)
    if bonus is None:
        return decay, decay
    return decay, jnp.ones((), dtype) if starts is None else (~starts).astype(dtype)


def sweep(
    a: Array,
    b: Array,
    decay: Array,
    read: Array,
    state: Array,
    *,
    decay_columns: bool = False,
    read_after: bool = False,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """Reads of S <- decay S + a b^T: read_t . S before the update with token t (or after it), and the last S.

    a, read [T, N, I]; b [T, N, J]; decay [T, N, I|1], or [T, N, J|1] of the state's columns; state [N, I, J].
    """
    if not read_after:  # read for the next token: XLA updates a state in place only if nothing reads the old one
        first = jnp.einsum("ni,nij->nj", read[-1 if reverse else 0].astype(state.dtype), state, precision="highest")
        read = shift(read, jnp.zeros_like(read[0]), reverse=not reverse)

    def step(state, xs):
        a, b, decay, read = (x.astype(state.dtype) for x in xs)
        state = state * (decay[:, None, :] if decay_columns else decay[:, :, None]) + a[:, :, None] * b[:, None, :]
        return state, jnp.einsum("ni,nij->nj", read, state, precision="highest")

    last, out = jax.lax.scan(step, state, (a, b, decay, read), reverse=reverse)
    return out if read_after else shift(out, first, reverse), last


def shift(x: Array, first: Array, reverse: bool) -> Array:
    """x one token later (earlier, in reverse), with `first` in the place set free."""
    return jnp.concatenate([x[1:], first[None]] if reverse else [first[None], x[:-1]])


def log_decay_gradient(
    reads: Array, writes: Array, end: Array, bonus: Array | None, starts: Array | None, log_decay: Array
) -> Array:
    """d log_decay_t = sum_{s >= t} (r_s dr_s - k_s dk_s) + sum_v S_T dS_T; with a bonus s > t for the reads.

    Adding to g_t is scaling S_{t-1}: what later tokens read of it grows, and the state at the end, less what was
    written on the way. The terms of a token's own key cancel and are left out, so that the sum is as small as its
    terms when decays are strong. The terms of a whole segment sum to zero, so nothing has to be cut.
    """
    if log_decay.shape[-1] == 1:
        reads, writes = (jnp.sum(x, axis=-1, keepdims=True) for x in (reads, writes))
        end = jnp.sum(end, axis=-2, keepdims=True)
    if bonus is not None:
        reads = shift(reads, jnp.zeros_like(reads[0]), reverse=True)
    sums = suffix_sums(reads - writes) + jnp.sum(end, axis=-1)
    return (sums if starts is None else jnp.where(starts, 0, sums)).astype(log_decay.dtype)


def suffix_sums(x: Array, block_size: int = 64) -> Array:
    """Sums over axis 0 from each token to the end: token by token in all blocks at once, then over blocks."""
    time, *rest = x.shape
    size = min(block_size, time)
    blocks = jnp.pad(x, ((0, -time % size), (0, 0), (0, 0))).reshape(-1, size, *rest)

    def add(i, carry):
        sums, total = carry
        total = total + jax.lax.dynamic_index_in_dim(sums, size - 1 - i, axis=1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, total, size - 1 - i, axis=1), total

    inside, totals = jax.lax.fori_loop(0, size, add, (blocks, jnp.zeros_like(blocks[:, 0])))
    later = jax.lax.cumsum(shift(totals, jnp.zeros_like(totals[0]), reverse=True), axis=0, reverse=True)
    return (inside + later[:, None]).reshape(-1, *rest)[:time]
