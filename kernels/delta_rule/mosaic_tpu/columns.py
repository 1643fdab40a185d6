"""Numbers of the tokens of a tile, as rows and as columns over lanes."""

import functools

import jax.numpy as jnp

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu.lanes import LANES

SUBLANES = 8


def over_lanes(x: Array, width: int) -> Array:
    """x [C, 128] of equal lanes, on `width` lanes, a multiple of 128."""
    return jnp.concatenate([x] * (width // LANES), axis=1) if width > LANES else x


class Numbers:
    """Of each kind a row a head, the kinds at multiples of 8 rows."""

    def __init__(self, rows: Array, heads: int):
        self.rows, self.heads, self.stride = rows, heads, padded(heads)

    @functools.cached_property
    def columns(self) -> Array:
        return self.rows.T

    def kind(self, kind: int) -> Array:  # [heads and padding, C]
        return self.rows[kind * self.stride : (kind + 1) * self.stride]

    def row(self, kind: int, head: int) -> Array:  # [1, C]
        return self.rows[kind * self.stride + head : kind * self.stride + head + 1]

    def column(self, kind: int, head: int, rows: slice = slice(None)) -> Array:  # [c, 128]
        index = kind * self.stride + head
        column = self.columns[rows, index : index + 1]
        return jnp.broadcast_to(column, (column.shape[0], LANES))

    def more(self, rows: Array) -> "Numbers":
        """With a kind after the others."""
        return Numbers(jnp.concatenate([self.rows, rows]), self.heads)


def padded(heads: int) -> int:
    """Rows of a kind."""
    return heads + -heads % SUBLANES
