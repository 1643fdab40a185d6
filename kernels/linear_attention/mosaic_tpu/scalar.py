"""A chunk of C tokens of the slots that share q and k, whose states decay by one number a head and token: values in,
values out.

    out = scale (P o q k^T) v + scale read o (q S)          P_ij = exp(sum of g over (j, i]), 0 above the diagonal
    S'  = total S + k^T (write o v)                         read_i, write_j, total: up to i, after j, of all tokens

The decays act on rows of v and out. With dS' the gradient of S':

    dA = scale P o (dout v^T)      dq = dA k + (scale read o dout) S^T      dk = dA^T q + (write o v) dS'^T
    A  = scale P o (q k^T)         dv = A^T dout + write o (k dS')          dS = total dS' + q^T (scale read o dout)

dA is added up over the heads before it is multiplied with q and k, and the states lie side by side, [K, (slots, h, V)],
so that there is one matmul with q and k for all. The gradient of g is a sum over later tokens of q . dq - k . dk of the
head alone (../recurrent.py), added up by the caller:

    q_i . dq_i = sum_j dA_ij q_i k_j + (scale read o dout)_i . (q S)_i
    k_j . dk_j = sum_i dA_ij q_i k_j + (write o v)_j . (k dS')_j

For bfloat16 inputs the exponents are differences of cumulative sums, to the base 2; for float32 ones they are sums of
the very log-decays between two tokens, by a matmul with a matrix of ones, which takes no digits from a mild decay after
a strong one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index


class Decay(NamedTuple):
    pairs: list[Array]  # P of each slot, [i, (h, j)]
    pairs_of_keys: list[Array]  # P^T, [j, (h, i)]
    read: Array  # [C, (slots, h, V)]
    write: Array  # [C, (slots, h, V)]
    total: Array  # [1, (slots, h, V)]


def rows_per_slot(dots: Dots) -> int:
    """Rows [., (h, C)] that the caller prepares for `decay`: sums up to a token; if exact, after it, and g itself."""
    return 3 if dots.exact else 1


def decay(dots: Dots, rows: Array, columns: Array, num_slots: int, slots: range, width: int) -> Decay:
    """Of some of `num_slots` slots, for v [C, width] of each. rows [., (h, C)]: one a slot of each of `rows_per_slot`;
    columns: their transpose."""
    size, width = rows.shape[1] // dots.pack, width // dots.pack
    i, j = grid_index(size, dots.pack)

    def over_lanes(row, width):  # a row [1, (h, C)] as columns, each head's on `width` lanes
        heads = [columns[head * size : (head + 1) * size, row : row + 1] for head in range(dots.pack)]
        return lanes.over_lanes([jnp.broadcast_to(x, (size, lanes.LANES)) for x in heads], width)

    between, between_of_keys, sums, write, last = [], [], [], [], []
    for slot in slots:
        row = rows[slot : slot + 1]
        ends = [row[:, end - 1 : end] for end in range(size, row.shape[1] + 1, size)]
        last.append(lanes.over_lanes([jnp.broadcast_to(x, (1, lanes.LANES)) for x in ends], width))
        sums.append(over_lanes(slot, width))
        if dots.exact:
            write.append(over_lanes(num_slots + slot, width))
            log_decay = over_lanes(2 * num_slots + slot, size)
            row, column = grid_index(size)
            upto, after = (x.astype(jnp.float32) for x in (column <= row, column > row))
            between.append(dots.nn(upto, jnp.where(i > j, log_decay, 0.0)))
            between_of_keys.append(dots.nn(after, jnp.where(i <= j, log_decay, 0.0)))
        else:
            write.append(last[-1] - sums[-1])
            between.append(over_lanes(slot, size) - row)
            between_of_keys.append(-between[-1])
    exp = jnp.exp if dots.exact else jnp.exp2
    pairs = [jnp.where(i >= j, exp(x), 0.0) for x in between]
    pairs_of_keys = [jnp.where(i <= j, exp(x), 0.0) for x in between_of_keys]
    read, write, total = (exp(jnp.concatenate(x, axis=1)) for x in (sums, write, last))
    return Decay(pairs, pairs_of_keys, read, write, total)


class Keys(NamedTuple):
    """q and k [C, (h, K)] of the slots that share them, and as `Dots.stack` has them, [(h, C), (h, K)]."""

    q: Array
    k: Array
    queries: Array
    keys: Array


def update(dots: Dots, keys: Array, v: Array, decay: Decay, state: Array) -> Array:
    """S' [K, (slots, h, V)] from S; keys: k as `Dots.stack` has it."""
    return decay.total * state + lanes.blocks(dots.tn(keys, dots.spread(decay.write * v)), dots.key_pack)


def by_slot(x: Array, count: int) -> list[Array]:
    width = x.shape[1] // count
    return [x[:, start : start + width] for start in range(0, x.shape[1], width)]


def forward(dots: Dots, keys: Keys, v: Array, decay: Decay, state: Array, scale: float) -> Array:
    """out [C, (slots, h, V)], float32."""
    products = dots.nt(keys.q, keys.keys)
    within = [
        dots.nn(products * decay.pairs[slot], dots.spread(values))
        for slot, values in enumerate(by_slot(v, len(decay.pairs)))
    ]
    return scale * (jnp.concatenate(within, axis=1) + decay.read * dots.nn(keys.q, dots.state(state)))


class Gradients(NamedTuple):
    q: Array  # [C, (h, K)]
    k: Array
    v: Array  # [C, (slots, h, V)]
    state: Array
    terms: list[list[Array]]  # of each slot, [C, (h, .)]: their sums over a head's lanes are q . dq - k . dk, and
    taken: list[Array]  # what is still to be taken off, [1, (h, C)]


def backward(
    dots: Dots, keys: Keys, v: Array, d_out: Array, decay: Decay, state: Array, d_end: Array, scale: float
) -> Gradients:
    """All float32. state: S; d_end: dS'."""
    count, shared = len(decay.pairs), dots.key_pack < dots.pack or len(decay.pairs) > 1
    products = dots.nt(keys.q, keys.keys)
    products_of_keys = dots.nt(keys.k, keys.queries) if shared else None
    state, d_end_spread = dots.state(state), dots.state(d_end)
    d_out_read, written = scale * decay.read * d_out, decay.write * v
    d_written = dots.nn(keys.k, d_end_spread)
    d_outs, values = by_slot(d_out, count), [dots.spread(x) for x in by_slot(v, count)]
    # All slots in turns: what waits in one is hidden behind the others.
    weights = [scale * x for x in decay.pairs]
    d_scores = [dots.nt(*x) for x in zip(d_outs, values, strict=True)]
    d_scores = [x * y for x, y in zip(d_scores, weights, strict=True)]
    d_outs_spread = [dots.spread(x) for x in d_outs]
    if shared:
        attention = [scale * products_of_keys * x for x in decay.pairs_of_keys]
        within = [dots.nn(*x) for x in zip(attention, d_outs_spread, strict=True)]
    else:
        within = [dots.of_keys(products * x, y) for x, y in zip(weights, d_outs_spread, strict=True)]
    pairs = [x * products for x in d_scores]
    d_scores = sum(d_scores[1:], d_scores[0])
    dq = dots.nt(d_out_read, state) + dots.nn(d_scores, keys.keys)
    dk = dots.nt(written, d_end_spread) + dots.of_keys(d_scores, keys.queries)
    dv = jnp.concatenate(within, axis=1) + decay.write * d_written
    d_state = decay.total * d_end + lanes.blocks(dots.tn(keys.queries, dots.spread(d_out_read)), dots.key_pack)
    if not shared:
        return Gradients(dq, dk, dv, d_state, [[keys.q * dq - keys.k * dk]], [])
    # What the heads' own dq and dk would give.
    ends = d_out_read * dots.nn(keys.q, state) - written * d_written
    terms = [list(x) for x in zip(pairs, by_slot(ends, count), strict=True)]
    return Gradients(dq, dk, dv, d_state, terms, [jnp.sum(x, axis=0, keepdims=True) for x in pairs])
