"""The channel-mixing half of a block."""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import sharding
from zoo.layers.linear import linear


class SwiGLU(nnx.Module):
    """y = W_down (silu(W_gate x) * W_up x)  (Shazeer 2020, arXiv:2002.05202).

    x, y: [B, T, d_model]; the inner width is d_ff.
    """

    def __init__(self, d_model: int, d_ff: int, *, init_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(d_ff, d_model, ("mlp", "embed"), init_scale=init_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(sharding.constrain(inner, "batch", "time", "mlp"))

    @staticmethod
    def num_parameters(d_model: int, d_ff: int) -> int:
        return 3 * d_model * d_ff


MLPS = {"swiglu": SwiGLU}  # `model.mlp`; "none" leaves the block without one
