"""Sweeps over tokens that carry a state [K, V] of each head: what the token-by-token forms for CPUs are made of.

XLA turns a step into kernels that it runs one after the other: two or three of them work, the others copy a row or
count. What makes a step fast on a CPU:

- It reads and updates the states of a few sequences at a time, as many as a core's first-level cache holds.
- It takes its rows where they lie in [B, T, H, X]: nothing is transposed or cut into blocks beforehand.
- The state is updated in place, which XLA does only if nothing has to read the old one later: a step reads the old
  state if the update needs what it read, and else the new one, for the token after (`then` of `sweep`).
- All that a step gives out is one array: XLA runs a step of more than eight kernels in a slower way.

A single token has no loop: of a loop of one turn XLA makes straight code, which reads the old states after it has
written the new ones, and so copies all states for each few of them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels.array_typing import Array
from kernels.divisors import largest_divisor

CACHE_FLOATS = 10 * 1024  # of the states that a sweep updates together: 40 KiB of 48, or a little more than 32


def sweep(
    step: Callable[..., tuple[Array, Sequence[Array]]],
    state: Array,
    now: Sequence[Array | None],
    then: Sequence[Array | None] = (),
    *,
    reverse: bool = False,
) -> tuple[list[Array], Array]:
    """All rows, and the last state, of: state, rows = step(state, *now of a token, *then of the token after it).

    state [B, H, K, V]; now, then and the rows given out [B, T, H, X], with 1 for an axis that they do not vary along.
    A step has them of N sequences, [N, K, V] and [N, X], and of a single token of all, [B, H, K, V] and [B, H, X]; None
    stays None. The last token has itself for the token
    after. In reverse tokens come from right to left, and the one after is to the left.
    """
    batch, num_heads, *shape = state.shape
    time = max(x.shape[1] for x in (*now, *then) if x is not None)
    if time == 1:

        def all_rows(x):
            return None if x is None else jnp.broadcast_to(x[:, 0], (batch, num_heads, x.shape[3]))

        state, given = step(state, *map(all_rows, now), *map(all_rows, then))
        return [row[:, None] for row in given], state
    batch_block, head_block = state_block(batch, num_heads, shape[0] * shape[1])
    count = batch_block * head_block

    def rows(x, b, t, h):
        if x is None:
            return None
        sizes = tuple(map(min, x.shape, (batch_block, 1, head_block, x.shape[3])))
        x = jax.lax.dynamic_slice(x, (b, t, h, 0), sizes, allow_negative_indices=False)
        return jnp.broadcast_to(x, (batch_block, 1, head_block, x.shape[3])).reshape(count, -1)

    def token(state, t, b, h):
        after = t - 1 if reverse else t + 1
        return step(state, *(rows(x, b, t, h) for x in now), *(rows(x, b, after, h) for x in then))

    given = jax.eval_shape(token, jnp.zeros((count, *shape), state.dtype), 0, 0, 0)[1]
    widths = [row.shape[1] for row in given]
    pads = [((0, 0), (0, max(widths) - width)) for width in widths]

    def block(i, carry):
        states, out = carry
        b, h = i // (num_heads // head_block) * batch_block, i % (num_heads // head_block) * head_block

        def body(i, carry):
            state, out = carry
            t = time - 1 - i if reverse else i
            state, given = token(state, t, b, h)
            given = jnp.stack([jnp.pad(row, pad) for row, pad in zip(given, pads, strict=True)], axis=1)
            given = given.reshape(batch_block, 1, head_block, *given.shape[1:])
            return state, jax.lax.dynamic_update_slice(out, given, (b, t, h, 0, 0), allow_negative_indices=False)

        sizes = (batch_block, head_block, *shape)
        first = jax.lax.dynamic_slice(states, (b, h, 0, 0), sizes).reshape(count, *shape)
        last, out = jax.lax.fori_loop(0, time, body, (first, out))
        return jax.lax.dynamic_update_slice(states, last.reshape(sizes), (b, h, 0, 0)), out

    out = jnp.zeros((batch, time, num_heads, len(widths), max(widths)), state.dtype)
    blocks = (batch // batch_block) * (num_heads // head_block)
    last, out = jax.lax.fori_loop(0, blocks, block, (state, out))
    return [out[..., i, :width] for i, width in enumerate(widths)], last


def state_block(batch: int, num_heads: int, state_size: int) -> tuple[int, int]:
    """Batch entries and heads whose states, `state_size` floats each, a sweep updates together."""
    heads = largest_divisor(num_heads, CACHE_FLOATS // state_size)
    return (largest_divisor(batch, CACHE_FLOATS // (state_size * heads)) if heads == num_heads else 1), heads


def outer(a: Array, b: Array) -> Array:
    return a[..., :, None] * b[..., None, :]


def read(state: Array, key: Array) -> Array:
    """S^T k."""
    return jnp.einsum("...kv,...k->...v", state, key, precision="highest")


def read_transposed(state: Array, value: Array) -> Array:
    """S v."""
    return jnp.einsum("...kv,...v->...k", state, value, precision="highest")


def scaled(x: Array, decay: Array | None) -> Array:
    """Rows of a state, or numbers of a key, times their decay [..., K|1]."""
    if decay is None:
        return x
    return x * (decay if x.ndim == decay.ndim else decay[..., None])


def dot(a: Array, b: Array) -> Array:
    """a . b, [..., 1]: a tenth of the time that XLA takes for a sum over the last axis."""
    return jnp.einsum("...x,...x->...", a, b, precision="highest")[..., None]


def decays(log_decay: Array | None, starts: Array | None, dtype: DTypeLike) -> Array | None:
    """What a token leaves of each row of the state; None for all of it."""
    decay = None if log_decay is None else jnp.exp(log_decay.astype(dtype))
    if starts is None:
        return decay
    return jnp.where(starts, 0, jnp.ones((), dtype) if decay is None else decay)


def shift(x: Array, first: Array, reverse: bool = False) -> Array:
    """x [B, T, ...] one token later (earlier, in reverse), with `first` [B, ...] in the place set free."""
    first = first[:, None]
    return jnp.concatenate([x[:, 1:], first] if reverse else [first, x[:, :-1]], axis=1)


def suffix_sums(x: Array, block_size: int = 64) -> Array:
    """Sums over the tokens of [B, T, ...] from each to the last: token by token in all blocks at once, then blocks."""
    batch, time, *rest = x.shape
    size = min(block_size, time)
    blocks = jnp.pad(x, ((0, 0), (0, -time % size), *((0, 0) for _ in rest))).reshape(batch, -1, size, *rest)

    def add(i, carry):
        sums, total = carry
        total = total + jax.lax.dynamic_index_in_dim(sums, size - 1 - i, axis=2, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, total, size - 1 - i, axis=2), total

    inside, totals = jax.lax.fori_loop(0, size, add, (blocks, jnp.zeros_like(blocks[:, :, 0])))
    later = jax.lax.cumsum(shift(totals, jnp.zeros_like(totals[:, 0]), reverse=True), axis=1, reverse=True)
    return (inside + later[:, :, None]).reshape(batch, -1, *rest)[:, :time]


def log_decay_gradient(terms: Array, end: Array, starts: Array | None, log_decay: Array) -> Array:
    """sum_{s >= t} terms_s + sum_v end, 0 at the starts of segments; summed over K where log_decay [B, T, H, 1] is."""
    if log_decay.shape[-1] == 1:
        terms, end = dot(terms, jnp.ones_like(terms)), jnp.sum(end, axis=-2, keepdims=True)
    sums = suffix_sums(terms) + jnp.sum(end, axis=-1)[:, None]
    return (sums if starts is None else jnp.where(starts, 0, sums)).astype(log_decay.dtype)
