"""Temporal convolution, then linear attention: what is near by its place, what is far by its content.

    u_t = relu(x_t + relu(conv(relu(conv(x)))_t))     y = linear_attention(u)

The residual block of a temporal convolutional network (Bai, Kolter & Koltun 2018, arXiv:1803.01271), two causal
convolutions over all channels with taps `dilation` apart, without its weight norm and dropout; then `linear_attention`
(arXiv:2006.16236), which has no positions of its own. Layers of growing dilation are places of a pattern:
configs/conv_linear.py. What the attention adds to the convolutions is seen beside `attention=false`: y = W_o u.
State: what each convolution still sees, [batch, (width - 1) dilation, d_model], and that of `linear_attention`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.layers import DilatedConv, linear, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes
from zoo.mixers.from_softmax import Taken, constant, take_over
from zoo.mixers.linear.linear_attention import FEATURE_MAPS, LinearAttention, LinearAttentionConfig
from zoo.settings import setting


@dataclasses.dataclass
class ConvLinearConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    feature_map: str = setting("elu1", "of linear_attention", choices=tuple(FEATURE_MAPS))
    conv_width: int = setting(2, "taps of each convolution", at_most=64)
    dilation: int = setting(1, "tokens between taps", unit="token", at_most=2**16)
    attention: bool = setting(True, "linear attention after the convolutions; false: a projection in its place")


class ConvLinear(Mixer):
    config_class = ConvLinearConfig
    saved_names = LinearAttention.saved_names

    def __init__(self, config: ConvLinearConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d = sizes.d_model
        taps = {"width": config.conv_width, "dilation": config.dilation, "dtype": sizes.dtype, "rngs": rngs}
        self.first, self.second = DilatedConv(d, d, **taps), DilatedConv(d, d, **taps)
        self.has_attention = config.attention
        if config.attention:
            self.attention = LinearAttention(_attention(config), sizes, layer_index=layer_index, rngs=rngs)
            self.heads = self.attention.heads
        else:
            scale = {"init_scale": sizes.output_scale, "dtype": sizes.dtype}
            self.out = linear(d, d, ("heads", "embed"), **scale, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        before = dict.fromkeys(("first", "second", "attention")) if state is None else state
        after = {}
        u, after["first"] = self.first(x, segment_ids=segment_ids, state=before["first"])
        u, after["second"] = self.second(jax.nn.relu(u), segment_ids=segment_ids, state=before["second"])
        u = rounded_once(lambda x, u: jax.nn.relu(x + jax.nn.relu(u)), x, u)
        if self.has_attention:
            y, after["attention"] = self.attention(u, segment_ids=segment_ids, state=before["attention"])
        else:
            y = self.out(u)
        return y, None if state is None else after

    def from_softmax(self, softmax):
        """q, k and v of relu(x), which is what is left of x where the convolutions add next to nothing.

        Of normal x they come nearest to q, k and v of x, in the least squares, as W / (1 - 1 / pi) of what differs from
        the mean. A bias of 0.1, and not 0, lets the gradient into the second convolution.
        """
        if not self.has_attention:
            return {}
        names = {part: f"attention.{part}" for part in ("q", "k", "v", "out")}
        found = take_over(self, softmax, heads=self.heads, **names)
        for part in ("q", "k", "v"):
            if (name := f"attention.{part}.kernel") in found:
                kernel, of = found[name]
                found[name] = Taken((kernel - kernel.mean(0)) / (1 - 1 / math.pi), f"{of}, of relu(x)")
        second = self.second.taps
        zero = jnp.zeros_like(second.kernel[...])
        return found | {
            "second.taps.kernel": Taken(zero, "0: the convolutions add next to nothing"),
            "second.taps.bias": constant(second.bias, 0.1, "0.1: and may learn to"),
        }

    def init_state(self, batch_size, max_length, dtype):
        state = {name: getattr(self, name).init_state(batch_size, dtype) for name in ("first", "second")}
        if self.has_attention:
            state["attention"] = self.attention.init_state(batch_size, max_length, dtype)
        return state

    @staticmethod
    def check(config, d_model):
        return LinearAttention.check(_attention(config), d_model) if config.attention else []

    @staticmethod
    def num_parameters(config, d_model):
        convolutions = 2 * DilatedConv.num_parameters(d_model, d_model, config.conv_width)
        if not config.attention:
            return convolutions + d_model**2
        return convolutions + LinearAttention.num_parameters(_attention(config), d_model)

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        convolutions = 4 * config.conv_width * d_model**2
        if not config.attention:
            return convolutions + 2 * d_model**2
        return convolutions + LinearAttention.flops_per_token(_attention(config), d_model, context_length)


def _attention(config: ConvLinearConfig) -> LinearAttentionConfig:
    return LinearAttentionConfig(num_heads=config.num_heads, feature_map=config.feature_map)
