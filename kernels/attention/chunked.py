"""Softmax attention in XLA with a running softmax: blocks of queries against blocks of keys.

For each block of queries, over the blocks of keys it can see, with m the running maximum and Z the running sum:

    m' = max(m, max_s z_ts),   Z' = Z e^{m - m'} + sum_s e^{z_ts - m'},   o' = o e^{m - m'} + sum_s e^{z_ts - m'} v_s

and o / Z at the end. Kept for the backward pass: o and log Z + m, one number a query. Backward recomputes
p_ts = e^{z_ts - log Z - m} block by block (Dao et al. 2022, arXiv:2205.14135, algorithm 4):

    dv_s = sum_t p_ts do_t,   dz_ts = p_ts (do_t . v_s - do_t . o_t),   dq_t = sum_s dz_ts k_s,   dk_s = sum_t dz_ts q_t

With decays z gains G_t - G_s, sums of log-decays: dG_s = -sum_t dz_ts, and nothing for G_t, which all logits of a
query have in common.

Where keys stand at their own index, blocks that causality or the window hides from a whole block of queries are
skipped, so a query at position p of a long cache reads p keys, not the cache.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kernels import precision
from kernels.array_typing import Array, Float, Int
from kernels.attention.decay import between
from kernels.softcap import soft_cap, soft_cap_slope

HIDDEN = -1e30  # finite: a row that sees nothing must not become NaN


@dataclasses.dataclass(frozen=True)
class Options:
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    block_q: int
    block_k: int
    skip: bool  # keys stand at their own index


def block_sizes(T: int, L: int) -> tuple[int, int]:
    """Queries and keys of a block. 128 by 128 logits of all heads stay in a CPU's caches; few queries are bound by the
    cost of a loop step, so they take more keys at a time."""
    even = lambda length, target: math.ceil(length / math.ceil(length / target))  # noqa: E731
    return even(T, 128), min(L, 128 if T > 32 else 512)


def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    *,
    causal: bool,
    window: int | None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B L"]] | None,
    q_start: int | Int[Array, ""] | None,
    q_positions: Int[Array, "B T"] | None,
    kv_positions: Int[Array, "B L"] | None,
    scale: float,
    softcap: float | None,
    log_decay: tuple[Float[Array, "B T H 2"], Float[Array, "B L H 2"]] | None,
) -> Float[Array, "B T H V"]:
    """Output [B, T, H, V]; see `attention`."""
    (B, T, H, K), (L, G, V) = q.shape, v.shape[1:]
    block_q, block_k = block_sizes(T, L)
    options = Options(causal, window, scale, softcap, block_q, block_k, skip=kv_positions is None)
    n, R = math.ceil(T / block_q), H // G
    padding = ((0, 0), (0, n * block_q - T))
    q_positions = jnp.arange(T)[None] if q_positions is None else q_positions
    kv_positions = jnp.arange(L)[None] if kv_positions is None else kv_positions
    q_ids, kv_ids = (None, None) if segment_ids is None else segment_ids

    def blocks(ids):  # [B, T] -> [n, B, block_q]
        return jnp.pad(ids, padding, mode="edge").reshape(-1, n, block_q).swapaxes(0, 1)

    q = jnp.pad(q, (*padding, (0, 0), (0, 0))).reshape(B, n, block_q, G, R, K)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(n, B, G, R * block_q, K)  # heads of a group are rows of one matmul
    q_info = (blocks(q_positions), None if q_ids is None else blocks(q_ids))
    if log_decay is not None:
        of_queries = jnp.pad(log_decay[0], (*padding, (0, 0), (0, 0)), mode="edge").reshape(B, n, block_q, G, R, 2)
        log_decay = of_queries.transpose(1, 0, 3, 4, 2, 5), log_decay[1].reshape(B, L, G, R, 2)
    out = _attention(q, k, v, log_decay, q_info, (kv_positions, kv_ids), options)
    out = out.reshape(n, B, G, R, block_q, V).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(B, n * block_q, H, V)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q, k, v, log_decay, q_info, kv_info, options):
    return _forward(q, k, v, log_decay, q_info, kv_info, options)[0]


def _forward(q, k, v, log_decay, q_info, kv_info, options):
    B, G, rows, _ = q.shape[1:]
    of_queries, of_keys = (None, None) if log_decay is None else log_decay

    def q_block(_, inputs):
        q, q_info, of_queries = inputs  # [B, G, rows, K]

        def kv_block(j, carry):
            maximum, total, out = carry
            start, visible = _visible(j, q_info, kv_info, options)
            v_j = _rows(v, start, options)
            gained = _gained(of_queries, of_keys, start, options)
            z, _ = _logits(q, _rows(k, start, options), gained, visible, options)
            new_maximum = jnp.maximum(maximum, z.max(-1))
            p = _masked(jnp.exp(z - new_maximum[..., None]), visible, 0)
            correction = jnp.exp(maximum - new_maximum)
            total = total * correction + p.sum(-1)
            out = out * correction[..., None] + _dot("bgts,bsgv->bgtv", p.astype(v.dtype), v_j)
            return new_maximum, total, out

        start = (
            jnp.full((B, G, rows), HIDDEN),
            jnp.zeros((B, G, rows)),
            jnp.zeros((B, G, rows, v.shape[-1])),
        )
        maximum, total, out = lax.fori_loop(*_bounds(q_info[0], k.shape[1], options), kv_block, start)
        total = jnp.where(total == 0, 1, total)
        return None, ((out / total[..., None]).astype(v.dtype), maximum + jnp.log(total))

    _, (out, logsumexp) = lax.scan(q_block, None, (q, q_info, of_queries))
    return out, (q, k, v, log_decay, q_info, kv_info, out, logsumexp)


def _backward(options, residuals, dout):
    q, k, v, log_decay, q_info, kv_info, out, logsumexp = residuals
    of_queries, of_keys = (None, None) if log_decay is None else log_decay

    def q_block(carry, inputs):
        q, q_info, of_queries, out, logsumexp, dout = inputs
        inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1)  # do . o, [B, G, rows]

        def kv_block(j, carry):
            dq, dk, dv, dsums = carry
            start, visible = _visible(j, q_info, kv_info, options)
            k_j, v_j = _rows(k, start, options), _rows(v, start, options)
            gained = _gained(of_queries, of_keys, start, options)
            z, slope = _logits(q, k_j, gained, visible, options)
            p = _masked(jnp.exp(z - logsumexp[..., None]), visible, 0)  # [B, G, rows, block_k]
            dv = _add_rows(dv, _dot("bgts,bgtv->bsgv", p.astype(v.dtype), dout), start, options)
            dz = p * (_dot("bgtv,bsgv->bgts", dout, v_j) - inner[..., None])
            if dsums is not None:
                of_block = -_grouped(dz, visible).sum(3).transpose(0, 3, 1, 2)  # [B, block_k, G, R]
                dsums = _add_rows(dsums, of_block, start, options)
            dz = (dz * slope).astype(q.dtype)
            dk = _add_rows(dk, _dot("bgts,bgtk->bsgk", dz, q), start, options)
            return dq + _dot("bgts,bsgk->bgtk", dz, k_j), dk, dv, dsums

        carry = (jnp.zeros(q.shape, jnp.float32), *carry)
        dq, *carry = lax.fori_loop(*_bounds(q_info[0], k.shape[1], options), kv_block, carry)
        return tuple(carry), dq.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    zeros += (None if log_decay is None else jnp.zeros(of_keys.shape[:-1], jnp.float32),)
    (dk, dv, dsums), dq = lax.scan(q_block, zeros, (q, q_info, of_queries, out, logsumexp, dout))
    if log_decay is not None:
        of_keys = jnp.stack([dsums, jnp.zeros_like(dsums)], axis=-1).astype(of_keys.dtype)
        log_decay = jnp.zeros_like(of_queries), of_keys
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), log_decay, None, None


_attention.defvjp(_forward, _backward)


def _bounds(q_positions, L, options):
    """First and past-the-last block of keys that some query of the block can see."""
    first, last = 0, math.ceil(L / options.block_k)
    ahead = 0 if options.causal else None if options.window is None else options.window - 1
    if options.skip and ahead is not None:
        last = jnp.clip((q_positions.max() + ahead) // options.block_k + 1, 0, last)
    if options.skip and options.window is not None:
        first = jnp.clip((q_positions.min() - options.window + 1) // options.block_k, 0, last)
    return first, last


def _visible(j, q_info, kv_info, options):
    """Where the block's keys start, and which of them each query sees: [B or 1, 1, 1, block_q, block_k]."""
    (q_positions, q_ids), (kv_positions, kv_ids) = q_info, kv_info
    L = kv_positions.shape[1]
    start = jnp.minimum(j * options.block_k, L - options.block_k)  # the last block overlaps its neighbour: hide that
    keys = lambda x: lax.dynamic_slice_in_dim(x, start, options.block_k, 1)[:, None, None, None]  # noqa: E731
    queries = lambda x: x[:, None, None, :, None]  # noqa: E731
    visible = (start + jnp.arange(options.block_k) >= j * options.block_k)[None, None, None, None]
    if options.causal or options.window is not None:
        distance = queries(q_positions) - keys(kv_positions)
        if options.causal:
            visible &= distance >= 0
        if options.window is not None:
            visible &= jnp.abs(distance) < options.window
    if kv_ids is not None:
        visible &= queries(q_ids) == keys(kv_ids)
    return start, visible


def _gained(of_queries, of_keys, start, options):
    """What decays add to the logits, [B, G, R, block_q, block_k]; None for nothing."""
    if of_keys is None:
        return None
    of_keys = _rows(of_keys, start, options).transpose(0, 2, 3, 1, 4)
    return between(of_queries[..., :, None, :], of_keys[..., None, :, :])


def _logits(q, k, gained, visible, options):
    """Logits z [B, G, rows, block_k], and the slope dz / d(q . k)."""
    z = options.scale * _dot("bgtk,bsgk->bgts", q, k)
    slope = options.scale
    if options.softcap is not None:
        z, slope = soft_cap(z, options.softcap), slope * soft_cap_slope(z, options.softcap)
    if gained is not None:
        z = z + gained.reshape(z.shape)
    return _masked(z, visible, HIDDEN), slope


def _masked(x, visible, value):
    """x [B, G, R * block_q, block_k] where visible, else `value`."""
    return jnp.where(visible, _grouped(x, visible), value).reshape(x.shape)


def _grouped(x, visible):
    """[B, G, R * block_q, block_k] -> [B, G, R, block_q, block_k]"""
    return x.reshape(*x.shape[:2], -1, *visible.shape[-2:])


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, precision=precision.exact(a.dtype), preferred_element_type=jnp.float32)


def _rows(x, start, options):
    return lax.dynamic_slice_in_dim(x, start, options.block_k, 1)


def _add_rows(x, block, start, options):
    return lax.dynamic_update_slice_in_dim(x, _rows(x, start, options) + block, start, 1)
