"""The selective scan by the package jax-linear-attention: Mosaic GPU kernels on Hopper, its chunked XLA form elsewhere.

Chosen by name only. The kernels take D a multiple of 128 and N of 4, 8, 16 or 32; any other call runs the package's
XLA form, on a Hopper GPU too.
"""

import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int

KERNEL_CHUNK = 32  # tokens; the kernels take whole ones, if the step sizes are given as they are


def jla(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, " D"] | None,
    *,
    initial_state: Float[Array, "B D N"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """y [B, T, D] and the final state; see `selective_scan`."""
    ops = dispatch.optional("jla.ops", extra="jla")
    if initial_state.dtype != jnp.float32:
        raise NotImplementedError(f"the package computes in float32, not {initial_state.dtype}")
    time = x.shape[1]
    padding = -time % KERNEL_CHUNK  # by steps of 0: they leave the state as it is
    dtype = jnp.result_type(x, dt)  # the kernels take x and dt of one dtype
    u, steps, write, read = (
        jnp.pad(array, ((0, 0), (0, padding), (0, 0))) for array in (x.astype(dtype), dt.astype(dtype), B, C)
    )
    if segment_ids is not None:
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    y, final_state = ops.linear_attention(
        "mamba1",
        read,
        write,
        u,
        dt=steps,
        a=A,
        d=D,
        initial_state=initial_state,
        segment_ids=segment_ids,
        output_final_state=True,
        **({} if chunk_size is None else {"chunk_size": chunk_size}),
    )
    return y[:, :time].astype(x.dtype), final_state
