"""The recurrence, token by token, in float32 (float64 for float64 inputs)."""

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts


def reference(
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
    """y [B, T, D] and the final state; see `selective_scan`. `chunk_size` has no meaning here."""
    del chunk_size
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    A, skip = A.astype(dtype), 0.0 if D is None else D.astype(dtype)

    def step(h, inputs):
        x, dt, B, C, start = inputs  # [B, D], [B, D], [B, N], [B, N], [B]
        h = jnp.where(start[:, None, None], 0, h)
        h = jnp.exp(dt[..., None] * A) * h + jnp.einsum("bd,bn->bdn", dt * x, B, precision="highest")
        return h, jnp.einsum("bdn,bn->bd", h, C, precision="highest") + skip * x

    inputs = tuple(array.astype(dtype).swapaxes(0, 1) for array in (x, dt, B, C))
    final_state, y = lax.scan(step, initial_state.astype(dtype), (*inputs, starts.T))
    return y.swapaxes(0, 1).astype(x.dtype), final_state
