"""A chunk of C tokens of one head whose state decays by one number a token: values in, values out.

    out = scale (P o q k^T) v + scale read o (q S)          P_ij = exp(sum of g over (j, i]), 0 above the diagonal
    S'  = total S + k^T (write o v)                         read_i, write_j, total: up to i, after j, of all tokens

The decays act on rows of v and out, so that heads of v may share q and k. With dS' the gradient of S':

    dA = scale P o (dout v^T)      dq = dA k + (scale read o dout) S^T      dk = dA^T q + (write o v) dS'^T
    A  = scale P o (q k^T)         dv = A^T dout + write o (k dS')          dS = total dS' + q^T (scale read o dout)

The gradient of g is a sum over later tokens of q . dq - k . dk (../recurrent.py), added up by the caller.

For bfloat16 inputs the exponents are differences of cumulative sums; for float32 ones they are sums of the very
log-decays between two tokens, by a matmul with a matrix of ones, which takes no digits from a mild decay after a
strong one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels.linear_attention.mosaic_tpu.dots import LANES, Dots, grid_index, over_lanes


class Decay(NamedTuple):
    pairs: Array  # P, [C, C]
    read: Array  # [C, 128], equal lanes
    write: Array  # [C, 128], equal lanes
    total: Array  # [1, 1]


def rows_per_head(dots: Dots) -> int:
    """Rows of [., C] that the caller prepares for `decays`: sums up to a token; if exact, after it, and g itself."""
    return 3 if dots.exact else 1


def decays(dots: Dots, rows: Array, num_heads: int) -> list[Decay]:
    """One a head. rows [., C]: `num_heads` of each of `rows_per_head`."""
    size = rows.shape[1]
    columns = rows.T
    i, j = grid_index(size)
    result = []
    for head in range(num_heads):
        row = rows[head : head + 1]
        last = row[:, size - 1 :]
        column = lane_broadcast(columns, head)
        if dots.exact:
            write = lane_broadcast(columns, num_heads + head)
            log_decay = over_lanes(lane_broadcast(columns, 2 * num_heads + head), size)
            between = dots.nn((j <= i).astype(jnp.float32), jnp.where(i > j, log_decay, 0.0))
        else:
            write = last - column
            between = over_lanes(column, size) - row
        pairs = jnp.where(i >= j, jnp.exp(jnp.minimum(between, 0.0)), 0.0)
        result.append(Decay(pairs, jnp.exp(column), jnp.exp(write), jnp.exp(last)))
    return result


def lane_broadcast(columns: Array, index: int | Array) -> Array:
    return jnp.broadcast_to(columns[:, index : index + 1], (columns.shape[0], LANES))


def update(dots: Dots, k: Array, v: Array, decay: Decay, state: Array) -> Array:
    """S' [K, V] from S."""
    return decay.total * state + dots.tn(k, over_lanes(decay.write, v.shape[1]) * v)


def forward(dots: Dots, q: Array, k: Array, v: Array, decay: Decay, state: Array, scale: float) -> Array:
    """out [C, V], float32."""
    within = dots.nn(dots.nt(q, k) * decay.pairs, v)
    return scale * (within + over_lanes(decay.read, v.shape[1]) * dots.nn(q, state))


def backward(
    dots: Dots, q: Array, k: Array, v: Array, d_out: Array, decay: Decay, state: Array, d_end: Array, scale: float
) -> tuple[Array, Array, Array, Array]:
    """dq, dk [C, K], dv [C, V] and the gradient of S, all float32. state: S; d_end: dS'."""
    pairs = scale * decay.pairs
    write = over_lanes(decay.write, v.shape[1])
    d_out_read = (scale * over_lanes(decay.read, v.shape[1]) * d_out).astype(dots.dtype)
    d_scores = (dots.nt(d_out, v) * pairs).astype(dots.dtype)
    dq = dots.nn(d_scores, k) + dots.nt(d_out_read, state)
    dk = dots.tn(d_scores, q) + dots.nt(write * v, d_end)
    dv = dots.tn(dots.nt(q, k) * pairs, d_out) + write * dots.nn(k, d_end)
    return dq, dk, dv, decay.total * d_end + dots.tn(q, d_out_read)
