"""Heads narrower than the 128 lanes share them: a slot holds `pack` heads side by side, an array [C, (h, x)].

A matmul contracts all lanes of a slot. What keeps the heads apart is an operand spread over rows: a copy a head, zero
in the lanes of the others. The scores of C tokens are then [C, (h, C)], one matmul for all heads of the slot, and so is
what is read with them. With one head in a slot nothing here does anything.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array

LANES = 128


def spread(x: Array, pack: int, width: int | None = None) -> Array:
    """[C, (h, x)] -> [(h, C), (h', x)], zero unless h = h', of one or several slots; x takes `width` lanes, by default
    what a head has of 128."""
    if pack == 1:
        return x
    return jnp.concatenate([x * jnp.where(own, 1.0, 0.0) for own in own_lanes(x.shape, pack, width)])


def blocks(x: Array, pack: int) -> Array:
    """[(h, C), (h', x)] -> [C, (h, x)]: the blocks of h = h'."""
    size = x.shape[0] // pack
    result = x[:size]
    for head, own in enumerate(own_lanes(result.shape, pack)):
        result = result if head == 0 else jnp.where(own, x[head * size : (head + 1) * size], result)
    return result


def transpose(x: Array, pack: int) -> Array:
    """[C, (h, j)] -> [j, (h, C)]"""
    x = spread(x, pack, x.shape[1] // pack).T
    size = x.shape[0] // pack
    rows = [x[start : start + size] for start in range(0, x.shape[0], size)]
    return sum(rows[1:], rows[0])


def own_lanes(shape: tuple[int, ...], pack: int, width: int | None = None) -> list[Array]:
    """Of each head, which lanes of one or several slots are its own."""
    width = width or LANES // pack
    lane = lax.broadcasted_iota(jnp.int32, shape, 1) & (pack * width - 1)
    return [(lane >= head * width) & (lane < (head + 1) * width) for head in range(pack)]


def over_lanes(columns: Sequence[Array], width: int) -> Array:
    """columns: [C, 128] of equal lanes, one a head. Each on `width` lanes, side by side."""
    if width >= LANES:
        return jnp.concatenate([x for x in columns for _ in range(width // LANES)], axis=1)
    lane, together = lax.broadcasted_iota(jnp.int32, columns[0].shape, 1), LANES // width
    tiles = []
    for first in range(0, len(columns), together):
        tile = columns[first]
        for place in range(1, together):
            tile = jnp.where(lane >= place * width, columns[first + place], tile)
        tiles.append(tile)
    return jnp.concatenate(tiles, axis=1)


def head_sums(arrays: Sequence[Array], pack: int) -> list[Array]:
    """[C, 1] of each head: the sum of its lanes in all `arrays` [C, (h, x)], float32."""
    by_width: dict[int, Array] = {}
    for x in arrays:
        by_width[x.shape[1]] = by_width[x.shape[1]] + x if x.shape[1] in by_width else x
    result = []
    for head in range(pack):
        tiles = []
        for x in by_width.values():
            width = x.shape[1] // pack
            if width < LANES:
                first = head * width // LANES * LANES
                tile = x[:, first : first + LANES]
                own = own_lanes(tile.shape, LANES // width)[head % (LANES // width)]
                tiles.append(jnp.where(own, tile, 0.0))
            else:
                starts = range(head * width, (head + 1) * width, LANES)
                tiles += [x[:, start : start + LANES] for start in starts]
        result.append(jnp.sum(sum(tiles[1:], tiles[0]), axis=1, keepdims=True))
    return result
