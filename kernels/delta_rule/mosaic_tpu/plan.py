"""What a call of the kernels is: the grid, and the tiles of a step's tokens."""

import dataclasses

from kernels.delta_rule.mosaic_tpu import scalar
from kernels.delta_rule.mosaic_tpu.columns import padded
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.mosaic_tpu.heads import HeadGrid


@dataclasses.dataclass(frozen=True)
class Plan(HeadGrid):
    """`tiles.heads` of v are computed in a step, TILE tokens at a time, which are `chunks` chunks."""

    @property
    def chunks(self) -> int:  # of a tile
        return TILE // self.tiles.chunk

    @property
    def dots(self) -> Dots:
        return Dots(self.dtype)

    @property
    def kinds(self) -> int:  # of numbers that a step reads of each token and head
        return 1 if self.per_key else scalar.kinds(self.dots)

    @property
    def rows(self) -> int:
        return self.kinds * padded(self.tiles.heads)
