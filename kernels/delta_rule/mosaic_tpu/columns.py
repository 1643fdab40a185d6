"""Numbers of the tokens of a tile, as rows and as columns over lanes."""

import functools

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu import lanes
from kernels.linear_attention.mosaic_tpu.lanes import LANES

SUBLANES = 8


def over_lanes(x: Array, width: int) -> Array:
    """x [C, 128], of equal lanes if they are to be more: on `width` lanes, a multiple of 128."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


class Numbers:
    """Of each kind a row a slot, (h, C), the kinds at multiples of 8 rows."""

    def __init__(self, rows: Array, slots: int, pack: int):
        self.rows, self.slots, self.pack, self.stride = rows, slots, pack, padded(slots)

    @functools.cached_property
    def columns(self) -> Array:
        return self.rows.T

    def kind(self, kind: int) -> Array:  # [slots and padding, (h, C)]
        return self.rows[kind * self.stride : (kind + 1) * self.stride]

    def row(self, kind: int, slot: int) -> Array:  # [1, (h, C)]
        return self.rows[kind * self.stride + slot : kind * self.stride + slot + 1]

    def column(self, kind: int, slot: int, rows: slice = slice(None)) -> Array:
        """[c, 128], each head's on its lanes."""
        index, size = kind * self.stride + slot, TILE // self.pack
        column = self.columns[:, index : index + 1]
        heads = [column[start : start + size][rows] for start in range(0, TILE, size)]
        return lanes.over_lanes([jnp.broadcast_to(x, (x.shape[0], LANES)) for x in heads], LANES // self.pack)

    def more(self, rows: Array) -> "Numbers":
        """With a kind after the others."""
        return Numbers(jnp.concatenate([self.rows, rows]), self.slots, self.pack)


def padded(slots: int) -> int:
    """Rows of a kind."""
    return slots + -slots % SUBLANES
