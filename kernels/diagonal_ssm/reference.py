"""The recurrence, token by token, in float32 and complex64."""

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Float, Inexact, Int
from kernels.segments import segment_starts


def reference(
    x: Float[Array, "B T D"],
    log_a: Inexact[Array, "D N"],
    b: Inexact[Array, "D N"],
    c: Inexact[Array, "D N"],
    d: Float[Array, " D"] | None,
    *,
    initial_state: Inexact[Array, "B D N"] | None,
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Float[Array, "B T D"], Inexact[Array, "B D N"]]:
    """y [B, T, D] and the final state; see `diagonal_ssm`. `chunk_size` has no meaning here."""
    del chunk_size
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *log_a.shape), jnp.complex64)
    a, skip = jnp.exp(log_a), 0.0 if d is None else d.astype(jnp.float32)

    def step(h, inputs):
        x, start = inputs  # [B, D], [B]
        write = [jnp.einsum("bd,dn->bdn", x, part, precision="highest") for part in (b.real, b.imag)]
        h = a * jnp.where(start[:, None, None], 0, h) + lax.complex(*write)
        read = jnp.einsum("bdn,dn->bd", h.real, c.real, precision="highest")
        read -= jnp.einsum("bdn,dn->bd", h.imag, c.imag, precision="highest")
        return h, 2 * read + skip * x

    final_state, y = lax.scan(step, initial_state, (x.astype(jnp.float32).swapaxes(0, 1), starts.T))
    return y.swapaxes(0, 1).astype(x.dtype), final_state
