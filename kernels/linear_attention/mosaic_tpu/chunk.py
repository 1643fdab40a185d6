"""A chunk of a grid step's block of tokens: what the kernels load of it and store."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu import per_key, scalar
from kernels.linear_attention.mosaic_tpu.dots import Dots
from kernels.linear_attention.mosaic_tpu.lanes import LANES
from kernels.linear_attention.mosaic_tpu.plan import FASTEST, LOG2E, SEGMENT_START


class Chunk:
    """The tokens of one chunk, in the blocks `refs` that a step sees.

    Attributes:
      rows: of blocks of tokens.
      index: of the chunk in the block.
      valid: [C, 1], which tokens there are, or None: all.
    """

    def __init__(self, plan, refs, index, block):
        self.plan, self.refs = plan, refs
        chunk = plan.tiles.chunk
        start = index * chunk
        self.rows = pl.ds(start if isinstance(index, int) else pl.multiple_of(start, chunk), chunk)
        self.index = index
        token = block * plan.tiles.block + start + lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
        self.valid = token < plan.time if plan.ragged else None

    def load(self, name: str, slots: int | range, width: int) -> Array:
        """[C, width] of one slot, or of several beside one another; rows after the last token are zero."""
        slots = range(slots, slots + 1) if isinstance(slots, int) else slots
        x = getattr(self.refs, name)[self.rows, slots.start * width : slots.stop * width]
        return x if self.valid is None else jnp.where(self.valid, x, jnp.zeros_like(x))

    def store(self, name: str, slots: int | range, x: Array) -> None:
        ref, slots = getattr(self.refs, name), range(slots, slots + 1) if isinstance(slots, int) else slots
        width = x.shape[1] // len(slots)
        ref[self.rows, slots.start * width : slots.stop * width] = x.astype(ref.dtype)

    def decays(self, dots: Dots) -> list[scalar.Decay]:
        """Scalar ones, of the slots of each group of the step."""
        plan = self.plan
        rows = self.refs.decay[0 if plan.constant else self.index]
        columns, groups = rows.T, map(plan.heads_of, range(plan.step_groups))
        return [scalar.decay(dots, rows, columns, plan.tiles.heads, slots, plan.value_dim) for slots in groups]

    def decays_per_key(self, dots: Dots, sums: str = "compute") -> list[per_key.Decay]:
        """Of each slot of the step: "compute" their sums, "keep" them in `refs.sums`, or "load" them."""
        plan, refs = self.plan, self.refs
        base = 1.0 if dots.exact else LOG2E
        starts = None
        if plan.starts:
            starts = jnp.broadcast_to(base * SEGMENT_START * self.starts(), (plan.tiles.chunk, plan.key_dim))
        result = []
        for slot in range(plan.tiles.heads):
            g = self.load("decay", slot, plan.key_dim).astype(jnp.float32)
            g = base * jnp.maximum(g, -1e30 if dots.exact else FASTEST)
            if dots.exact:
                cumulative = None
            elif sums == "load":
                cumulative = refs.sums[self.rows, slot * plan.key_dim : (slot + 1) * plan.key_dim]
            else:
                cumulative = per_key.cumulative_sums(dots, g, starts)
                if sums == "keep":
                    self.store("sums", slot, cumulative)
            result.append(per_key.decay(dots, g, starts, plan.bonus, cumulative))
        return result

    def starts(self) -> Array:
        """[C, 1], 1 for the first token of a segment."""
        return self.refs.starts[self.index].T[: self.plan.tiles.chunk, :1]

    def keys(self, dots: Dots, group: int) -> scalar.Keys:
        q, k = (self.load(name, group, self.plan.key_dim) for name in ("q", "k"))
        return scalar.Keys(q, k, dots.stack(q), dots.stack(k))

    def per_key_operands(self, group: int, slot: int) -> tuple[Array | None, ...]:
        """Scaled q and k, float32; the bonus."""
        q, k = (self.load(name, group, self.plan.key_dim).astype(jnp.float32) for name in ("q", "k"))
        return self.plan.scale * q, k, self.refs.bonus[slot] if self.plan.bonus else None

    def store_changes(self, columns: list[list[Array]], rows: list[Array]) -> None:
        """Of each slot: columns [C, 1], one a head, and a row [1, (h, C)] that is taken off them, into rows."""
        plan = self.plan
        lane = lax.broadcasted_iota(jnp.int32, (plan.pack * plan.tiles.chunk, LANES), 1)
        packed = jnp.zeros(lane.shape, jnp.float32)
        for slot, heads in enumerate(columns):
            packed = jnp.where(lane == slot, jnp.concatenate(heads), packed)
        changes = packed.T[: self.refs.changes.shape[1]]
        row = lax.broadcasted_iota(jnp.int32, changes.shape, 0)
        for slot, x in enumerate(rows):
            changes = jnp.where(row == slot, changes - x, changes)
        self.refs.changes[self.index] = changes
