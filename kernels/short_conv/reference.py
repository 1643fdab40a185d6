"""The convolution token by token, in float32: a window of W inputs moves along."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.array_typing import Array, Float, Int
from kernels.segments import segment_starts


def reference(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    bias: Float[Array, " D"] | None,
    *,
    activation: str | None,
    initial_state: Float[Array, "B W-1 D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """y [B, T, D] and the final state; see `short_conv`."""
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    weight = weight.astype(jnp.float32)

    def step(state, inputs):
        x, start = inputs  # [B, D], [B]
        state = jnp.where(start[:, None, None], 0, state)
        window = jnp.concatenate([state, x[:, None]], 1)  # [B, W, D]
        y = jnp.einsum("bwd,dw->bd", window, weight, precision="highest")
        return window[:, 1:], y if bias is None else y + bias.astype(jnp.float32)

    inputs = (x.astype(jnp.float32).swapaxes(0, 1), starts.T)
    if initial_state is None:
        initial_state = jnp.zeros((len(x), weight.shape[1] - 1, x.shape[-1]))
    final_state, y = lax.scan(step, initial_state.astype(jnp.float32), inputs)
    y = jax.nn.silu(y) if activation == "silu" else y
    return y.swapaxes(0, 1).astype(x.dtype), final_state.astype(x.dtype)
