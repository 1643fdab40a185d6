"""A few queries against a cache of keys and values, in XLA: as many passes over the cache as it must have, and no copy.

A cache lies heads first, [B, G, L, K], so that the keys of a head are the rows of one matrix: XLA on a CPU turns others
round at every call. Where most of it is in use, all of it is read in place. Else blocks are, up to the last one in use;
a block is copied out, which costs less than what it leaves unread.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Bool, Float, Int
from kernels.attention.chunked import HIDDEN
from kernels.attention.decay import between
from kernels.precision import dot

BLOCK = 256  # keys
SMALL = 1024  # keys that are read whole, whatever is in use; at least 2 blocks


def step_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B G L K"],
    v: Float[Array, "B G L V"],
    sums: tuple[Float[Array, "B T H 2"], Float[Array, "B H L 2"]] | None,
    visible: Bool[Array, "B T L"],
    stop: Int[Array, ""],
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention_step`."""
    return _whole(q, k, v, sums, visible)


@jax.custom_vjp
def step(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B G L K"],
    v: Float[Array, "B G L V"],
    sums: tuple[Float[Array, "B T H 2"], Float[Array, "B H L 2"]] | None,
    visible: Bool[Array, "B T L"],
    stop: Int[Array, ""],
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention_step`."""
    L = k.shape[2]
    if L <= SMALL:
        return _whole(q, k, v, sums, visible)
    return lax.cond(2 * stop > L, _whole, lambda *arrays: _in_blocks(*arrays, stop), q, k, v, sums, visible)


def _forward(*arrays):
    return step(*arrays), arrays[:-1]


def _backward(residuals, dout):
    *arrays, visible = residuals
    return *jax.vjp(lambda *arrays: _whole(*arrays, visible), *arrays)[1](dout), None, None


step.defvjp(_forward, _backward)


def _rows(q, G):
    """[B, T, H, K] -> [B, G, R * T, K]: the heads that read one head of keys, and their tokens."""
    B, T, H, K = q.shape
    return q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)


def _of_heads(rows, T):
    """[B, G, R * T, V] -> [B, T, H, V]."""
    B, G, _, V = rows.shape
    return rows.reshape(B, G, -1, T, V).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, V)


def _logits(rows, k, sums, visible):
    """Logits [B, G, R, T, L], and where they are visible."""
    z = rows.shape[-1] ** -0.5 * dot("bgtk,bglk->bgtl", rows, k, like=rows)
    visible = visible[:, None, None]
    z = z.reshape(*z.shape[:2], -1, *visible.shape[-2:])
    if sums is not None:
        z += between(sums[0].swapaxes(1, 2)[:, :, :, None], sums[1][:, :, None]).reshape(z.shape)
    return jnp.where(visible, z, HIDDEN), visible


def _weighted(p, v):
    return dot("bgtl,bglv->bgtv", p.reshape(*p.shape[:2], -1, p.shape[-1]), v, like=v)


def _whole(q, k, v, sums, visible):
    z, seen = _logits(_rows(q, k.shape[1]), k, sums, visible)
    p = jnp.where(seen, jnp.exp(z - z.max(-1, keepdims=True)), 0)
    total = p.sum(-1).reshape(*p.shape[:2], -1, 1)
    return _of_heads(_weighted(p, v) / jnp.where(total == 0, 1, total), q.shape[1]).astype(v.dtype)


def _in_blocks(q, k, v, sums, visible, stop):
    rows = _rows(q, k.shape[1])

    def block(j, carry):
        maximum, total, out = carry
        part = lambda x: lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, 2)  # noqa: E731
        here = None if sums is None else (sums[0], part(sums[1]))
        z, seen = _logits(rows, part(k), here, part(visible))
        larger = jnp.maximum(maximum, z.max(-1))
        p = jnp.where(seen, jnp.exp(z - larger[..., None]), 0)
        kept = jnp.exp(maximum - larger)
        out = out * kept.reshape(*kept.shape[:2], -1, 1) + _weighted(p, part(v))
        return larger, total * kept + p.sum(-1), out

    shape = (*rows.shape[:2], rows.shape[2] // q.shape[1], q.shape[1])  # [B, G, R, T]
    wide = jnp.promote_types(v.dtype, jnp.float32)
    carry = (jnp.full(shape, HIDDEN, wide), jnp.zeros(shape, wide), jnp.zeros((*rows.shape[:3], v.shape[3]), wide))
    _, total, out = lax.fori_loop(0, (stop + BLOCK - 1) // BLOCK, block, carry)
    total = total.reshape(*total.shape[:2], -1, 1)
    return _of_heads(out / jnp.where(total == 0, 1, total), q.shape[1]).astype(v.dtype)
