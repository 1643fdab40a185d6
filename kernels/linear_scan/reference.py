"""The recurrence, step by step, in float32 or complex64."""

import jax.numpy as jnp
from jax import lax

from kernels.segments import segment_starts


def reference(x, log_decay, *, initial_state, segment_ids, chunk_size):
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
