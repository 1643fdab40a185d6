"""Decaying fast weights in chunks of C tokens: matmuls within a chunk, a scan of states over chunks. Plain XLA.

Within a chunk, with the state S at its start and S' at its end, and all exponents sums of log-decays between tokens,
g of keys and f of values:

    o_i = e^(f to i) * ((q_i e^(g to i)) S) + (q_i . k_i) v_i
          + sum_{j<i} e^(f between) * (sum_K q_i k_j e^(g between)) v_j
    S'  = diag(e^(all g)) S diag(e^(all f)) + sum_j (k_j e^(g after j)) (v_j e^(f after j))^T

The sum between j and i is split at a point m between them, for keys and for values: the scores of all pairs on both
sides of the middle of the chunk are one matmul of q_i e^(g from m) and k_j e^(g to m), which weighs v_j e^(f to m), and
the result is multiplied by e^(f from m); then the same within each half, log2 C levels down to single tokens. Every
exponent is a sum of log-decays, never a difference of sums: none is positive, whatever the gates.

The scan's body is computed again in the backward pass, so that of a chunk only its state is kept.
"""

import jax
import jax.numpy as jnp

from kernels.array_typing import Array, Float, Int
from kernels.precision import dot
from kernels.segments import segment_starts


def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    key_log_decay: Float[Array, "B T H K"],
    value_log_decay: Float[Array, "B T H V"],
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`; `chunk_size` (default 32) is rounded up to a power of two."""
    batch, time, heads, _ = v.shape
    if time == 1:
        return _one_token(q, k, v, key_log_decay, value_log_decay, initial_state, scale)
    size = 1 << (min(chunk_size or 32, time) - 1).bit_length()
    dtype = initial_state.dtype
    g, f = key_log_decay.astype(dtype), value_log_decay.astype(dtype)
    if segment_ids is not None:
        g = jnp.where(segment_starts(segment_ids)[:, :, None, None], -jnp.inf, g)

    def to_chunks(x):  # [B, T, H, X] -> [N, B, H, C, X]; padding writes nothing and decays nothing
        x = jnp.pad(x, ((0, 0), (0, -time % size), (0, 0), (0, 0)))
        return x.reshape(batch, -1, size, heads, x.shape[-1]).transpose(1, 0, 3, 2, 4)

    body = jax.checkpoint(attend_chunk, prevent_cse=False)
    state, out = jax.lax.scan(body, initial_state, tuple(map(to_chunks, (q, k, v, g, f))))
    out = out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, v.shape[-1])[:, :time]
    return (scale * out).astype(v.dtype), state


def _one_token(q, k, v, key_log_decay, value_log_decay, state, scale):
    """The recurrence itself: it reads the new state, so that the old one can be written over."""
    q, k, x, g, f = (a[:, 0].astype(state.dtype) for a in (q, k, v, key_log_decay, value_log_decay))
    state = jnp.exp(g)[..., None] * state * jnp.exp(f)[..., None, :] + k[..., None] * x[..., None, :]
    out = jnp.einsum("bhkv,bhk->bhv", state, scale * q, precision="highest")
    return out[:, None].astype(v.dtype), state


def attend_chunk(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
    q, k, v, g, f = chunk  # [B, H, C, X]
    like = v
    q, k, v = (x.astype(state.dtype) for x in (q, k, v))
    out = jnp.sum(q * k, axis=-1, keepdims=True) * v
    g, f = Sums(g), Sums(f)
    while g.total.shape[-3] > 1:
        size = g.read.shape[-2]  # tokens of a block; blocks 0 and 1 are the two sides of a middle, 2 and 3, ...
        (_, q2), (k1, _), (v1, _) = (sides(x, size) for x in (q, k, v))
        scores = dot("...ik,...jk->...ij", q2 * jnp.exp(g.read_second), k1 * jnp.exp(g.write_first), like)
        cross = dot("...ij,...jv->...iv", scores, v1 * jnp.exp(f.write_first), like) * jnp.exp(f.read_second)
        out += jnp.stack([jnp.zeros_like(cross), cross], axis=-3).reshape(out.shape)
        g, f = g.merged(), f.merged()
    read_g, write_g, total_g = (x[..., 0, :, :] for x in (g.read, g.write, g.total))
    read_f, write_f, total_f = (x[..., 0, :, :] for x in (f.read, f.write, f.total))
    out += dot("...ik,...kv->...iv", q * jnp.exp(read_g), state, like) * jnp.exp(read_f)
    update = dot("...jk,...jv->...kv", k * jnp.exp(write_g), v * jnp.exp(write_f), like)
    return jnp.exp(total_g).mT * state * jnp.exp(total_f) + update, out


class Sums:
    """Sums of log-decays in blocks of tokens, [..., blocks, tokens, X], single tokens at first.

    `read` is from a block's start to i, with i, `write` from after j to its end, `total` all of it (one token wide).
    """

    def __init__(self, log_decay, write=None, total=None):
        if write is None:
            log_decay = log_decay[..., None, :]
            write, total = jnp.zeros_like(log_decay), log_decay
        self.read, self.write, self.total = log_decay, write, total
        self.read_first, self.read_second = self.read[..., 0::2, :, :], self.read[..., 1::2, :, :]
        self.write_first, self.write_second = self.write[..., 0::2, :, :], self.write[..., 1::2, :, :]
        self.total_first, self.total_second = self.total[..., 0::2, :, :], self.total[..., 1::2, :, :]

    def merged(self) -> "Sums":
        """Two neighbouring blocks become one."""
        read = jnp.concatenate([self.read_first, self.total_first + self.read_second], axis=-2)
        write = jnp.concatenate([self.write_first + self.total_second, self.write_second], axis=-2)
        return Sums(read, write, self.total_first + self.total_second)


def sides(x: Array, size: int) -> tuple[Array, Array]:
    """The tokens before and after the middles: [..., C, X] -> twice [..., C / (2 size), size, X]."""
    x = x.reshape(*x.shape[:-2], -1, size, x.shape[-1])
    return x[..., 0::2, :, :], x[..., 1::2, :, :]
