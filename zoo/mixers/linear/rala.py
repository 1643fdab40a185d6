"""Rank-augmented linear attention (Fan et al. 2024, arXiv:2411.07635), of a document of N tokens.

    q_t, k_t = elu(W x_t) + 1,    a_s = N exp(m . k_s / sqrt(K)) / sum_r exp(m . k_r / sqrt(K)),   m = mean_s q_s
    o_t = sum_s (rot(q_t) . rot(a_s k_s)) v_s / (q_t . sum_s a_s k_s + N 1e-6) + (conv(v))_t
    y_t = W_o (o_t * (W_g x_t))

Two things raise the rank above that of linear attention: weights a of the tokens, which let the state S = sum a k v^T
hold more of some of them, and the product with a projection of x. conv is depthwise over `conv_width` tokens around t
(the paper's is 5 x 5, of images), in the document. Rotary positions turn q and k of the numerator alone, where the
model has them.

Bidirectional by its nature: a_s depends on the mean of all queries inside of an exponent. A causal form, with the mean
up to t, would have other weights of all s at each t, and no state of a fixed size holds them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import linear, parameter, rotary, rounded_once
from zoo.mixers.base import (
    BIDIRECTIONAL,
    Mixer,
    MixerConfig,
    Sizes,
    check_heads,
    heads_or_default,
    positions_or_default,
)
from zoo.settings import setting


@dataclasses.dataclass
class RALAConfig(MixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    conv_width: int = setting(5, "tokens that a value's convolution sees, itself in the middle", at_most=63)


class RALA(Mixer):
    config_class = RALAConfig
    directions = (BIDIRECTIONAL,)
    runs_twice = False
    saved_names = ("rala_q", "rala_k", "rala_v")

    def __init__(self, config: RALAConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.rope = heads_or_default(config.num_heads, d, 64), sizes.rope
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.gate = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        bound = config.conv_width**-0.5
        taps = jax.random.uniform(rngs.params(), (d, config.conv_width), minval=-bound, maxval=bound)
        self.conv = parameter(taps, ("heads", "state"), decay=False)
        self.conv_bias = parameter(jnp.zeros((d,)), ("heads",), decay=False)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        heads = (*x.shape[:2], self.heads, -1)
        positions = positions_or_default(positions, x)
        phi = lambda x: jax.nn.elu(x.astype(jnp.float32).reshape(heads)) + 1.0  # noqa: E731
        q, k = checkpoint_name(phi(self.q(x)), "rala_q"), checkpoint_name(phi(self.k(x)), "rala_k")
        v = checkpoint_name(self.v(x), "rala_v")

        tokens = ops.segment_sum(jnp.ones((*x.shape[:2], 1, 1), jnp.float32), segment_ids=segment_ids)
        mean = ops.segment_sum(q, segment_ids=segment_ids) / tokens
        logits = jnp.sum(mean * k, axis=-1) * k.shape[-1] ** -0.5
        most = jax.lax.stop_gradient(ops.segment_max(jax.lax.stop_gradient(logits), segment_ids=segment_ids))
        weights = jnp.exp(logits - most)[..., None]
        k = k * (tokens * weights / ops.segment_sum(weights, segment_ids=segment_ids))

        full = {"segment_ids": segment_ids, "scale": 1.0}
        total = ops.full_linear_attention(q, k, jnp.ones_like(k[..., :1]), **full)
        if self.rope:
            q, k = rotary(q, positions), rotary(k, positions)
        read = ops.full_linear_attention(q.astype(v.dtype), k.astype(v.dtype), v.reshape(heads), **full)
        near = self._around(v, segment_ids)

        def gated(read, near, total, tokens, gate):
            o = read / (total + 1e-6 * tokens)
            return (o.reshape(gate.shape) + near) * gate

        return self.out(rounded_once(gated, read, near, total, tokens, self.gate(x))), None

    def _around(self, v, segment_ids):
        """The convolution: what is at t and before it, and in reversed time what comes after."""
        taps, bias, half = self.conv[...], self.conv_bias[...], self.conv.shape[1] // 2
        past, _ = ops.short_conv(v, taps[:, : half + 1], bias, segment_ids=segment_ids)
        ids = None if segment_ids is None else ops.reversed_time(segment_ids)
        following = jnp.pad(taps[:, :half:-1], ((0, 0), (0, 1)))  # the farthest first; of t itself 0
        future, _ = ops.short_conv(ops.reversed_time(v, "heads"), following, segment_ids=ids)
        return past + ops.reversed_time(future, "heads")

    @staticmethod
    def check(config, d_model):
        heads = heads_or_default(config.num_heads, d_model, 64)
        problems = check_heads({"num_heads": heads}, "d_model", d_model)
        if not problems and (width := d_model // heads) % 2:
            problems.append(f"num_heads: a key width of {width} is odd; rotary needs an even one")
        if config.conv_width % 2 == 0:
            problems.append(f"conv_width: {config.conv_width} tokens have no middle; use an odd number")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        return 5 * d_model**2 + (config.conv_width + 1) * d_model

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        """Projections; numerator and denominator, the sums of q, and the weights."""
        heads = heads_or_default(config.num_heads, d_model, 64)
        return 10 * d_model**2 + 4 * d_model**2 // heads + 6 * d_model
