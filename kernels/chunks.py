"""What is inside of a chunk of C tokens: the log-decays between two of them, and products of queries and keys with such
decays. For the chunked forms of linear attention and of the delta rules; the math is in linear_attention/chunked.py.

Arrays are [N, B, G, R, C, X]: N chunks, G heads of queries and keys, R heads of values to each. Levels of decays split
C, an axis more. Products of arrays with more than eight end the process on CPUs (jax 0.10.2).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.precision import dot
from kernels.segments import segment_starts

PIECE = 64  # chunks that are computed at once
NOTHING_LEFT = -1e30  # a log-decay whose sums are finite: 0 times it is 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of `time` tokens as chunks of `size`, their number a multiple of `pieces`, in G = `groups`."""

    time: int
    size: int
    groups: int
    pieces: int

    @classmethod
    def of(cls, time: int, size: int, groups: int) -> "Layout":
        """With at most PIECE chunks in a piece."""
        return cls(time, size, groups, -(-time // (size * PIECE)))

    @property
    def padding(self) -> int:
        return -self.time % (self.pieces * self.size)

    def chunks(self, x: Array) -> Array:
        """[B|1, T|1, H|G, X] -> [N|1, B|1, G, R, C|1, X]."""
        batch, time, heads, width = x.shape
        if time == self.time:
            x = jnp.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0)))
        x = x.reshape(batch, -1, min(self.size, x.shape[1]), self.groups, heads // self.groups, width)
        return x.transpose(1, 0, 3, 4, 2, 5)

    def starts(self, segment_ids: Array) -> Array:
        """[B, T] -> [N, B, G, 1, C, 1]: where a segment starts."""
        starts = segment_starts(segment_ids)[:, :, None, None]
        return self.chunks(jnp.broadcast_to(starts, (*segment_ids.shape, self.groups, 1)))

    def tokens(self, x: Array) -> Array:
        """[N, B, G, R, C, X] -> [B, T, H, X]."""
        _, batch, groups, shared, _, width = x.shape
        return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, groups * shared, width)[:, : self.time]


def in_pieces(
    attend: Callable[[Any, Array], tuple[Array, Array]], pieces: int, arrays: Any, state: Array
) -> tuple[Array, Array]:
    """attend(arrays, state) -> (out, state), the chunks in so many pieces, one after the other; what has one chunk only
    (a fixed decay) is the same in all of them."""
    if pieces == 1:
        return attend(arrays, state)
    leaves, tree = jax.tree.flatten(arrays)
    cut = [len(x) > 1 for x in leaves]

    def piece(state, own):
        own = iter(own)
        out, state = attend(tree.unflatten([next(own) if x else y for x, y in zip(cut, leaves, strict=True)]), state)
        return state, out

    own = [x.reshape(pieces, -1, *x.shape[1:]) for x, whole in zip(leaves, cut, strict=True) if whole]
    state, out = jax.lax.scan(piece, state, own)
    return out.reshape(-1, *out.shape[2:]), state


class DecaySums(NamedTuple):
    """Sums of log-decays in a chunk; of decays per key `levels` of (from the middle to i, from j to the middle), of
    scalar ones `pairs`, exp of what lies between j and i."""

    read: Array
    write: Array
    total: Array
    inside: Array | None  # where a read before a token's decay finds a state at all: not at a segment's start
    levels: Sequence[tuple[Array, Array]] = ()
    pairs: Array | None = None


def decay_sums(g: Array, starts: Array | None, *, before: bool = False) -> DecaySums:
    """With `before`, a token reads what there is before its own decay (and at a segment's start nothing)."""
    g = jnp.maximum(g.astype(jnp.promote_types(g.dtype, jnp.float32)), NOTHING_LEFT)
    if starts is not None:
        g = jnp.where(starts, NOTHING_LEFT, g)
    inside = None if not before or starts is None else ~starts
    if g.shape[-1] == 1:
        return scalar_decay_sums(g, before, inside)
    total = g[..., None, :]  # blocks of one token: [..., blocks, tokens of a block, K]
    write = jnp.zeros_like(total)
    read = write if before else total
    levels = []
    while total.shape[-3] > 1:
        (read1, read2), (write1, write2), (total1, total2) = halves(read), halves(write), halves(total)
        levels.append((read2, write1))
        read = jnp.concatenate([read1, total1 + read2], axis=-2)
        write = jnp.concatenate([write1 + total2, write2], axis=-2)
        total = total1 + total2
    return DecaySums(*(x[..., 0, :, :] for x in (read, write, total)), inside, levels)


def scalar_decay_sums(g: Array, before: bool, inside: Array | None) -> DecaySums:
    """By matmuls with zeros and ones, which add the same log-decays: levels of one number a token are slow on TPUs."""
    i, j = jnp.indices((g.shape[-2],) * 2)
    after, upto = (j > i), (j < i if before else j <= i)
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


def scores(sums: DecaySums, q: Array, k: Array, like: Array) -> Array:
    """A, strictly below the diagonal."""
    q_read = q if sums.inside is None else jnp.where(sums.inside, q, 0)
    if sums.pairs is not None:
        return dot("...ik,...jk->...ij", q_read, k, like=like) * sums.pairs
    if not sums.levels:
        return jnp.zeros((), sums.read.dtype)
    blocks = []
    for level in sums.levels:
        q2, k1 = split(q_read, level)[1] * jnp.exp(level[0]), split(k, level)[0] * jnp.exp(level[1])
        blocks.append(dot("...ik,...jk->...ij", q2, k1, like=like))
    return join(blocks)


def all_scores(sums: DecaySums, q: Array, k: Array, bonus: Array | None) -> Array:
    """A with its diagonal."""
    if bonus is None and sums.pairs is not None:
        return dot("...ik,...jk->...ij", q, k, like=q) * (sums.pairs + jnp.eye(q.shape[-2], dtype=sums.pairs.dtype))
    return scores(sums, q, k, like=q) + own_scores(q, k, bonus)


def own_scores(q: Array, k: Array, bonus: Array | None) -> Array:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    products = q.astype(dtype) * k.astype(dtype)
    own = jnp.sum(products if bonus is None else products * bonus.astype(dtype), axis=-1)
    return own[..., None] * jnp.eye(q.shape[-2], dtype=dtype)


def score_gradients(sums: DecaySums, q: Array, k: Array, v: Array, d_out: Array) -> tuple[Array, Array]:
    """Gradients of q and k through A, for every head of v: [N, B, G, R, C, K]."""
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
            q2 = split(jnp.broadcast_to(q_read, shape), level)[1] * read  # XLA on CPUs has no such product of groups
            dk1 += write * dot("...ij,...ik->...jk", d_scores, q2, like=v)
            dq, dk = jnp.concatenate([dq1, dq2], axis=-2), jnp.concatenate([dk1, dk2], axis=-2)
        dq, dk = dq[..., 0, :, :], dk[..., 0, :, :]
    return dq if sums.inside is None else jnp.where(sums.inside, dq, 0), dk


def log_decay_gradient(reads: Array, writes: Array, end: Array, starts: Array | None, g: Array) -> Array:
    """As in linear_attention/recurrent.py, a chunk at a time: sum_v S' dS' at its end stands for all later tokens."""
    if g.shape[-1] == 1:
        reads, writes = (jnp.sum(x, axis=-1, keepdims=True) for x in (reads, writes))
        end = jnp.sum(end, axis=-2, keepdims=True)
    later = jnp.triu(jnp.ones((g.shape[-2],) * 2, reads.dtype))
    sums = dot("ij,...jk->...ik", later, reads - writes, like=reads) + jnp.sum(end, axis=-1)[..., None, :]
    return sum_to(sums if starts is None else jnp.where(starts, 0, sums), g)


def of_next_token(x: Array) -> Array:
    """The rows of [..., C, X] one token earlier: where reads before a token's own decay count."""
    return jnp.concatenate([x[..., 1:, :], jnp.zeros_like(x[..., :1, :])], axis=-2)


def sum_to(x: Array, like: Array) -> Array:
    """x summed over the axes along which `like` was broadcast to it, in like's dtype."""
    shape = (1,) * (x.ndim - like.ndim) + like.shape
    axes = tuple(i for i, size in enumerate(shape) if size == 1 != x.shape[i])
    return jnp.sum(x, axis=axes, keepdims=True).reshape(like.shape).astype(like.dtype)
