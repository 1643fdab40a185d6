"""Softmax attention of a window and of a document's first tokens, which see, and are seen by, all of it.

Of arXiv:2004.05150, in XLA and linear in time: what windows and global tokens add up to is one softmax, of which no
kernel for windows tells the denominator.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels import precision
from kernels.array_typing import Array, Bool, Float, Int

LEAST_BLOCK = 64  # queries at a time, where the window is narrower


def first_tokens(x: Float[Array, "B T H K"], start: Int[Array, "B T"], number: int) -> Float[Array, "B T n H K"]:
    """For each token the first ones of its document, which begins at `start`; whatever follows a shorter one."""
    at = jnp.minimum(start[..., None] + jnp.arange(number), x.shape[1] - 1)
    rows = jnp.take_along_axis(x, at.reshape(len(x), -1)[..., None, None], axis=1)
    return rows.reshape(*at.shape, *x.shape[2:])


def window_and_first(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    ids: Int[Array, "B T"],
    is_first: Bool[Array, "B T"],
    first_k: Float[Array, "B T n H K"],
    first_v: Float[Array, "B T n H V"],
    has_first: Bool[Array, "B T n"],
    window: int,
) -> Float[Array, "B T H V"]:
    """softmax over the keys of equal id with |s - t| < window, and over a query's `first` ones, which count once.

    ids: never negative. Computed block by block, with what lies beside it, and again for the gradient.
    """
    B, T = ids.shape
    block = min(max(window - 1, LEAST_BLOCK), T)
    n = -(-T // block)

    def blocks(x, fill=0):  # [n, B, block, ...]
        x = jnp.pad(x, ((0, 0), (0, n * block - T), *((0, 0),) * (x.ndim - 2)), constant_values=fill)
        return x.reshape(B, n, block, *x.shape[2:]).swapaxes(0, 1)

    def beside(x, fill=0):  # [n, B, 3 block, ...]: the block before, the block, the block after
        x = jnp.pad(blocks(x, fill), ((1, 1), *((0, 0),) * x.ndim), constant_values=fill)
        return jnp.concatenate([x[:-2], x[1:-1], x[2:]], axis=2)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_block(q, ids, first_k, first_v, has_first, k, v, key_ids, key_is_first):
        distance = jnp.arange(block)[:, None] - (jnp.arange(3 * block) - block)
        visible = (jnp.abs(distance) < window) & (ids[:, :, None] == key_ids[:, None]) & ~key_is_first[:, None]
        scale, dot = q.shape[-1] ** -0.5, functools.partial(precision.dot, like=v)
        near = jnp.where(visible[:, None], scale * dot("bthk,bshk->bhts", q, k), -jnp.inf)
        far = jnp.where(has_first[:, None], scale * dot("bthk,btjhk->bhtj", q, first_k), -jnp.inf)
        weights = jax.nn.softmax(jnp.concatenate([near, far], axis=-1), axis=-1)
        near, far = weights[..., : 3 * block], weights[..., 3 * block :]
        return (dot("bhts,bshv->bthv", near, v) + dot("bhtj,btjhv->bthv", far, first_v)).astype(v.dtype)

    # A padded query sees itself, so that no softmax is of nothing.
    of_queries = blocks(q), blocks(ids, -1), *(blocks(x) for x in (first_k, first_v, has_first))
    of_keys = beside(k), beside(v), beside(ids, -1), beside(is_first, False)
    o = lax.map(lambda arrays: of_block(*arrays), (*of_queries, *of_keys))
    return o.swapaxes(0, 1).reshape(B, n * block, *o.shape[3:])[:, :T]


def of_first_tokens(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    numbers: Int[Array, "B T"],
    count: Int[Array, "B T"],
    first: int,
) -> Float[Array, "B T H V"]:
    """What the `first` tokens of a document read of all of it, at those tokens; elsewhere whatever.

    numbers: of the documents, from 0 on. count: tokens of its document before each.
    """
    B, T = numbers.shape
    dot = functools.partial(precision.dot, like=v)
    logits = q.shape[-1] ** -0.5 * dot("btjhk,bthk->btjh", first_tokens(q, jnp.arange(T) - count, first), k)
    of_document = (numbers + T * jnp.arange(B)[:, None]).reshape(-1)

    def summed(x):
        return jax.ops.segment_sum(x.reshape(B * T, *x.shape[2:]), of_document, B * T)

    def at_tokens(x):
        return x[of_document].reshape(B, T, *x.shape[1:])

    most = jax.ops.segment_max(lax.stop_gradient(logits).reshape(B * T, *logits.shape[2:]), of_document, B * T)
    weights = jnp.exp(logits - at_tokens(most))
    total = at_tokens(summed(weights))
    read = at_tokens(summed(dot("btjh,bthv->btjhv", weights, v))) / total[..., None]
    at = jnp.minimum(count, first - 1)[..., None, None, None]
    return jnp.take_along_axis(read, at, axis=2)[:, :, 0].astype(v.dtype)
