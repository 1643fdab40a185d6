"""The short causal convolution before a recurrence, with its parameters."""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import ops
from zoo.layers.parameter import parameter


class ShortConv(nnx.Module):
    """Causal depthwise convolution of `width` taps, with a bias or without, then SiLU; x, y: [B, T, channels].

    State: the last width - 1 inputs, [B, width - 1, channels].
    """

    def __init__(self, channels: int, width: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.channels, self.width = channels, width
        bound = width**-0.5
        taps = jax.random.uniform(rngs.params(), (channels, width), minval=-bound, maxval=bound)
        self.weight = parameter(taps, ("heads", "state"), decay=False)
        self.bias = parameter(jnp.zeros((channels,)), ("heads",), decay=False) if bias else None

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None):
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]  # float32: they are few
        return ops.short_conv(x, weight, bias, activation="silu", initial_state=state, segment_ids=segment_ids)

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch_size, self.width - 1, self.channels), dtype)

    @staticmethod
    def num_parameters(channels: int, width: int, *, bias: bool = True) -> int:
        return channels * (width + bias)
