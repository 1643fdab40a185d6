"""What a call of the kernels is: the grid, and what of the op it has.

What is counted as a head is a slot of lanes, in which several narrow heads may lie side by side (`lanes.py`).
"""

import dataclasses

from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.mosaic_tpu.heads import HeadGrid

FASTEST = -50.0  # log-decays of bfloat16 calls: e^-50 leaves nothing, and sums of more extreme ones lose digits
LOG2E = 1.4426950408889634  # of bfloat16 calls, whose log-decays are to the base 2 in the kernels
SEGMENT_START = -128.0  # exp of it is 0 in float32


@dataclasses.dataclass(frozen=True)
class SlotGrid(HeadGrid):
    """`tiles.heads` slots of v are computed in a step."""

    pack: int  # heads of v in a slot
    key_pack: int  # heads of q and k in a slot: `pack`, or 1 where those of v share them

    @property
    def state_shape(self) -> tuple[int, int]:  # of one slot
        rows, lanes = (self.value_dim, self.key_dim) if self.per_key else (self.key_dim, self.value_dim)
        return rows // self.key_pack, lanes

    @property
    def dots(self) -> Dots:
        return Dots(self.dtype, self.pack, self.key_pack)


@dataclasses.dataclass(frozen=True)
class Plan(SlotGrid):
    bonus: bool
    starts: bool  # per-key decays: a row of segment starts; scalar ones have them in their sums
    constant: bool  # scalar decays that are the same in every chunk
