"""H3: two state-space models with products between (Fu et al. 2022, arXiv:2212.14052).

    k'_t = SSM_shift(k)_t
    S_t  = SSM_diagonal(k'_t v_t^T)        one for a head, on each entry of the [K, K] product
    y_t  = W_o (S_t^T q_t)

With heads of width 1, the paper's default, products are elementwise. State: h of the diagonal SSM, complex64
[batch, K K, heads, N/2], and the last shift_width - 1 keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import DiagonalSSM, DiagonalSSMConfig, linear, parameter
from zoo.mixers.base import Mixer, MixerConfig, Sizes
from zoo.settings import setting
from zoo.taken import repeated


@dataclasses.dataclass
class H3Config(MixerConfig, DiagonalSSMConfig):
    train_b: bool = setting(True, "B is a parameter, as in the authors' code")
    head_dim: int = setting(1, "K")
    shift_width: int = setting(64, "taps of the shift SSM", unit="tap", at_most=65_536)


class ShiftSSM(nnx.Module):
    """A state-space model in each channel whose A shifts its state of `width` numbers by one (2212.14052, section 3).

        h_t = shift(h_{t-1}) + b x_t,   y_t = c . h_t + D x_t

    which is a filter of `width` taps, w_l = sum_n b_n c_{n+l} (and D on the token's own). b starts as (1, 0, 0, ...)
    and the taps as c. Training b, as the authors' code does, adds no filter that c alone could not be, but each of its
    steps moves every tap. x, y: [B, T, channels]. State: the last width - 1 inputs, [B, width - 1, channels].
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        self.channels, self.width = channels, width
        bound = width**-0.5
        c = jax.random.uniform(rngs.params(), (channels, width), minval=-bound, maxval=bound)
        b = jnp.zeros((channels, width)).at[:, 0].set(1.0)
        self.b = parameter(b, ("heads", "state"), decay=False)
        self.c = parameter(c, ("heads", "state"))
        self.D = parameter(jax.random.normal(rngs.params(), (channels,)), ("heads",), decay=False)

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None):
        return ops.short_conv(x, self.taps()[:, ::-1], initial_state=state, segment_ids=segment_ids)

    def taps(self) -> jax.Array:
        """What x_{t-l} counts for in y_t, l = 0 ... width - 1; [channels, width]."""
        b, c = (jnp.fft.rfft(values[...], 2 * self.width) for values in (self.b, self.c))
        correlation = jnp.fft.irfft(jnp.conj(b) * c, 2 * self.width)[:, : self.width]
        return correlation.at[:, 0].add(self.D[...])

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch_size, self.width - 1, self.channels), dtype)

    @staticmethod
    def num_parameters(channels: int, width: int) -> int:
        return channels * (2 * width + 1)


class H3(Mixer):
    config_class = H3Config
    saved_names = ("h3_q", "h3_k", "h3_v")

    def __init__(self, config: H3Config, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.head_dim, self.heads = config.head_dim, d // config.head_dim
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.shift = ShiftSSM(d, config.shift_width, rngs=rngs)
        self.ssm = DiagonalSSM(self.heads, config, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        shift_state, ssm_state = (None, None) if state is None else (state["shift"], state["ssm"])
        batch, time, d = x.shape
        entries, heads = self.head_dim**2, (batch, time, self.heads, self.head_dim)
        q, v = checkpoint_name(self.q(x), "h3_q").reshape(heads), checkpoint_name(self.v(x), "h3_v").reshape(heads)
        k = checkpoint_name(self.k(x), "h3_k")
        k, shift_state = self.shift(k, segment_ids=segment_ids, state=shift_state)
        # Each entry of the products is a sequence of its own to the SSM, which the entries of a head share.
        kv = jnp.einsum("bthi,bthj->bijth", k.reshape(heads), v).reshape(batch * entries, time, self.heads)
        rows = repeated(segment_ids, entries, axis=0)
        ssm_state = None if ssm_state is None else ssm_state.reshape(batch * entries, *ssm_state.shape[2:])
        kv, ssm_state = self.ssm(kv, segment_ids=rows, state=ssm_state)
        kv = kv.reshape(batch, self.head_dim, self.head_dim, time, self.heads)
        y = self.out(jnp.einsum("bthi,bijth->bthj", q, kv).reshape(batch, time, d))
        if state is None:
            return y, None
        return y, {"shift": shift_state, "ssm": ssm_state.reshape(batch, entries, *ssm_state.shape[1:])}

    def init_state(self, batch_size, max_length, dtype):
        entries = self.head_dim**2
        ssm = self.ssm.init_state(batch_size * entries)
        return {
            "shift": self.shift.init_state(batch_size, dtype),
            "ssm": ssm.reshape(batch_size, entries, *ssm.shape[1:]),
        }

    def spread_over_tensor(self):
        return {}  # its heads are a dimension of parameters

    @staticmethod
    def check(config, d_model):
        if d_model % config.head_dim:
            return [f"head_dim: heads of width {config.head_dim} do not divide d_model = {d_model}"]
        return DiagonalSSM.check(d_model // config.head_dim, config)

    @staticmethod
    def num_parameters(config, d_model):
        shift = ShiftSSM.num_parameters(d_model, config.shift_width)
        return 4 * d_model**2 + shift + DiagonalSSM.num_parameters(d_model // config.head_dim, config)

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        products = 4 * d_model * config.head_dim
        ssm = DiagonalSSM.flops_per_token(d_model * config.head_dim, config)
        taps = min(config.shift_width, context_length)
        return 8 * d_model**2 + 2 * taps * d_model + products + ssm
