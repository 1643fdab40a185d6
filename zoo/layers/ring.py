"""Keys and values as a state: of all tokens, or of the last ones, a ring, for attention that looks no further back.

A cache is [B, G, slots, X], heads first (kernels/attention/step.py says why), and token n of a row, counted over all
calls, is in slot n % slots. `index` [B] is how many tokens the state has taken in, of all segments, and `start` [B] the
number of the current segment's first. In a ring a single token takes the place of the oldest and is read where it lies;
more of them are put behind those kept, in order.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from zoo import ops
from zoo.taken import Segments

State = Mapping[str, jax.Array]  # k, v and other caches [B, G, slots, X]; index, start [B]


def init_caches(batch: int, slots: int, heads: int, width: int, dtype: jnp.dtype) -> State:
    of_keys, of_rows = ((batch, heads, slots, width), dtype), ((batch,), jnp.int32)
    shapes = {"k": of_keys, "v": of_keys, "index": of_rows, "start": of_rows}
    return {name: jnp.zeros(*shape_and_dtype) for name, shape_and_dtype in shapes.items()}


def put(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    """`cache` [B, G, L, X] with x [B, T, G, X] from each row's slot `index` [B] on; what has no room is lost."""
    slots = index[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
    rows = jax.vmap(lambda row, at, x: row.at[:, at].set(x, mode="drop"))
    return rows(cache, slots, x.swapaxes(1, 2).astype(cache.dtype))


def numbers_in(slots: int, newest: jax.Array) -> jax.Array:
    """[B, slots] the number of the token in each slot, where that of the last is `newest` [B]; below 0: none."""
    newest = newest[:, None]
    return newest - (newest - jnp.arange(slots, dtype=jnp.int32)) % slots


def with_one(new: dict[str, jax.Array], state: State) -> tuple[dict[str, jax.Array], jax.Array]:
    """The caches with the one token of `new` [B, 1, G, X] in them, and `numbers_in` them [B, slots]."""
    index, slots = state["index"], state["k"].shape[2]
    return {name: put(state[name], x, index % slots) for name, x in new.items()}, numbers_in(slots, index)


def in_use(state: State) -> jax.Array:
    """How many slots hold a token of some row, after one more: all from there on are empty."""
    return jnp.minimum(jnp.max(state["index"]) + 1, state["k"].shape[2])


def with_many(
    new: dict[str, jax.Array], state: State, segments: Segments
) -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
    """All tokens in order, the kept ones first [B, G, slots + T, X]; ids of their segments [B, slots + T], 0 of the one
    that goes on; and the caches after the tokens that the state takes in."""
    slots, index = state["k"].shape[2], state["index"][:, None]
    kept = index + jnp.arange(-slots, 0, dtype=jnp.int32)

    def joined(cache, x):
        old = jnp.take_along_axis(cache, (kept % slots)[:, None, :, None], axis=2)
        return jnp.concatenate([old, x.swapaxes(1, 2).astype(cache.dtype)], axis=2)

    tokens = {name: joined(state[name], x) for name, x in new.items()}
    at = numbers_in(slots, state["index"] + segments.count() - 1) - index + slots
    after = {name: jnp.take_along_axis(x, at[:, None, :, None], axis=2) for name, x in tokens.items()}
    of_kept = jnp.where(kept >= state["start"][:, None], 0, -1)
    return tokens, jnp.concatenate([of_kept, segments.numbers], axis=1), after


def counts_after(state: State, segments: Segments) -> dict[str, jax.Array]:
    """`index` and `start` after the tokens that the state takes in."""
    number = segments.last_number()
    # The last segment starts at its first token here, unless all that is taken in continues the state's.
    here = state["index"] + jnp.argmax(segments.numbers == number[:, None], axis=1).astype(jnp.int32)
    return {"index": state["index"] + segments.count(), "start": jnp.where(number == 0, state["start"], here)}


def counted(x: jax.Array, segment_ids: jax.Array | Segments | None, state: State | None) -> jax.Array:
    """[B, T] how many tokens of its own segment come before each, those of earlier calls too."""
    before = jnp.zeros(x.shape[:1], jnp.int32) if state is None else state["index"] - state["start"]
    if segment_ids is None:
        return before[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
    return ops.tokens_since_start(segment_ids, before)
