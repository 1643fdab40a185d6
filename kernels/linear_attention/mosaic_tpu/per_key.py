"""A chunk of C tokens of a slot of heads whose states decay by one number a key: values in, values out.

With q scaled, b the cumulative sum of g, and r_i the part of it that q_i sees (b_i, or b_i - g_i with a bonus):

    out = A v + (q e^r) S + own v          A_ij = sum_K q_i k_j exp(r_i - b_j) for j < i, own_i = q_i . u k_i (u = 1)
    S'  = diag(e^total) S + (k e^(total - b))^T v

The pairs (i, j) are split by the highest bit in which i and j differ, their level s, a power of two. At level s
they lie on both sides of the middle m of a block of 2 s tokens, and

    A_ij = (q_i exp(r_i - b_m)) . (k_j exp(b_m - b_j))

so that each level is a matmul of two matrices with exponents that are not positive, whatever the decays; of its
result the pairs of that level count. Gradients go the same way. States are kept transposed, S^T [V, K]: decays
are then rows, which broadcast.

For bfloat16 inputs b is one cumulative sum of clamped log-decays, to the base 2; for float32 ones each exponent is the
sum of the very log-decays between the tokens, by a matmul with a matrix of ones.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.dots import Dots, grid_index

SUBLANES = 8
COMPACT = SUBLANES  # from this level on, halves of blocks are whole tiles: only the rows that count are multiplied


class Decay(NamedTuple):
    # s -> exp of the sums between a token and the middle of its block: [C, K], from COMPACT on those of the first
    # halves of blocks and those of the second, [C / 2, K], and nothing where all are 1.
    levels: dict[int, tuple[Array, ...]]
    read: Array  # e^r, [C, K]
    write: Array  # [C, K]
    total: Array  # [1, K]


def cumulative_sums(dots: Dots, g: Array, starts: Array | None) -> Array:
    """b [C, K]; arguments as in `decay`."""
    return dots.count(lambda i, j: j <= i, g if starts is None else g + starts)


def decay(dots: Dots, g: Array, starts: Array | None, bonus: bool, sums: Array | None) -> Decay:
    """g [C, K], float32; starts [C, K]: the log-decay that a segment's first token has on top, equal along K; sums: b,
    not read for float32 inputs."""
    size = g.shape[0]
    i, j = grid_index(size)
    full = g if starts is None else g + starts
    levels = {}
    if dots.exact:
        own = 0.0 if starts is None else starts

        def between(first, last):  # sums over s in (first, last], or (first, last) and the start at `last`
            inside = (j > first) & ((j < last) if bonus else (j <= last))
            return dots.nn(inside.astype(jnp.float32), full) + (own if bonus else 0.0)

        for level in level_sizes(size):
            middle = (i & -2 * level) + level - 1
            later = (i & level) != 0
            after = dots.nn(((j > i) & (j <= middle)).astype(jnp.float32), full)
            e = jnp.exp(jnp.where(later[:, :1], between(middle, i), after))
            levels[level] = (e,) if level < COMPACT else (first(e, level), second(e, level))
        read = jnp.exp(between(-1, i))
        write = jnp.exp(dots.nn((j > i).astype(jnp.float32), full))
        total = read[-1:] if not bonus else jnp.exp(jnp.sum(full, axis=0, keepdims=True))
        return Decay(levels, read, write, total)
    seen = sums - g if bonus else sums
    row = lax.broadcasted_iota(jnp.int32, g.shape, 0)
    for level in level_sizes(size):
        if level == 1 and bonus and starts is None:
            levels[level] = ()
        elif level == 1:
            levels[level] = (jnp.exp2(jnp.where((row & 1) != 0, starts if bonus else full, 0.0)),)
        elif level < COMPACT:
            middle = at_middle(sums, row, level)
            if bonus:
                exponent = jnp.minimum(jnp.where((row & level) != 0, seen - middle, middle - sums), 0.0)
            else:
                exponent = -jnp.abs(sums - middle)
            levels[level] = (jnp.exp2(exponent),)
        else:
            middle = first(at_middle(sums, row, level), level)
            exponents = middle - first(sums, level), second(seen, level) - middle
            levels[level] = tuple(jnp.exp2(jnp.minimum(x, 0.0)) for x in exponents)
    last = sums[size - 1 :]
    return Decay(levels, jnp.exp2(jnp.minimum(seen, 0.0)), jnp.exp2(jnp.minimum(last - sums, 0.0)), jnp.exp2(last))


def level_sizes(size: int) -> list[int]:
    """1, 2, 4, ... below `size`."""
    return [1 << bit for bit in range((size - 1).bit_length())]


def at_middle(sums: Array, row: Array, level: int) -> Array:
    """The sum at the last token of the first half of each block of 2 * level tokens, on all its rows; level > 1."""
    size, width = sums.shape
    block = max(2 * level, SUBLANES)
    blocks = sums.reshape(size // block, block, width)
    middle = blocks[:, level - 1 : level]
    if level == 2:
        second = lax.broadcasted_iota(jnp.int32, blocks.shape, 1) >= 4
        middle = jnp.where(second, blocks[:, 5:6], middle)
    return jnp.broadcast_to(middle, blocks.shape).reshape(size, width)


def own_scores(dots: Dots, q: Array, k: Array, u: Array | None) -> Array:
    return head_products(dots, q, k if u is None else u * k)


def head_products(dots: Dots, x: Array, y: Array) -> Array:
    """x . y of each head, [C, 1], or on all of its lanes, [C, (h, X)]."""
    sums = lanes.head_sums([x * y], dots.pack)
    if dots.pack == 1:
        return sums[0]
    return lanes.over_lanes([jnp.broadcast_to(x, (x.shape[0], lanes.LANES)) for x in sums], lanes.LANES // dots.pack)


def scores(dots: Dots, levels: dict[int, tuple[Array, ...]], q: Array, keys: Array) -> Array:
    """A [C, (h, C)], strictly below the diagonal; keys: k, spread."""
    i, j = grid_index(q.shape[0], dots.pack)
    bits = i ^ j
    result = jnp.zeros(bits.shape, jnp.float32)
    for level, e in levels.items():
        here, rows = bits >= level, dots.nt(reading(level, e, q), written(dots, level, e, keys))
        if level < COMPACT:
            result = jnp.where(here, rows, result)
        else:
            later = jnp.where(second(here, level), rows, second(result, level))
            result = interleave(first(result, level), later, level)
    return result * jnp.where(i > j, 1.0, 0.0)  # of the profiler: a select before a conversion aborts it


def reading(level: int, e: tuple[Array, ...], q: Array) -> Array:
    """q of the tokens that read at this level, times their decays."""
    if not e:
        return q
    return q * e[0] if level < COMPACT else second(q, level) * e[1]


def written(dots: Dots, level: int, e: tuple[Array, ...], keys: Array) -> Array:
    """keys [(h, C), (h, K)] times the decays of this level; 0 for tokens that read there, if they are whole tiles."""
    if not e:
        return keys
    if level < COMPACT:
        return keys * dots.copies(e[0])
    values = first(keys, level) * dots.copies(e[0])
    return interleave(values, jnp.zeros_like(values), level)


def second(x: Array, level: int) -> Array:
    """The rows in the second halves of the blocks of 2 * level, [C / 2, X]."""
    return jnp.concatenate([x[start : start + level] for start in range(level, x.shape[0], 2 * level)])


def first(x: Array, level: int) -> Array:
    return jnp.concatenate([x[start : start + level] for start in range(0, x.shape[0], 2 * level)])


def interleave(x1: Array, x2: Array, level: int) -> Array:
    """The inverse of `first` and `second`."""
    pairs = [(x1[start : start + level], x2[start : start + level]) for start in range(0, x1.shape[0], level)]
    return jnp.concatenate([x for pair in pairs for x in pair])


def update(dots: Dots, keys: Array, v: Array, decay: Decay, state: Array) -> Array:
    """S'^T [V, (h, K)] from S^T; keys: k, spread."""
    return decay.total * state + lanes.blocks(dots.tn(dots.spread(v), keys * dots.copies(decay.write)), dots.pack)


def forward(
    dots: Dots, q: Array, k: Array, keys: Array, v: Array, u: Array | None, decay: Decay, state: Array
) -> Array:
    """out [C, (h, V)], float32. q, k float32, q scaled; u [1, (h, K)] or None."""
    within = dots.nn(scores(dots, decay.levels, q, keys), dots.spread(v))
    return within + dots.nt(q * decay.read, dots.state(state)) + own_scores(dots, q, k, u) * v.astype(jnp.float32)


class Gradients(NamedTuple):
    q: Array  # of the scaled q, [C, (h, K)]
    k: Array  # [C, (h, K)]
    v: Array  # [C, (h, V)]
    reads: Array  # q . dq without the token's own key, [C, (h, K)]
    writes: Array  # k . dk likewise
    bonus: Array | None  # [1, (h, K)]
    state: Array  # of S^T


def backward(
    dots: Dots, q: Array, k: Array, v: Array, u: Array | None, d_out: Array, decay: Decay, state: Array, d_end: Array
) -> Generator[None, None, Gradients]:
    """state: S^T at the start; d_end: the gradient of S'^T; all float32 but v and d_out. For `in_turns`."""
    i, j = grid_index(q.shape[0], dots.pack)
    bits, bits_of_keys = jnp.where(i > j, i ^ j, 0), jnp.where(i < j, i ^ j, 0)
    queries, keys = lanes.spread(q, dots.pack), lanes.spread(k, dots.pack)
    d_out_spread, d_end_spread = dots.spread(d_out), dots.state(d_end)
    yield
    d_scores = dots.nt(d_out, dots.spread(v))
    d_scores_of_keys = dots.nt(v, d_out_spread)  # [j, (h, i)]
    attention = jnp.zeros_like(d_scores)
    dq = decay.read * dots.nn(d_out, dots.state(state))
    dk = decay.write * dots.nn(v, d_end_spread)
    yield
    for level, e in decay.levels.items():
        here, here_of_keys = ((x >= level) & (x < 2 * level) for x in (bits, bits_of_keys))
        k_written = written(dots, level, e, keys)
        rows = dots.nt(reading(level, e, q), k_written)
        yield
        if level < COMPACT:
            attention = jnp.where(here, rows, attention)
            dq_level = dots.nn(d_scores * jnp.where(here, 1.0, 0.0), k_written)
            q_read = queries * dots.copies(e[0]) if e else queries
            dk_level = dots.nn(d_scores_of_keys * jnp.where(here_of_keys, 1.0, 0.0), q_read)
            dq, dk = (dq + e[0] * dq_level, dk + e[0] * dk_level) if e else (dq + dq_level, dk + dk_level)
            continue
        here, here_of_keys = second(here, level), first(here_of_keys, level)
        attention = interleave(first(attention, level), jnp.where(here, rows, second(attention, level)), level)
        q_read = second(queries, level) * dots.copies(e[1])
        q_read = interleave(jnp.zeros_like(q_read), q_read, level)
        d_level, d_level_of_keys = second(d_scores, level), first(d_scores_of_keys, level)
        if 2 * level < q.shape[0]:  # the pairs of the last level are all that k_written and q_read leave
            d_level *= jnp.where(here, 1.0, 0.0)
            d_level_of_keys *= jnp.where(here_of_keys, 1.0, 0.0)
        dq2 = second(dq, level) + e[1] * dots.nn(d_level, k_written)
        dk1 = first(dk, level) + e[0] * dots.nn(d_level_of_keys, q_read)
        dq, dk = interleave(first(dq, level), dq2, level), interleave(dk1, second(dk, level), level)
    yield
    d_out32, v32 = d_out.astype(jnp.float32), v.astype(jnp.float32)
    own, d_own = own_scores(dots, q, k, u), head_products(dots, v32, d_out32)
    dv = dots.of_keys(attention, d_out_spread) + dots.nt(k * decay.write, d_end_spread) + own * d_out32
    d_state = decay.total * d_end + lanes.blocks(dots.tn(d_out_spread, queries * dots.copies(decay.read)), dots.pack)
    reads, writes = q * dq, k * dk
    uk, uq = (k, q) if u is None else (u * k, u * q)
    d_bonus = None if u is None else jnp.sum(q * k * d_own, axis=0, keepdims=True)
    return Gradients(dq + uk * d_own, dk + uq * d_own, dv, reads, writes, d_bonus, d_state)


def log_decay_gradient(dots: Dots, reads: Array, writes: Array, later: Array, bonus: bool) -> Array:
    """dg_t = sum_{s >= t} (reads_s - writes_s) + later, [C, (h, K)]; with a bonus s > t for the reads."""
    sums = dots.count(lambda i, j: j >= i, reads - writes) + later
    return sums - reads if bonus else sums
