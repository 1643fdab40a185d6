"""A block of threads of a Hopper GPU, one warpgroup: the sizes of its call, its machine, its copies, its launch."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_gpu
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, Operand
from kernels.mosaic_gpu import COLUMNS, ROWS, WGMMA, load, shared_tile, transposed

WIDEST = 128  # columns of v that a block computes


@dataclasses.dataclass(frozen=True)
class Plan:
    """One call."""

    batch: int
    time: int  # a multiple of CHUNK
    groups: int
    heads: int
    key_dim: int  # as value_dim: a multiple of CHUNK
    value_dim: int
    scale: float
    per_key: bool
    parts: int  # of the time, that are swept at once
    interpret: object
    op: str = "linear_attention"

    @property
    def machine(self) -> type:
        return Registers if self.interpret is None else Interpreted

    @property
    def sequences(self) -> int:
        return self.batch * self.heads

    @property
    def chunks(self) -> int:
        return self.time // CHUNK

    @property
    def part_chunks(self) -> int:  # the last part may have fewer
        return pl.cdiv(self.chunks, self.parts)

    @property
    def key_tiles(self) -> int:
        return self.key_dim // CHUNK

    @property
    def width(self) -> int:
        return WIDEST if self.value_dim % WIDEST == 0 else CHUNK

    @property
    def value_blocks(self) -> int:
        return self.value_dim // self.width

    @property
    def states_shape(self) -> tuple[int, int, int]:
        return self.sequences, self.chunks * self.key_dim, self.value_dim


class Registers:
    """The machine of chunk.py: values in registers, operands in shared memory, among it tiles to stage.

    A warp that has waited for a product knows nothing of the other three, which may still be reading its operands: what
    is overwritten, by a warp or by TMA, needs a barrier before.
    """

    def __init__(self, *staged, masks=None):
        """masks: [2, 64, 64] in shared memory, for `ones`, which are written here."""
        self.staged, self.masks = staged, masks
        if masks is not None:
            i, t = self.index(0), self.index(1)
            masks[0] = self.half(jnp.where(t <= i, 1.0, 0.0))
            masks[1] = self.half(jnp.where(t < i, 1.0, 0.0))
            plgpu.commit_smem()

    def index(self, axis: int) -> Operand:
        return plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=WGMMA)

    def read(self, ref: Operand, layout: Any) -> Operand:
        return load(ref, layout)

    def load(self, shared: Operand) -> Operand:
        return self.read(shared, WGMMA).astype(jnp.float32)

    def rows(self, vector: Operand, width: int) -> Operand:
        return lax.broadcast_in_dim(self.read(vector, ROWS), (CHUNK, width), [0])

    def columns(self, vector: Operand) -> Operand:
        return lax.broadcast_in_dim(self.read(vector, COLUMNS), (CHUNK, CHUNK), [1])

    def half(self, x: Operand) -> Operand:
        return x.astype(jnp.bfloat16)

    def stage_all(self, *values: Operand | Callable[[], Operand]) -> Sequence[Operand]:
        """A value may be what computes it, so that not all are in registers while warps wait for one another."""
        plgpu.commit_smem()
        staged = self.staged[: len(values)]
        for shared, x in zip(staged, values, strict=True):
            shared[...] = self.half(x() if callable(x) else x)
        plgpu.commit_smem()
        return staged

    def stage(self, x: Operand) -> Operand:
        return self.stage_all(x)[0]

    def transposed(self, shared: Operand) -> Operand:
        return transposed(shared)

    def ones(self, which: str) -> Operand:
        # Not in registers: ptxas of CUDA 13.0 sets those that are constant after the product that reads them.
        mask = self.masks.at[0 if which in ("upto", "from") else 1]
        return mask if which in ("upto", "before") else self.transposed(mask)

    def dots(self, start: Operand, *pairs: tuple[Operand, Operand]) -> Operand:
        def multiply(accumulator):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

        if start is not None:
            return pl.run_state(multiply)(plgpu.ACC.init(start))

        def from_zero(accumulator):
            multiply(accumulator)
            return accumulator[...]

        return pl.run_scoped(from_zero, plgpu.ACC((CHUNK, pairs[0][1].shape[1]), jnp.float32))


class Interpreted(Registers):
    """On a CPU, which has no layouts and whose interpreter has no accumulators. The four warps are one thread here."""

    def index(self, axis: int) -> Operand:
        return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)

    def read(self, ref: Operand, layout: Any) -> Operand:
        return ref[...]

    def half(self, x: Operand) -> Operand:  # XLA may leave out a rounding that is only a conversion there and back
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)

    def transposed(self, shared: Operand) -> Operand:
        return shared[...].T

    def dots(self, start: Operand, *pairs: tuple[Operand, Operand]) -> Operand:
        pairs = [(a[...], b[...]) for a, b in pairs]
        assert all(x.dtype == jnp.bfloat16 and x.shape[0] % CHUNK == 0 for pair in pairs for x in pair)
        products = [jnp.dot(a, b, preferred_element_type=jnp.float32) for a, b in pairs]
        return sum(products, 0.0 if start is None else start)


class Fetches(mosaic_gpu.Fetches):
    """Tiles of bfloat16, one copy each matrix of them, and vectors of float32."""

    def tile(self, name: str, *shape: int) -> None:
        self.add(name, shared_tile(self.slots, *shape), copies=math.prod(shape[:-2]))

    def vector(self, *names: str) -> None:
        for name in names:
            self.add(name, plgpu.SMEM((self.slots, CHUNK), jnp.float32))


def launch(
    plan: Plan,
    body: Callable[..., None],
    inputs: Mapping[str, Operand],
    outputs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    grid: tuple[int, ...],
    name: str,
) -> dict[str, Operand]:
    """`mosaic_gpu.launch` over sequences, chunks or parts of the time, and blocks of them."""
    name = f"{plan.op}_{'per_key' if plan.per_key else 'scalar'}_{name}"
    grid = dict(zip(("sequence", "time", "block"), grid, strict=True))
    return mosaic_gpu.launch(name, body, inputs, outputs, scratch, grid, plan.interpret)
