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
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.linear_attention import specs
from kernels.precision import dot
from kernels.segments import segment_starts

PIECE = 64  # chunks that are computed at once
NOTHING_LEFT = -1e30  # a log-decay whose sums are finite: 0 times it is 0


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
    size = specs.chunk_size(dispatch.device(), time, chunk_size)
    chunks = -(-time // size)
    pieces = -(-chunks // PIECE)
    padding = -(-chunks // pieces) * pieces * size - time
    starts = None if segment_ids is None else segment_starts(segment_ids)[:, :, None, None]

    def to_chunks(x, heads):  # [B|1, T|1, heads, X] -> [B|1, G, heads/G, N|1, C|1, X]
        if x.shape[1] == time:
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
        x = x.reshape(x.shape[0], -1, min(size, x.shape[1]), groups, heads // groups, x.shape[-1])
        return x.transpose(0, 3, 4, 1, 2, 5)

    if padding:  # the padding must not decay
        log_decay = jnp.broadcast_to(log_decay, (log_decay.shape[0], time, *log_decay.shape[2:]))
    g = to_chunks(log_decay, num_heads)
    g = jnp.broadcast_to(g, (*g.shape[:4], size, g.shape[5]))
    if starts is not None:
        starts = jnp.broadcast_to(starts, (batch, time, groups, 1))
        starts = to_chunks(starts, groups)
    u = None if bonus is None else bonus.reshape(groups, -1, 1, 1, key_dim)
    state = initial_state.reshape(batch, groups, -1, key_dim, value_dim)
    q, k, v = to_chunks(q, groups), to_chunks(k, groups), to_chunks(v, num_heads)
    out, state = attend_in_pieces(pieces, q, k, v, g, u, state, starts, scale)
    out = out.transpose(0, 3, 4, 1, 2, 5).reshape(batch, -1, num_heads, value_dim)[:, :time]
    return out, state.reshape(initial_state.shape)


def attend_in_pieces(
    pieces: int,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    bonus: Array | None,
    initial_state: Array,
    starts: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """`attend`, the chunks in so many pieces, one after the other."""
    if pieces == 1:
        return attend(q, k, v, g, bonus, initial_state, starts, scale)

    def split(x):  # [..., N, C, X] -> [pieces, ..., N / pieces, C, X]
        return jnp.moveaxis(x.reshape(*x.shape[:3], pieces, -1, *x.shape[4:]), 3, 0)

    fixed = g.shape[3] == 1

    def piece(state, xs):
        q, k, v, starts, own_g = xs
        out, state = attend(q, k, v, g if fixed else own_g, bonus, state, starts, scale)
        return state, out

    xs = jax.tree.map(split, (q, k, v, starts, None if fixed else g))
    state, out = jax.lax.scan(piece, initial_state, xs)
    return jnp.moveaxis(out, 0, 3).reshape(v.shape), state


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
    """q, k [B, G, 1, N, C, K]; v [B, G, R, N, C, V]; g [B|1, G, R, N|1, C, K|1]; state [B, G, R, K, V]."""
    sums = decay_sums(g, bonus, starts)
    state, final_state = states(sums, k, v, initial_state)
    attention = scores(sums, q, k) + own_scores(q, k, bonus)
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
    sums = decay_sums(g, bonus, starts)
    state, _ = states(sums, k, v, initial_state)
    d_end, d_initial_state = state_gradients(sums, q, d_out, cotangents[1].astype(dtype), like=v)
    end = jnp.exp(sums.total).mT * state + dot("...ck,...cv->...kv", writes(sums, k), v, like=v)

    dq, dk = score_gradients(sums, q, k, v, d_out)
    dq += read_gate(sums) * dot("...cv,...kv->...ck", d_out, state, like=v)
    dk += jnp.exp(sums.write) * dot("...cv,...kv->...ck", v, d_end, like=v)
    attention = scores(sums, q, k) + own_scores(q, k, bonus)
    dv = dot("...ij,...iv->...jv", attention, d_out, like=v)
    dv += dot("...ck,...kv->...cv", writes(sums, k), d_end, like=v)

    q, k = q.astype(dtype), k.astype(dtype)
    d_log_decay = log_decay_gradient(q * dq, k * dk, end * d_end, bonus, starts, g)
    own = jnp.sum(v.astype(dtype) * d_out, axis=-1, keepdims=True)
    u = jnp.ones((), dtype) if bonus is None else bonus.astype(dtype)
    d_bonus = None if bonus is None else sum_to(q * k * own, bonus)
    dq, dk = sum_to(dq + u * k * own, residuals[0]), sum_to(dk + u * q * own, residuals[1])
    return dq, dk, dv.astype(v.dtype), d_log_decay, d_bonus, d_initial_state, None


attend.defvjp(attend_forward, attend_backward)


class DecaySums(NamedTuple):
    """Sums of log-decays in a chunk; of decays per key `levels` of (from the middle to i, from j to the middle), of
    scalar ones `pairs`, exp of what lies between j and i."""

    read: Array
    write: Array
    total: Array
    inside: Array | None  # where a bonus reads the state at all: not at a segment's start
    levels: Sequence[tuple[Array, Array]] = ()
    pairs: Array | None = None


def decay_sums(g: Array, bonus: Array | None, starts: Array | None) -> DecaySums:
    g = jnp.maximum(g.astype(jnp.promote_types(g.dtype, jnp.float32)), NOTHING_LEFT)
    if starts is not None:
        g = jnp.where(starts, NOTHING_LEFT, g)
    inside = None if bonus is None or starts is None else ~starts
    if g.shape[-1] == 1:
        return scalar_decay_sums(g, bonus, inside)
    total = g[..., None, :]  # blocks of one token: [..., blocks, tokens of a block, K]
    write = jnp.zeros_like(total)
    read = total if bonus is None else write  # a bonus reads before the token's own decay
    levels = []
    while total.shape[-3] > 1:
        (read1, read2), (write1, write2), (total1, total2) = halves(read), halves(write), halves(total)
        levels.append((read2, write1))
        read = jnp.concatenate([read1, total1 + read2], axis=-2)
        write = jnp.concatenate([write1 + total2, write2], axis=-2)
        total = total1 + total2
    return DecaySums(*(x[..., 0, :, :] for x in (read, write, total)), inside, levels)


def scalar_decay_sums(g: Array, bonus: Array | None, inside: Array | None) -> DecaySums:
    """By matmuls with zeros and ones, which add the same log-decays: levels of one number a token are slow on TPUs."""
    i, j = jnp.indices((g.shape[-2],) * 2)
    after, upto = (j > i), (j <= i if bonus is None else j < i)
    read, write = (dot("ij,...jk->...ik", ones, g, like=g) for ones in (upto, after))
    between = dot("ij,...jk->...ik", upto, jnp.where(i > j, g, 0), like=g)  # sums over (j, i]
    pairs = jnp.where(i > j, jnp.exp(between), 0)
    return DecaySums(read, write, jnp.sum(g, axis=-2, keepdims=True), inside, pairs=pairs)


def halves(blocks: Array) -> tuple[Array, Array]:
    """The first and the second of each two neighbouring blocks."""
    return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]


def split(x: Array, level: tuple[Array, Array]) -> tuple[Array, Array]:
    """The first and the second halves of a level's blocks of tokens: [..., blocks, tokens, X]."""
    size = level[0].shape[-2]
    return halves(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]))


def join(levels: list[Array]) -> Array:
    """[..., C, C] with the levels' blocks below the diagonal and 0 elsewhere."""
    first = levels[0]
    whole = jnp.zeros((*first.shape[:-3], 2 * first.shape[-3], 1, 1), first.dtype)
    for cross in levels:
        corner1, corner2 = halves(whole)
        top = jnp.concatenate([corner1, jnp.zeros_like(corner1)], axis=-1)
        whole = jnp.concatenate([top, jnp.concatenate([cross, corner2], axis=-1)], axis=-2)
    return whole[..., 0, :, :]


def read_gate(sums: DecaySums) -> Array:
    gate = jnp.exp(sums.read)
    return gate if sums.inside is None else jnp.where(sums.inside, gate, 0)


def reads(sums: DecaySums, q: Array) -> Array:
    return read_gate(sums) * q


def writes(sums: DecaySums, k: Array) -> Array:
    return jnp.exp(sums.write) * k


def scores(sums: DecaySums, q: Array, k: Array) -> Array:
    """A, strictly below the diagonal."""
    q_read = q if sums.inside is None else jnp.where(sums.inside, q, 0)
    if sums.pairs is not None:
        return dot("...ik,...jk->...ij", q_read, k, like=q) * sums.pairs
    if not sums.levels:
        return jnp.zeros((), sums.read.dtype)
    blocks = []
    for level in sums.levels:
        q2, k1 = split(q_read, level)[1] * jnp.exp(level[0]), split(k, level)[0] * jnp.exp(level[1])
        blocks.append(dot("...ik,...jk->...ij", q2, k1, like=q))
    return join(blocks)


def own_scores(q: Array, k: Array, bonus: Array | None) -> Array:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    products = q.astype(dtype) * k.astype(dtype)
    own = jnp.sum(products if bonus is None else products * bonus.astype(dtype), axis=-1)
    return own[..., None] * jnp.eye(q.shape[-2], dtype=dtype)


def score_gradients(sums: DecaySums, q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, Array]:
    """Gradients of q and k through A, for every head of v: [B, G, R, N, C, K]."""
    shape = (*jnp.broadcast_shapes(q.shape[:-2], v.shape[:-2]), *q.shape[-2:])
    q_read = q if sums.inside is None else jnp.where(sums.inside, q, 0)
    if sums.pairs is not None:
        d_scores = dot("...iv,...jv->...ij", d_out, v, like=v) * sums.pairs
        dq = dot("...ij,...jk->...ik", d_scores, k, like=v)
        dk = dot("...ij,...ik->...jk", d_scores, q_read, like=v)
    else:
        dq = dk = jnp.zeros((*shape[:-1], 1, shape[-1]), d_out.dtype)
        for level in sums.levels:
            read, write = jnp.exp(level[0]), jnp.exp(level[1])
            d_scores = dot("...iv,...jv->...ij", split(d_out, level)[1], split(v, level)[0], like=v)
            (dq1, dq2), (dk1, dk2) = halves(dq), halves(dk)
            dq2 += read * dot("...ij,...jk->...ik", d_scores, split(k, level)[0] * write, like=v)
            dk1 += write * dot("...ij,...ik->...jk", d_scores, split(q_read, level)[1] * read, like=v)
            dq, dk = jnp.concatenate([dq1, dq2], axis=-2), jnp.concatenate([dk1, dk2], axis=-2)
        dq, dk = dq[..., 0, :, :], dk[..., 0, :, :]
    return dq if sums.inside is None else jnp.where(sums.inside, dq, 0), dk


def states(sums: DecaySums, k: Array, v: Array, initial_state: Array) -> tuple[Array, Array]:
    """The states at the chunks' starts, [B, G, R, N, K, V], and the last."""
    updates = dot("...ck,...cv->...kv", writes(sums, k), v, like=v)
    return scan_states(sums, updates, initial_state, reverse=False)


def state_gradients(sums: DecaySums, q: Array, d_out: Array, d_final_state: Array, like: Array) -> tuple[Array, Array]:
    """The gradients of the states at the chunks' ends, and of the initial one."""
    updates = dot("...ck,...cv->...kv", reads(sums, q), d_out, like=like)
    return scan_states(sums, updates, d_final_state, reverse=True)


def scan_states(sums: DecaySums, updates: Array, state: Array, reverse: bool) -> tuple[Array, Array]:
    decay = jnp.broadcast_to(jnp.exp(sums.total).mT, (*updates.shape[:-2], sums.total.shape[-1], 1))
    xs = jnp.moveaxis(decay, 3, 0), jnp.moveaxis(updates, 3, 0)
    last, before = jax.lax.scan(lambda state, x: (x[0] * state + x[1], state), state, xs, reverse=reverse)
    return jnp.moveaxis(before, 0, 3), last


def log_decay_gradient(
    reads: Array, writes: Array, end: Array, bonus: Array | None, starts: Array | None, g: Array
) -> Array:
    """As in recurrent.py, a chunk at a time: sum_v S' dS' at its end stands for all later tokens."""
    if g.shape[-1] == 1:
        reads, writes = (jnp.sum(x, axis=-1, keepdims=True) for x in (reads, writes))
        end = jnp.sum(end, axis=-2, keepdims=True)
    if bonus is not None:
        reads = jnp.pad(reads[..., 1:, :], ((0, 0),) * 4 + ((0, 1), (0, 0)))
    later = jnp.triu(jnp.ones((g.shape[-2],) * 2, reads.dtype))
    sums = dot("ij,...jk->...ik", later, reads - writes, like=reads) + jnp.sum(end, axis=-1)[..., None, :]
    return sum_to(sums if starts is None else jnp.where(starts, 0, sums), g)


def sum_to(x: Array, like: Array) -> Array:
    """x summed over the axes along which `like` was broadcast to it, in like's dtype."""
    shape = (1,) * (x.ndim - like.ndim) + like.shape
    axes = tuple(i for i, size in enumerate(shape) if size == 1 != x.shape[i])
    return jnp.sum(x, axis=axes, keepdims=True).reshape(like.shape).astype(like.dtype)
