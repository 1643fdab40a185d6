"""The recurrence, step by step, in float32 or complex64."""

import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Inexact, Int
from kernels.segments import segment_starts


def reference(
    x: Inexact[Array, "B T D"],
    log_decay: Inexact[Array, "B T D"] | Inexact[Array, " D"],
    *,
    initial_state: Inexact[Array, "B D"],
    segment_ids: Int[Array, "B T"] | None,
    chunk_size: int | None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """h [B, T, D] and the final state; see `linear_scan`. `chunk_size` has no meaning here."""
    del chunk_size
    decay = jnp.broadcast_to(jnp.exp(log_decay), x.shape)  # [B, T, D]
    if segment_ids is not None:
        decay = jnp.where(segment_starts(segment_ids)[..., None], 0, decay)

    def step(state, inputs):
        x, decay = inputs  # [B, D]
        state = decay * state + x.astype(state.dtype)
        return state, state

    final_state, h = lax.scan(step, initial_state, (x.swapaxes(0, 1), decay.swapaxes(0, 1)))
    return h.swapaxes(0, 1).astype(x.dtype), final_state
