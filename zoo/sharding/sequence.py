"""What devices exchange where each holds a part (a shard) of every sequence. Called within `on_each_device` alone.

To all that follows it, a shard of a recurrence is an affine map of the state, S -> A S + W: W is the state that it ends
with if it starts from zero, A its whole transition. Two shards in a row are again such a map,

    (A_2, W_2) after (A_1, W_1) = (A_2 A_1, A_2 W_1 + W_2),

so the state that enters each shard is an exclusive scan of maps over the axis: 1 + log2(n) exchanges of one A and one W
between n devices, however long the sequence is. From there each device runs its op once. Gradients flow through all
of it as through any function. A convolution needs its left neighbour's last inputs alone.

A new segment cuts: a shard in which one starts, or that starts with one, has A = 0, and nothing enters its first token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.segments import segment_starts
from zoo.sharding.rules import RULES

AXIS = dict(RULES)["time"]

Arrays = dict[str, jax.Array]
Map = tuple[jax.Array, jax.Array]  # A, which broadcasts to W, and W


def carried(
    function: Callable[[Arrays], tuple[Any, jax.Array]],
    carry: Callable[[Arrays], Map],
    apply: Callable[[jax.Array, jax.Array], jax.Array] = jnp.multiply,
) -> Callable[[Arrays], tuple[Any, jax.Array]]:
    """A recurrent op on shards, from what it does on a whole sequence.

    Args:
      function: from the op's arrays, `initial_state` [B, ...] among them, to its outputs and its final state.
      carry: from the arrays without `initial_state` to (A, W) of a shard that no segment's start cuts. W itself stops
        at starts of segments.
      apply: A S, and A_2 A_1; `jnp.matmul` for transitions that are matrices.
    """

    def compose(left: Map, right: Map) -> Map:
        return apply(right[0], left[0]), apply(right[0], left[1]) + right[1]

    def run(arrays: Arrays) -> tuple[Any, jax.Array]:
        initial = arrays.get("initial_state")
        arrays = {name: array for name, array in arrays.items() if name != "initial_state"}
        transition, written = carry(arrays)
        ids = arrays.get("segment_ids")
        if ids is not None:
            of_rows = lambda flags: flags.reshape(-1, *(1,) * (written.ndim - 1))  # noqa: E731
            enters = of_rows(_continues(ids))
            transition = jnp.where(enters & of_rows(~segment_starts(ids).any(1)), transition, 0)
        # The first map of all is the constant initial state.
        initial = jnp.zeros_like(written) if initial is None else initial.astype(written.dtype)
        _, state = before(compose, (transition, written), (jnp.zeros_like(transition), initial))
        out, final_state = function(arrays | {"initial_state": state if ids is None else jnp.where(enters, state, 0)})
        return out, from_last(final_state)

    return run


def convolved(function: Callable[[Arrays], tuple[Any, jax.Array]], name: str, width: int) -> Callable:
    """A function of each token and of `width` tokens before it, on shards.

    Args:
      function: from its arrays, `initial_state` [B, width, ...] among them, to its outputs and its final state.
      name: of the array that the function looks back in.
      width: no longer than a shard, unless no initial state is given.
    """

    def run(arrays: Arrays) -> tuple[Any, jax.Array]:
        initial, ids = arrays.get("initial_state"), arrays.get("segment_ids")
        x = arrays[name]
        entering = halo(x, width)
        if ids is not None:  # as far back as token 0's own segment goes
            seen = jnp.concatenate([halo(ids, width), ids[:, :1]], 1)
            starts = jnp.flip(jnp.cumsum(jnp.flip(seen[:, 1:] != seen[:, :-1], 1), 1), 1)
            entering = jnp.where((starts == 0).reshape(*starts.shape, *(1,) * (x.ndim - 2)), entering, 0)
        # What was before the whole sequence belongs to the segment of its token 0.
        initial = jnp.zeros_like(entering) if initial is None else initial.astype(x.dtype)
        entering = jnp.where(lax.axis_index(AXIS) == 0, initial, entering)
        out, final_state = function(arrays | {"initial_state": entering})
        return out, from_last(final_state)

    return run


def before(compose: Callable, total: Any, first: Any) -> Any:
    """`first`, then `total` of all shards on the left of this one, composed: an exclusive scan over the axis."""
    shards, index = lax.axis_size(AXIS), lax.axis_index(AXIS)
    select = lambda mask, a, b: jax.tree.map(lambda a, b: jnp.where(mask, a, b), a, b)  # noqa: E731
    found, reach = select(index == 0, first, _from_left(total, 1)), 1
    while reach < shards:
        found = select(index >= reach, compose(_from_left(found, reach), found), found)
        reach *= 2
    return found


def halo(x: jax.Array, width: int) -> jax.Array:
    """The `width` tokens before this shard's first one, [B, width, ...]; zeros where there are none."""
    length, pieces, distance = x.shape[1], [], 1
    while width > 0:
        taken = min(width, length)
        pieces.insert(0, _from_left(x[:, length - taken :], distance))
        width, distance = width - taken, distance + 1
    return jnp.concatenate(pieces, 1) if pieces else x[:, :0]


def halo_after(x: jax.Array, width: int) -> jax.Array:
    """The `width` tokens after this shard's last one, [B, width, ...]; zeros where there are none."""
    return jnp.flip(mirrored(halo(reversed_time(x), width)), 1)


def reversed_time(x: jax.Array) -> jax.Array:
    """This shard's part of the sequence from its last token to its first."""
    return jnp.flip(mirrored(x), 1)


def gathered(x: jax.Array) -> jax.Array:
    """All tokens, [B, T, ...], on every device."""
    return lax.all_gather(x, AXIS, axis=1, tiled=True)


def mirrored(x: jax.Array) -> jax.Array:
    """What the shard at the same distance from the other end of the sequence holds."""
    shards = lax.axis_size(AXIS)
    return lax.ppermute(x, AXIS, [(i, shards - 1 - i) for i in range(shards)])


def from_last(x: jax.Array) -> jax.Array:
    """The last shard's value, on every device."""
    return lax.psum(jnp.where(lax.axis_index(AXIS) == lax.axis_size(AXIS) - 1, x, 0), AXIS)


def segment_numbers(segment_ids: jax.Array) -> jax.Array:
    """`kernels.segments.segment_numbers` of the whole sequence: equal for tokens of one segment only."""
    starts = segment_starts(segment_ids).at[:, 0].set(~_continues(segment_ids))
    inside = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    return inside + before(jnp.add, inside[:, -1], jnp.zeros_like(inside[:, -1]))[:, None]


def _continues(segment_ids: jax.Array) -> jax.Array:
    """[B] whether token 0 of this shard is of the segment before it; of the first shard it is."""
    return (segment_ids[:, 0] == _from_left(segment_ids[:, -1], 1)) | (lax.axis_index(AXIS) == 0)


def _from_left(x: Any, distance: int) -> Any:
    """What the shard `distance` places to the left holds; zeros where there is none."""
    shards = lax.axis_size(AXIS)
    pairs = [(i, i + distance) for i in range(shards - distance)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, pairs) if pairs else jnp.zeros_like(x), x)
