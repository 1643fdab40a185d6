"""Pallas Mosaic GPU (Hopper): the names that differ between jax 0.10 and 0.12, copies, and launches."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels import dispatch
from kernels.array_typing import Array

WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)  # of vectors: one number a row of a WGMMA tile, or a column

# jax 0.12 defaults to the other lowering, which did not find the layouts of such kernels.
_LANE = {"lowering_semantics": plgpu.LoweringSemantics.Lane, "approx_math": True}
_IS_0_10 = jax.__version_info__ < (0, 11)
if _IS_0_10:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
else:
    InterpretGPUParams = plgpu.InterpretGPUParams


def load(ref: Any, layout: Any) -> Array:
    """A reference in shared or global memory, in registers laid out as `layout`."""
    if _IS_0_10:
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, x: Array) -> None:
    """Registers in shared or global memory, in whatever layout they are."""
    if hasattr(plgpu, "store"):  # jax 0.12 would refuse some that have bank conflicts
        plgpu.store(ref, x, optimized=False)
    else:
        ref[...] = x


def transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if _IS_0_10 else ref.transpose((1, 0))


def shared_tile(*shape: int, dtype: DTypeLike = jnp.bfloat16) -> Any:
    """Shared memory that TMA fills and wgmma reads: rows of 128 bytes, swizzled."""
    transforms = (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


_interpret: contextvars.ContextVar[InterpretGPUParams | None] = contextvars.ContextVar("interpret", default=None)


@contextlib.contextmanager
def use_interpret(params: InterpretGPUParams | None) -> Iterator[None]:
    """While tracing: let a CPU interpret kernels, as tests do (None: not). It is slow, and refuses `jax.checkpoint`."""
    token = _interpret.set(params)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpret() -> InterpretGPUParams | None:
    """What `launch` is given as `interpret` on this device.

    Raises:
      NotImplementedError: neither a Hopper GPU nor a CPU inside of `use_interpret`.
    """
    device = dispatch.device()
    if device.is_hopper:
        return None
    if device.platform != "cpu" or _interpret.get() is None:
        raise NotImplementedError(f"it is a kernel for Hopper GPUs, not for {device.kind}")
    return _interpret.get()


MULTIPROCESSORS = 132  # of an H100 or H200
SHORTEST_PART = 8  # chunks: a part costs a state read and written


def time_parts(blocks: int, chunks: int) -> int:
    """Parts of the time to run at once, where one would have `blocks` of threads; none is empty. Unmeasured.

    More than one read their operands twice: as many as make two blocks for each multiprocessor, if there are too few.
    """
    wanted = 1 if blocks >= MULTIPROCESSORS else -(-2 * MULTIPROCESSORS // blocks)
    wanted = max(1, min(wanted, chunks // SHORTEST_PART))
    return pl.cdiv(chunks, pl.cdiv(chunks, wanted))


class Fetches:
    """TMA copies into shared memory. All of a turn arrive on one barrier; `slots` turns are under way at once."""

    def __init__(self, slots=1, barrier="barrier"):
        self.slots, self.barrier, self.types, self.copies = slots, barrier, {}, 0

    def add(self, name: str, memory: Any, copies: int = 1) -> None:
        """Memory for a tile in each slot, [slots, ...], which `copies` copies fill."""
        self.types[name] = memory
        self.copies += copies

    def scratch(self) -> dict[str, Any]:
        return self.types | {self.barrier: plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.slots)}

    def slot(self, turn: Array | int) -> Array | int:
        return turn % self.slots if isinstance(turn, int) else lax.rem(turn, jnp.int32(self.slots))

    def start(self, refs: Any, turn: Array | int, copies: Mapping[str, Any]) -> None:
        """Copies sources by the names of their tiles."""
        slot = self.slot(turn)
        for name, source in copies.items():
            plgpu.copy_gmem_to_smem(source, getattr(refs, name).at[slot], getattr(refs, self.barrier).at[slot])

    def wait(self, refs: Any, turn: Array | int) -> dict[str, Any]:
        """The tiles of a turn by name, once they are there."""
        slot = self.slot(turn)
        plgpu.barrier_wait(getattr(refs, self.barrier).at[slot])
        return {name: getattr(refs, name).at[slot] for name in self.types}


def launch(
    name: str,
    body: Callable[..., None],
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    interpret: Any = None,
    **params: Any,
) -> dict[str, Array]:
    """Run `body(refs, *indices in the grid)` on `inputs`; `refs` has inputs, outputs and scratch by name.

    Args:
      name: of the kernel.
      outputs: shape and dtype by name, and so are the results.
      grid: sizes by name. The last index is the fastest.
      interpret: how on a CPU.
      params: of the compiler.
    """
    names = [*inputs, *outputs, *scratch]
    # Of an axis that a mesh around has too, the index would be the device's, not the block's.
    axes = tuple(f"{name}.{axis}" for axis in grid)

    def named(*refs):
        refs = SimpleNamespace(**dict(zip(names, refs, strict=True)))
        body(refs, *(lax.axis_index(axis) for axis in axes))

    named.__name__ = name
    call = plgpu.kernel(
        named,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()],
        scratch_types=list(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=axes,
        compiler_params=plgpu.CompilerParams(**_LANE, **params),
        interpret=interpret,
    )
    # In a loop whose results are stacked XLA would run the kernel twice, once to write into the stack.
    results = lax.optimization_barrier(call(*inputs.values()))
    return {name: checkpoint_name(x, dispatch.KERNEL_RESULT) for name, x in zip(outputs, results, strict=True)}
