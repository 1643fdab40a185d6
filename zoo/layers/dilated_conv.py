"""Causal convolution over all channels, with taps `dilation` tokens apart (Bai et al. 2018, arXiv:1803.01271)."""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import ops
from zoo.layers.linear import linear


class DilatedConv(nnx.Module):
    """y_t = b + sum_{j < width} x_{t - j dilation} W_j, of tokens of one document; x [B, T, d_in], y [B, T, d_out].

    State: the last (width - 1) dilation inputs, [B, ., d_in].
    """

    def __init__(self, d_in: int, d_out: int, *, width: int, dilation: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.d_in, self.width, self.dilation = d_in, width, dilation
        self.taps = linear(width * d_in, d_out, ("embed", "heads"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None):
        inputs, after = [x], state
        for j in range(1, self.width):
            distance = j * self.dilation
            before = None if state is None else state[:, -distance:]
            shifted, after = ops.earlier(x, distance, initial_state=before, segment_ids=segment_ids)
            inputs.append(shifted)
        return self.taps(jnp.concatenate(inputs, -1)), None if state is None else after.astype(state.dtype)

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch_size, (self.width - 1) * self.dilation, self.d_in), dtype)

    @staticmethod
    def num_parameters(d_in: int, d_out: int, width: int) -> int:
        return (width * d_in + 1) * d_out
