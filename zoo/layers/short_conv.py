"""The short causal convolution before a recurrence, with its parameters."""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import ops


class ShortConv(nnx.Module):
    """Causal depthwise convolution of `width` taps with a bias, then SiLU (or neither); x, y: [B, T, channels].

    State: the last width - 1 inputs, [B, width - 1, channels].
    """

    def __init__(self, channels: int, width: int, *, plain: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        """`plain`: no bias and no activation."""
        self.channels, self.width, self.dtype, self.plain = channels, width, dtype, plain
        bound = width**-0.5
        taps = jax.random.uniform(rngs.params(), (channels, width), minval=-bound, maxval=bound)
        self.weight = nnx.Param(taps, out_sharding=("heads", "state"), decay=False)
        if not plain:
            self.bias = nnx.Param(jnp.zeros((channels,)), out_sharding=("heads",), decay=False)

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None):
        weight = self.weight[...].astype(self.dtype)
        bias = None if self.plain else self.bias[...].astype(self.dtype)
        activation = None if self.plain else "silu"
        return ops.short_conv(x, weight, bias, activation=activation, initial_state=state, segment_ids=segment_ids)

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch_size, self.width - 1, self.channels), dtype)

    @staticmethod
    def num_parameters(channels: int, width: int, *, plain: bool = False) -> int:
        return channels * (width + (not plain))
