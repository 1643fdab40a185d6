"""A chunk of a grid step's block of tokens: what the kernels load of it and store."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.array_typing import Array
from kernels.linear_attention.mosaic_tpu import per_key, scalar
from kernels.linear_attention.mosaic_tpu.dots import LANES, Dots
from kernels.linear_attention.mosaic_tpu.plan import FASTEST, SEGMENT_START


class Chunk:
    """The tokens of one chunk, in the blocks `refs` that a step sees.

    Attributes:
      rows: of blocks of tokens.
      lanes: of rows of sums of scalar decays, which all chunks share where the decay is constant.
      valid: [C, 1], which tokens there are, or None: all.
    """

    def __init__(self, plan, refs, index, block):
        self.plan, self.refs = plan, refs
        chunk = plan.tiles.chunk
        start = index * chunk
        self.rows = pl.ds(start if isinstance(index, int) else pl.multiple_of(start, chunk), chunk)
        self.lanes = pl.ds(0, chunk) if plan.constant else self.rows
        token = block * plan.tiles.block + start + lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
        self.valid = token < plan.time if plan.ragged else None

    def load(self, name: str, head: int | Array, width: int) -> Array:
        """[C, width] of one head; rows after the last token are zero."""
        x = getattr(self.refs, name)[self.rows, head * width : (head + 1) * width]
        return x if self.valid is None else jnp.where(self.valid, x, jnp.zeros_like(x))

    def store(self, name: str, head: int | Array, x: Array) -> None:
        ref, width = getattr(self.refs, name), x.shape[1]
        ref[self.rows, head * width : (head + 1) * width] = x.astype(ref.dtype)

    def decays(self, dots: Dots, sums: str = "compute") -> list[per_key.Decay | scalar.Decay]:
        """Of each head of the step. Sums of decays per key: "compute" them, "keep" them in `refs.sums`, "load" them."""
        plan, refs = self.plan, self.refs
        if not plan.per_key:
            return scalar.decays(dots, refs.decay[:, self.lanes], plan.tiles.heads)
        starts = None
        if plan.starts:
            column = SEGMENT_START * refs.starts[:, self.rows].T[:, :1]
            starts = jnp.broadcast_to(column, (plan.tiles.chunk, plan.key_dim))
        result = []
        for head in range(plan.tiles.heads):
            g = self.load("decay", head, plan.key_dim).astype(jnp.float32)
            g = jnp.maximum(g, -1e30 if dots.exact else FASTEST)
            if dots.exact:
                cumulative = None
            elif sums == "load":
                cumulative = refs.sums[self.rows, head * plan.key_dim : (head + 1) * plan.key_dim]
            else:
                cumulative = per_key.cumulative_sums(dots, g, starts)
                if sums == "keep":
                    self.store("sums", head, cumulative)
            result.append(per_key.decay(dots, g, starts, plan.bonus, cumulative))
        return result

    def keys(self, group: int | Array, *names: str) -> list[Array]:
        return [self.load(name, group, self.plan.key_dim) for name in names]

    def per_key_operands(self, q: Array, k: Array, head: int | Array) -> tuple[Array | None, ...]:
        u = self.refs.bonus[head] if self.plan.bonus else None
        return self.plan.scale * q.astype(jnp.float32), k.astype(jnp.float32), u

    def store_changes(self, columns: list[Array]) -> None:
        """Columns [C, 1], one a head, as rows of `changes`."""
        size = columns[0].shape[0]
        rows = self.refs.changes.shape[0]
        lane = lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
        packed = jnp.zeros((size, LANES), jnp.float32)
        for head, column in enumerate(columns):
            packed = jnp.where(lane == head, column, packed)
        self.refs.changes[:, self.rows] = packed.T[:rows]
