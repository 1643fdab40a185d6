"""What a call of the kernels is: its padded sizes, its tiles, and the grid that follows from them.

The grid is (batch, head blocks that share no q and k, time blocks, head blocks that share them), the last two in
order. Heads of v that share q and k are in the last axis, so that q and k are loaded once. What is counted as a head is
a slot of lanes, in which several narrow heads may lie side by side (`lanes.py`).
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.linear_attention.specs import Tiles

FASTEST = -50.0  # log-decays of bfloat16 calls: e^-50 leaves nothing, and sums of more extreme ones lose digits
LOG2E = 1.4426950408889634  # of bfloat16 calls, whose log-decays are to the base 2 in the kernels
SEGMENT_START = -128.0  # exp of it is 0 in float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call: padded sizes, tiles, and what it has. `tiles.heads` slots of v are computed in a step."""

    batch: int
    time: int
    groups: int  # slots of q and k
    heads: int  # slots of v
    key_dim: int  # lanes of a slot
    value_dim: int
    pack: int  # heads of v in a slot
    key_pack: int  # heads of q and k in a slot: `pack`, or 1 where those of v share them
    dtype: jnp.dtype
    scale: float
    tiles: Tiles
    per_key: bool
    bonus: bool
    starts: bool  # per-key decays: a row of segment starts; scalar ones have them in their sums
    constant: bool  # scalar decays that are the same in every chunk
    interpret: object

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
    def state_shape(self) -> tuple[int, int]:  # of one slot
        rows, lanes = (self.value_dim, self.key_dim) if self.per_key else (self.key_dim, self.value_dim)
        return rows // self.key_pack, lanes

    @property
    def dots(self) -> Dots:
        return Dots(self.dtype, self.pack, self.key_pack)

    def heads_of(self, group: int) -> range:  # of v, of a step, that read head `group` of its q and k
        count = self.tiles.heads // self.step_groups
        return range(group * count, (group + 1) * count)
