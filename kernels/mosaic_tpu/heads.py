"""The grid of a recurrence over tokens and heads, and its Pallas calls: what each grid step sees.

The grid is (batch, head blocks that share no q and k, time blocks, head blocks that share them), the last two in
order. Heads of v that share q and k are in the last axis, so that q and k are loaded once. q, k, v stay as
[B, T, heads * X], of which a block of lanes is some heads: nothing is transposed in memory. What is counted as a head
may be a slot of lanes, in which several narrow heads lie side by side.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.array_typing import Array

VMEM_LIMIT = 100 * 2**20  # bytes; of 128 MiB on v5e and v6e


@dataclasses.dataclass(frozen=True)
class HeadGrid:
    """One call: padded sizes, and tiles, of which a step computes `block` tokens of `heads` heads of v."""

    batch: int
    time: int
    groups: int  # of q and k
    heads: int  # of v
    key_dim: int  # lanes of a head
    value_dim: int
    dtype: jnp.dtype
    scale: float
    tiles: Any
    per_key: bool  # decays
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

    def heads_of(self, group: int) -> range:  # of v, of a step, that read head `group` of its q and k
        count = self.tiles.heads // self.step_groups
        return range(group * count, (group + 1) * count)

    def first_head(self) -> int | Array:  # of the step that runs, among those of the states in VMEM
        return pl.program_id(3) * self.tiles.heads if self.inner > 1 else 0


Outputs = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name
Block = Callable[[Callable, str, tuple[int, ...]], pl.BlockSpec | None]


def call(
    grid: HeadGrid,
    op: str,
    kernel: Callable[[Any, Any], None],
    inputs: dict[str, Array],
    outputs: Outputs,
    block: Block = lambda spec, name, shape: None,
    scratch: dict[str, Any] | None = None,
    reverse: bool = False,
) -> dict[str, Array]:
    """The outputs by name of `kernel(grid, refs)`, whose references have the names of `inputs`, `outputs`, `scratch`.

    Args:
      op: in the kernel's name, `{op}_{scalar or per_key}_{kernel's name}`.
      block: (spec, name, shape) -> the block of an operand, or None: what its name says (`_block`).
        spec(block, index) makes one; index(batch, head block that shares no q and k, time block, head block) is its
        place.
      reverse: time blocks go from right to left.
    """
    scratch = scratch or {}
    names = [*inputs, *outputs, *scratch]

    def spec(shape, index):
        def place(b, p, n, s):
            return index(b, p, grid.blocks - 1 - n if reverse else n, p * grid.inner + s)

        return pl.BlockSpec(shape, place)

    def specs(shapes):
        return [block(spec, name, shape) or _block(grid, spec, name, shape) for name, shape in shapes.items()]

    results = pl.pallas_call(
        functools.partial(_with_names, kernel, grid, names),
        grid=(grid.batch, grid.outer, grid.blocks, grid.inner),
        in_specs=specs({name: array.shape for name, array in inputs.items()}),
        out_specs=specs({name: shape for name, (shape, _) in outputs.items()}),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=grid.interpret,
        name=f"{op}_{'per_key' if grid.per_key else 'scalar'}_{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))


def _with_names(kernel, grid, names, *refs):
    kernel(grid, SimpleNamespace(**dict(zip(names, refs, strict=True))))


def values_block(grid: HeadGrid, spec: Callable, width: int) -> pl.BlockSpec:
    """Of [B, T, heads * width]."""
    return spec((None, grid.tiles.block, grid.tiles.heads * width), lambda b, p, n, h: (b, n, h))


def _block(grid, spec, name, shape):
    """The block of an operand by its name."""
    tiles = grid.tiles
    if name in ("q", "k", "dq", "dk"):
        return spec((None, tiles.block, grid.step_groups * grid.key_dim), lambda b, p, n, h: (b, n, p))
    if name in ("v", "out", "d_out", "dv"):
        return values_block(grid, spec, grid.value_dim)
    if name in ("decay", "d_decay"):
        return values_block(grid, spec, grid.key_dim)
    if name == "kept":
        return spec((None, None, tiles.heads, *shape[3:]), lambda b, p, n, h: (b, n, h, 0, 0))
    if name not in ("state", "initial_state", "d_state", "d_final_state", "d_bonus"):
        raise KeyError(name)
    # Of all heads of the inner axis, in place for the whole sequence.
    return spec((None, grid.inner * tiles.heads, *shape[2:]), lambda b, p, n, h: (b, p, 0, 0))


def key_sums(grid: HeadGrid) -> dict[str, Any]:
    """Scratch of a backward kernel: what steps that share q and k add up of their gradients."""
    if grid.inner == 1:
        return {}
    return {name: pltpu.VMEM((grid.tiles.block, grid.key_dim), jnp.float32) for name in ("dq_sum", "dk_sum")}


def start_key_sums(grid: HeadGrid, refs: Any) -> None:
    if grid.inner > 1:

        @pl.when(pl.program_id(3) == 0)
        def _():
            refs.dq_sum[...] = jnp.zeros_like(refs.dq_sum)
            refs.dk_sum[...] = jnp.zeros_like(refs.dk_sum)


def finish_key_sums(grid: HeadGrid, refs: Any) -> None:
    if grid.inner > 1:

        @pl.when(pl.program_id(3) == grid.inner - 1)
        def _():
            refs.dq[...] = refs.dq_sum[...].astype(grid.dtype)
            refs.dk[...] = refs.dk_sum[...].astype(grid.dtype)


def over_pieces(count: int, unroll: int, body: Callable[[list], None], reverse: bool = False) -> None:
    """`body` of the indices of `count` pieces of a step, `unroll` at a time, or one by one where that is no divisor."""
    unroll = unroll if count % unroll == 0 else 1

    def some(i, carry):
        indices = [i * unroll + n for n in range(unroll)]
        body([count - 1 - index for index in indices] if reverse else indices)
        return carry

    if count == unroll:
        some(0, 0)
    else:
        jax.lax.fori_loop(0, count // unroll, some, 0)
