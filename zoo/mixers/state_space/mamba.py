"""Mamba: a selective state-space model, S6 (Gu & Dao 2023, arXiv:2312.00752).

    x_t, z_t = W_in u_t,   x = silu(conv(x))            dt_t = softplus(W_dt W_r x_t + b)    B_t, C_t = W_B x_t, W_C x_t
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t            y_t = W_out ((C_t . h_t + D x_t) * silu(z_t))

A = -exp(A_log) is diagonal and starts at -1, ..., -N in each channel (S4D-Real); softplus(b) starts log-uniform between
dt_min and dt_max. State: h, float32 [batch, channels, N], and the last conv_width - 1 inputs of the convolution.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import ShortConv, check_steps, linear, parameter, rms_norm, rounded_once, step_size_bias
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes
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

INNER_NORMS = {"none": "", "rms_norm": "Jamba's, 2403.19887", "rms_norm_without_scale": "Falcon Mamba's, 2410.05355"}


@dataclasses.dataclass
class MambaConfig(NormedMixerConfig):
    expand: float = setting(2.0, "channels / d_model", above=0, at_most=64)
    state_dim: int = setting(16, "N", at_most=65_536)
    conv_width: int = setting(4, "taps of the convolution", unit="tap", at_most=1024)
    inner_norm: str = setting("none", "on dt (before W_dt), B and C", choices=INNER_NORMS)
    dt_rank: int = setting(0, "width of W_r x", zero="a sixteenth of d_model")
    dt_min: float = setting(1e-3, "the smallest initial step size", at_least=1e-8, at_most=100)
    dt_max: float = setting(1e-1, "the largest initial step size", at_least=1e-8, at_most=100)


def _widths(config: MambaConfig, d_model: int) -> tuple[int, int]:
    """(channels, dt_rank)."""
    return int(config.expand * d_model), config.dt_rank or math.ceil(d_model / 16)


class Mamba(Mixer):
    config_class = MambaConfig
    saved_names = ("mamba_x", "mamba_dt", "mamba_z")

    def __init__(self, config: MambaConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype, n = sizes.d_model, sizes.dtype, config.state_dim
        self.channels, self.rank = _widths(config, d)
        self.state_dim = n
        self.in_x = linear(d, self.channels, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.in_z = linear(d, self.channels, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.conv = ShortConv(self.channels, config.conv_width, rngs=rngs)
        self.select = linear(self.channels, self.rank + 2 * n, ("heads", "rank"), dtype=dtype, rngs=rngs)  # dt, B, C
        self.has_inner_norm = config.inner_norm != "none"
        if self.has_inner_norm:
            norm = {"epsilon": sizes.norm_epsilon, "dtype": dtype, "with_scale": config.inner_norm == "rms_norm"}
            self.dt_norm = rms_norm(self.rank, rngs=rngs, **norm)
            self.B_norm, self.C_norm = rms_norm(n, rngs=rngs, **norm), rms_norm(n, rngs=rngs, **norm)
        bound = self.rank**-0.5
        dt_up = jax.random.uniform(rngs.params(), (self.rank, self.channels), minval=-bound, maxval=bound)
        self.dt_up = parameter(dt_up, ("rank", "heads"), decay=False)
        dt_bias = step_size_bias(rngs.params(), (self.channels,), config.dt_min, config.dt_max)
        self.dt_bias = parameter(dt_bias, ("heads",), decay=False)
        A = jnp.broadcast_to(jnp.arange(1.0, n + 1), (self.channels, n))
        self.A_log = parameter(jnp.log(A), ("heads", "state"), decay=False)
        self.D = parameter(jnp.ones((self.channels,)), ("heads",), decay=False)
        self.out = linear(self.channels, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        conv_state, ssm_state = (None, None) if state is None else (state["conv"], state["ssm"])
        z = checkpoint_name(self.in_z(x), "mamba_z")
        x, conv_state = self.conv(self.in_x(x), segment_ids=segment_ids, state=conv_state)
        x = checkpoint_name(x, "mamba_x")
        dt, B, C = jnp.split(self.select(x), [self.rank, self.rank + self.state_dim], axis=-1)
        if self.has_inner_norm:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = jnp.matmul(dt, self.dt_up[...].astype(dt.dtype), preferred_element_type=jnp.float32)
        dt = checkpoint_name(jax.nn.softplus(dt + self.dt_bias[...]), "mamba_dt")
        y, ssm_state = ops.selective_scan(
            x, dt, -jnp.exp(self.A_log[...]), B, C, self.D[...], initial_state=ssm_state, segment_ids=segment_ids
        )
        y = self.out(rounded_once(lambda y, z: y * jax.nn.silu(z), y, z))
        return y, None if state is None else {"conv": conv_state, "ssm": ssm_state}

    def from_softmax(self, softmax):
        """x and W_out from v and W_o; B and C are made of x, which q and k are not, and start fresh.

        Steps of 1 / reach with A = -1 leave the mean over the reach, as the weights of softmax do, where Mamba-2 has a
        norm for what is added up.
        """
        bias = inverse_softplus(-softmax.log_decay)
        found = {
            "dt_up": Taken(jnp.zeros_like(self.dt_up[...]), NOT_CHOSEN),
            "dt_bias": constant(self.dt_bias, bias, f"{bias:.4g}: a step size of 1 / {softmax.reach:.3g}"),
            "A_log": constant(self.A_log, 0.0, f"0: {softmax.forgets}"),
            "D": constant(self.D, 0.0, "0: nothing passes the state by"),
        }
        heads = softmax.v.shape[1]
        values = softmax.values(self.in_x.kernel[...], self.out.kernel[...], 1 if self.channels % heads else heads)
        check_biases(softmax, {"v": ("in_x", self.in_x), "out": ("out", self.out)})
        found |= projected("in_x", self.in_x, values[0], f"v, {values[2]}")
        found["out.kernel"] = Taken(values[1], f"out, {values[2]}")
        if self.out.bias is not None and softmax.out_bias is not None:
            found["out.bias"] = Taken(softmax.out_bias, "out's bias")
        return found | short_convs(self) | open_gate(self, "in_z")

    def init_state(self, batch_size, max_length, dtype):
        ssm = jnp.zeros((batch_size, self.channels, self.state_dim), jnp.float32)
        return {"conv": self.conv.init_state(batch_size, dtype), "ssm": ssm}

    @staticmethod
    def check(config, d_model):
        problems = check_steps(config)
        if _widths(config, d_model)[0] < 1:
            problems.append(f"expand: got {config.expand}, expected at least one channel, expand * d_model >= 1")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        channels, rank = _widths(config, d_model)
        n = config.state_dim
        conv = ShortConv.num_parameters(channels, config.conv_width)
        selection = channels * (rank + 2 * n) + (rank + 2 * n if config.inner_norm == "rms_norm" else 0)
        return 3 * d_model * channels + conv + selection + channels * (rank + 1) + channels * (n + 1)

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        channels, rank = _widths(config, d_model)
        n = config.state_dim
        projections = 3 * d_model + rank + 2 * n + rank
        return 2 * channels * (projections + config.conv_width + 2 * n)
