"""What a call of the kernels is: its padded sizes, its tiles, and the grid that follows from them.

The grid is (batch, head blocks that share no q and k, time blocks, head blocks that share them), the last two in
order. Heads of v that share q and k are in the last axis, so that q and k are loaded once.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.delta_rule.mosaic_tpu.scalar import rows_per_head
from kernels.delta_rule.specs import TILE, Tiles
from kernels.linear_attention.mosaic_tpu.dots import Dots


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call. `tiles.heads` of v are computed in a step, TILE tokens at a time, which are `chunks` chunks."""

    batch: int
    time: int
    groups: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: jnp.dtype
    scale: float
    tiles: Tiles
    per_key: bool
    interpret: object

    @property
    def chunks(self) -> int:  # of a tile
        return TILE // self.tiles.chunk

    @property
    def shared(self) -> int:  # heads of v that share q and k
        return self.heads // self.groups

    @property
    def step_groups(self) -> int:  # heads of q and k of a step
        return max(1, self.tiles.heads // self.shared)

    @property
    def inner(self) -> int:  # steps that share q and k
        return max(1, self.shared // self.tiles.heads)

    @property
    def outer(self) -> int:
        return self.heads // (self.inner * self.tiles.heads)

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.time, self.tiles.block)

    @property
    def ragged(self) -> bool:
        return self.time % self.tiles.block != 0

    @property
    def rows(self) -> int:  # of numbers that a step reads of each token
        return self.tiles.heads * (1 if self.per_key else 1 + rows_per_head(Dots(self.dtype)))

    @property
    def row_padding(self) -> int:
        return -self.rows % 8

    def heads_of(self, group: int) -> range:  # of v, of a step, that read head `group` of its q and k
        count = self.tiles.heads // self.step_groups
        return range(group * count, (group + 1) * count)
