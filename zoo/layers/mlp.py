"""The channel-mixing half of a block.

An MLP is `(x, segment_ids, state) -> (y, state)`, as a mixer is; one that looks at the token alone has no state
(`init_state` gives None) and returns what it was given.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from zoo import sharding
from zoo.layers.linear import linear
from zoo.layers.parameter import parameter
from zoo.layers.rounded_once import rounded_once
from zoo.layers.token_shift import mixture, token_shift


def squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


class _Stateless(nnx.Module):
    """An MLP that looks at the token alone."""

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> None:
        return None


class SwiGLU(_Stateless):
    """y = W_down (silu(W_gate x) * W_up x)  (Shazeer 2020, arXiv:2002.05202).

    x, y: [B, T, d_model]; the inner width is d_ff.
    """

    activation = staticmethod(jax.nn.silu)

    def __init__(self, d_model: int, d_ff: int, *, init_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.up = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(d_ff, d_model, ("mlp", "embed"), init_scale=init_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: None = None):
        inner = rounded_once(lambda gate, up: self.activation(gate) * up, self.gate(x), self.up(x))
        return self.down(sharding.constrain(inner, "batch", "time", "mlp")), state

    @staticmethod
    def num_parameters(d_model: int, d_ff: int) -> int:
        return 3 * d_model * d_ff

    @staticmethod
    def width(d_model: int, parameters: float) -> float:
        """The d_ff of that many parameters."""
        return parameters / (3 * d_model)

    @staticmethod
    def outputs(d_model: int, d_ff: int) -> list[int]:
        """The widths of what its projections give."""
        return [d_ff, d_ff, d_model]


class GeGLU(SwiGLU):
    """y = W_down (gelu(W_gate x) * W_up x), with the tanh form of GELU (Shazeer 2020, arXiv:2002.05202; Gemma's)."""

    activation = staticmethod(jax.nn.gelu)


class GELU(_Stateless):
    """y = W_down gelu(W_up x): the MLP of GPT-2 and of what was published before gated ones (arXiv:1606.08415).

    x, y: [B, T, d_model]; the inner width is d_ff. GELU in its tanh form.
    """

    activation = staticmethod(jax.nn.gelu)

    def __init__(self, d_model: int, d_ff: int, *, init_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.up = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = linear(d_ff, d_model, ("mlp", "embed"), init_scale=init_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: None = None):
        inner = rounded_once(self.activation, self.up(x))
        return self.down(sharding.constrain(inner, "batch", "time", "mlp")), state

    @staticmethod
    def num_parameters(d_model: int, d_ff: int) -> int:
        return 2 * d_model * d_ff

    @staticmethod
    def width(d_model: int, parameters: float) -> float:
        return parameters / (2 * d_model)

    @staticmethod
    def outputs(d_model: int, d_ff: int) -> list[int]:
        return [d_ff, d_model]


class SquaredReLU(GELU):
    """y = W_down relu(W_up x)^2  (So et al. 2021, arXiv:2109.08668; Nemotron's)."""

    activation = staticmethod(squared_relu)


class ChannelMixing(nnx.Module):
    """RWKV-6's channel mixing (Peng et al. 2024, arXiv:2404.05892), with xk and xr between x_t and x_{t-1}:

        y = sigmoid(W_r xr) * W_v relu(W_k xk)^2        xk = x_t + mu_k (x_{t-1} - x_t), xr likewise

    x, y: [B, T, d_model]; the inner width is d_ff. State: the last token's x, [batch, d_model].
    """

    def __init__(self, d_model: int, d_ff: int, *, init_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.d_model = d_model
        ramp = 1.0 - jnp.arange(d_model) / d_model  # from channels that see the previous token to those that do not
        self.key_mix = parameter(ramp, ("norm",), decay=False)
        self.receptance_mix = parameter(ramp, ("norm",), decay=False)
        self.key = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.receptance = linear(d_model, d_model, ("embed", "width"), dtype=dtype, rngs=rngs)
        self.value = linear(d_ff, d_model, ("mlp", "embed"), init_scale=init_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: jax.Array | None = None):
        shifted, last = token_shift(x, segment_ids, state)
        key = self.key(mixture(x, shifted, self.key_mix[...]))
        inner = rounded_once(squared_relu, key)
        value = self.value(sharding.constrain(inner, "batch", "time", "mlp"))
        receptance = self.receptance(mixture(x, shifted, self.receptance_mix[...]))
        y = rounded_once(lambda receptance, value: jax.nn.sigmoid(receptance) * value, receptance, value)
        return y, None if state is None else last

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch_size, self.d_model), dtype)

    @staticmethod
    def num_parameters(d_model: int, d_ff: int) -> int:
        return 2 * d_model * d_ff + d_model**2 + 2 * d_model

    @staticmethod
    def width(d_model: int, parameters: float) -> float:
        return (parameters - d_model**2 - 2 * d_model) / (2 * d_model)

    @staticmethod
    def outputs(d_model: int, d_ff: int) -> list[int]:
        return [d_ff, d_model, d_model]


class UngatedChannelMixing(nnx.Module):
    """RWKV-7's channel mixing (Peng et al. 2025, arXiv:2503.14456), with xk between x_t and x_{t-1}:

        y = W_v relu(W_k xk)^2        xk = x_t + mu_k (x_{t-1} - x_t)

    x, y: [B, T, d_model]; the inner width is d_ff. State: the last token's x, [batch, d_model].
    """

    def __init__(self, d_model: int, d_ff: int, *, init_scale: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.d_model = d_model
        self.key_mix = parameter(1.0 - jnp.arange(d_model) / d_model, ("norm",), decay=False)
        self.key = linear(d_model, d_ff, ("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.value = linear(d_ff, d_model, ("mlp", "embed"), init_scale=init_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, segment_ids: jax.Array | None = None, state: jax.Array | None = None):
        shifted, last = token_shift(x, segment_ids, state)
        key = self.key(mixture(x, shifted, self.key_mix[...]))
        inner = rounded_once(squared_relu, key)
        y = self.value(sharding.constrain(inner, "batch", "time", "mlp"))
        return y, None if state is None else last

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch_size, self.d_model), dtype)

    @staticmethod
    def num_parameters(d_model: int, d_ff: int) -> int:
        return 2 * d_model * d_ff + d_model

    @staticmethod
    def width(d_model: int, parameters: float) -> float:
        return (parameters - d_model) / (2 * d_model)

    @staticmethod
    def outputs(d_model: int, d_ff: int) -> list[int]:
        return [d_ff, d_model]


# `model.mlp`; "none" leaves the block without one
MLPS = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "gelu": GELU,
    "squared_relu": SquaredReLU,
    "channel_mixing": ChannelMixing,
    "channel_mixing_ungated": UngatedChannelMixing,
}
