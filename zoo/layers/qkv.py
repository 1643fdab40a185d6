"""Queries, keys and values of a delta rule's layer (Yang et al. 2024, arXiv:2406.06484)."""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers.linear import linear
from zoo.layers.norm import unit_length
from zoo.layers.short_conv import ShortConv


class ConvolvedQKV(nnx.Module):
    """q, k, v = silu(conv(x W)), each with a W and a convolution of its own; heads of q and k are of unit length.

    x [B, T, d_model] -> q [B, T, key_heads, key_width], k [B, T * writes, key_heads, key_width] and
    v [B, T * writes, heads, value_width]: keys and values of `writes` steps a token, in their order.
    State: the last conv_width - 1 inputs of each convolution, by "q", "k", "v".
    """

    def __init__(
        self,
        d_model: int,
        *,
        key_heads: int,
        key_width: int,
        heads: int,
        value_width: int,
        conv_width: int,
        writes: int = 1,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.writes, self.of_keys, self.of_values = writes, (key_heads, key_width), (heads, value_width)
        widths = _widths(key_heads * key_width, heads * value_width, writes)
        self.q, self.k, self.v = (linear(d_model, w, ("embed", "heads"), dtype=dtype, rngs=rngs) for w in widths)
        self.q_conv, self.k_conv, self.v_conv = (ShortConv(w, conv_width, bias=False, rngs=rngs) for w in widths)

    def __call__(self, x: jax.Array, *, segment_ids=None, state: dict[str, jax.Array] | None = None):
        before = dict.fromkeys("qkv") if state is None else state
        after = {}

        def convolved(name, project, conv):
            y, after[name] = conv(project(x), segment_ids=segment_ids, state=before[name])
            return y

        q = convolved("q", self.q, self.q_conv).reshape(*x.shape[:2], *self.of_keys)
        k = self._steps(convolved("k", self.k, self.k_conv), self.of_keys)
        v = self._steps(convolved("v", self.v, self.v_conv), self.of_values)
        return unit_length(q), unit_length(k), v, None if state is None else after

    def _steps(self, x, head):
        """[B, T, heads * writes * width] -> [B, T * writes, heads, width]; heads are outermost, to be spread."""
        batch, time, _ = x.shape
        x = x.reshape(batch, time, head[0], self.writes, head[1]).swapaxes(2, 3)
        return x.reshape(batch, time * self.writes, *head)

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> dict[str, jax.Array]:
        convs = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        return {name: conv.init_state(batch_size, dtype) for name, conv in convs.items()}

    @staticmethod
    def num_parameters(d_model: int, keys: int, values: int, conv_width: int, writes: int = 1) -> int:
        """Of `keys` and `values` channels, over all heads of one step."""
        channels = sum(_widths(keys, values, writes))
        return d_model * channels + ShortConv.num_parameters(channels, conv_width, bias=False)

    @staticmethod
    def flops_per_token(d_model: int, keys: int, values: int, conv_width: int, writes: int = 1) -> float:
        return 2 * (d_model + conv_width) * sum(_widths(keys, values, writes))


def _widths(keys: int, values: int, writes: int) -> tuple[int, int, int]:
    """Channels of q, k, v."""
    return keys, keys * writes, values * writes
