"""Mamba-2: the selective state-space model with one decay a head (Dao & Gu 2024, arXiv:2405.21060).

    x_t, B_t, C_t = silu(conv(W_xBC u_t))               dt_t = softplus(W_dt u_t + b)        a_t = exp(dt_t A)
    S_t = a_t S_{t-1} + B_t (dt_t x_t)^T                o_t = S_t^T C_t + D x_t
    y_t = W_out norm(o_t * silu(W_z u_t))

It is linear attention with q = C, k = B, v = dt x and a scalar decay; the heads of a group share B and C, and the norm
is over a group. A starts uniform in [-16, -1], softplus(b) log-uniform between dt_min and dt_max.
State: S, float32 [batch, heads, N, P], and the last conv_width - 1 inputs of the convolution.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import (
    GatedRMSNorm,
    ShortConv,
    check_steps,
    in_pieces,
    linear,
    parameter,
    rounded_once,
    step_size_bias,
)
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads
from zoo.mixers.from_softmax import (
    NOT_CHOSEN,
    Taken,
    check_biases,
    constant,
    inverse_softplus,
    open_gate,
    projected,
    short_convs,
)
from zoo.settings import setting


@dataclasses.dataclass
class Mamba2Config(NormedMixerConfig):
    expand: float = setting(2.0, "channels / d_model", above=0, at_most=64)
    head_dim: int = setting(64, "P")
    state_dim: int = setting(128, "N", at_most=65_536)
    groups: int = setting(1, "groups of heads, which share B and C")
    conv_width: int = setting(4, "taps of the convolution", unit="tap", at_most=1024)
    dt_min: float = setting(1e-3, "the smallest initial step size", at_least=1e-8, at_most=100)
    dt_max: float = setting(1e-1, "the largest initial step size", at_least=1e-8, at_most=100)
    dt_limit_min: float = setting(0.0, "a floor of dt_t", at_least=0, at_most=1e6)
    dt_limit_max: float = setting(
        0.0, "a ceiling of dt_t", zero="none", above=0, at_most=1e6, also=("time_step_limit",)
    )


def _widths(config: Mamba2Config, d_model: int) -> tuple[int, int, int]:
    """(channels, heads, width of B and of C)."""
    channels = int(config.expand * d_model)
    return channels, channels // config.head_dim, config.groups * config.state_dim


class Mamba2(Mixer):
    config_class = Mamba2Config
    saved_names = ("mamba2_xBC", "mamba2_dt", "mamba2_z")

    def __init__(self, config: Mamba2Config, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.channels, self.heads, self.key_width = _widths(config, d)
        self.groups, self.state_dim, self.head_dim = config.groups, config.state_dim, config.head_dim
        limited = config.dt_limit_min or config.dt_limit_max
        self.dt_limit = (config.dt_limit_min, config.dt_limit_max or None) if limited else None
        conv_channels = self.channels + 2 * self.key_width
        self.in_xBC = linear(d, conv_channels, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.in_z = linear(d, self.channels, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.in_dt = linear(
            d, self.heads, ("embed", "rank"), decay=False, dtype=dtype, out_dtype=jnp.float32, rngs=rngs
        )
        self.conv = ShortConv(conv_channels, config.conv_width, rngs=rngs)
        vector = {"axes": ("norm",), "decay": False}
        self.dt_bias = parameter(step_size_bias(rngs.params(), (self.heads,), config.dt_min, config.dt_max), **vector)
        A = jax.random.uniform(rngs.params(), (self.heads,), minval=1.0, maxval=16.0)
        self.A_log = parameter(jnp.log(A), **vector)
        self.D = parameter(jnp.ones((self.heads,)), **vector)
        self.norm = GatedRMSNorm(self.channels, groups=self.groups, epsilon=sizes.norm_epsilon, dtype=dtype)
        self.out = linear(self.channels, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        conv_state, ssm_state = (None, None) if state is None else (state["conv"], state["ssm"])
        batch_time = x.shape[:2]
        z = checkpoint_name(self.in_z(x), "mamba2_z")
        dt = jax.nn.softplus(self.in_dt(x) + self.dt_bias[...])
        dt = dt if self.dt_limit is None else jnp.clip(dt, *self.dt_limit)
        dt = checkpoint_name(dt, "mamba2_dt")  # [B, T, H]
        xBC, conv_state = self.conv(self.in_xBC(x), segment_ids=segment_ids, state=conv_state)
        xBC = checkpoint_name(xBC, "mamba2_xBC")
        x, B, C = jnp.split(xBC, [self.channels, self.channels + self.key_width], axis=-1)
        x = x.reshape(*batch_time, self.heads, self.head_dim)
        keys = (*batch_time, self.groups, self.state_dim)
        o, ssm_state = ops.linear_attention(
            C.reshape(keys),
            B.reshape(keys),
            (dt[..., None] * x).astype(x.dtype),
            -jnp.exp(self.A_log[...]) * dt,
            initial_state=ssm_state,
            segment_ids=segment_ids,
            scale=1.0,
        )
        y = in_pieces(self._read_out, o, x, z)
        return y, None if state is None else {"conv": conv_state, "ssm": ssm_state}

    def _read_out(self, o, x, z):
        o = rounded_once(lambda o, x: o + self.D[...][:, None] * x, o, x)
        return self.out(self.norm(o.reshape(z.shape), z))

    def from_softmax(self, softmax):
        """C, B, x, W_out from q, k, v, W_o; steps of 1, and A that forgets over the reach."""
        x, B, C = jnp.split(self.in_xBC.kernel[...], [self.channels, self.channels + self.key_width], axis=-1)
        keys = softmax.keys(C, B, self.groups)
        values = softmax.values(x, self.out.kernel[...], self.heads)
        step = jnp.clip(1.0, *self.dt_limit) if self.dt_limit else 1.0
        found = {
            "in_dt.kernel": Taken(jnp.zeros_like(self.in_dt.kernel[...]), NOT_CHOSEN),
            "dt_bias": constant(self.dt_bias, inverse_softplus(1.0), "a step size of 1"),
            "A_log": constant(self.A_log, jnp.log(-softmax.log_decay / step), softmax.forgets),
            "D": constant(self.D, 0.0, "0: nothing passes the state by"),
        }
        if keys is not None and values is not None:
            in_xBC = "in_xBC", self.in_xBC
            check_biases(softmax, {"q": in_xBC, "k": in_xBC, "v": in_xBC, "out": ("out", self.out)})
            joined = jnp.concatenate([values[0], keys[1], keys[0]], axis=-1)
            of = f"v, {values[2]}; k and q, {keys[2]}"
            found |= projected("in_xBC", self.in_xBC, joined, of) | {
                "out.kernel": Taken(values[1], f"out, {values[2]}")
            }
            if self.out.bias is not None and softmax.out_bias is not None:
                found["out.bias"] = Taken(softmax.out_bias, "out's bias")
        return found | short_convs(self) | open_gate(self, "in_z")

    def init_state(self, batch_size, max_length, dtype):
        ssm = jnp.zeros((batch_size, self.heads, self.state_dim, self.head_dim), jnp.float32)
        return {"conv": self.conv.init_state(batch_size, dtype), "ssm": ssm}

    def spread_over_tensor(self):
        # One group's B and C are on every device.
        return {"head_dim": self.heads} | ({"groups": self.groups} if self.groups > 1 else {})

    @staticmethod
    def check(config, d_model):
        problems = check_steps(config)
        if 0 < config.dt_limit_max < config.dt_limit_min:
            least = f"dt_limit_min = {config.dt_limit_min:g}"
            problems.append(f"dt_limit_max: got {config.dt_limit_max:g}, expected at least {least}, or 0")
        if problems:
            return problems
        channels, heads, _ = _widths(config, d_model)
        if heads < 1 or channels % config.head_dim:
            problems.append(f"head_dim: heads of {config.head_dim} do not divide expand * d_model = {channels}")
            return problems
        return check_heads({"groups": config.groups}, "the number of heads", heads)

    @staticmethod
    def num_parameters(config, d_model):
        channels, heads, key_width = _widths(config, d_model)
        projections = d_model * (3 * channels + 2 * key_width + heads)
        return (
            projections + ShortConv.num_parameters(channels + 2 * key_width, config.conv_width) + 3 * heads + channels
        )

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        channels, heads, key_width = _widths(config, d_model)
        projections = 2 * d_model * (3 * channels + 2 * key_width + heads)
        convolution = 2 * config.conv_width * (channels + 2 * key_width)
        return projections + convolution + 4 * channels * config.state_dim
