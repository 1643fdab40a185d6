"""Pallas Mosaic GPU (Hopper): the names that differ between jax 0.10 and 0.12."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)  # of vectors: one number a row of a WGMMA tile, or a column

# jax 0.12 defaults to the other lowering, which did not find the layouts of such kernels.
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True)
_IS_0_10 = jax.__version_info__ < (0, 11)


def load(ref, layout):
    """A reference in shared or global memory, in registers laid out as `layout`."""
    if _IS_0_10:
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0)) if _IS_0_10 else ref.transpose((1, 0))


def shared_tile(*shape, dtype=jnp.bfloat16):
    """Shared memory that TMA fills and wgmma reads: rows of 128 bytes, swizzled."""
    transforms = (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
