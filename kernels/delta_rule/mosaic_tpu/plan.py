"""What a call of the kernels is: the grid, and the tiles of a step's tokens."""

import dataclasses

from kernels.delta_rule.mosaic_tpu import scalar
from kernels.delta_rule.mosaic_tpu.columns import padded
from kernels.delta_rule.specs import TILE
from kernels.linear_attention.mosaic_tpu.plan import SlotGrid


@dataclasses.dataclass(frozen=True)
class Plan(SlotGrid):
    """A step goes through its tokens a tile at a time: TILE, which are `chunks` chunks, or one chunk of each of the
    `pack` heads of a slot."""

    @property
    def tokens(self) -> int:  # of a tile
        return TILE // self.pack

    @property
    def chunks(self) -> int:  # of a tile
        return self.tokens // self.tiles.chunk

    @property
    def kinds(self) -> int:  # of numbers that a step reads of each token and head
        return 1 if self.per_key else scalar.kinds(self.dots)

    @property
    def rows(self) -> int:
        return self.kinds * padded(self.tiles.heads)
