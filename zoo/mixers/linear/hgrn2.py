"""HGRN2: gated linear recurrence with state expansion (Qin et al. 2024, arXiv:2404.07904).

    S_t = diag(a_t) S_{t-1} + (1 - a_t) v_t^T  a_t = l + (1 - l) sigmoid(x_t W_f)
    o_t = S_t^T silu(x_t W_q) / sqrt(K)        y_t = W_o norm(o_t), the norm over all heads together

What a token writes is what its gate lets go of: the key is 1 - a_t. The lower bound l grows with depth, so that upper
layers keep what they read for longer: with one row b of parameters a layer,

    l of HGRN2 layer i = sum_{0 < j <= i} softmax over layers(b)_j, zero in the first

(`over_depth`; other families in between do not count). A mixer outside a model reads itself as the second of two layers
whose first has b = 0. State: S, float32 [batch, heads, K, V].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import linear, parameter, rms_norm, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting


@dataclasses.dataclass
class HGRN2Config(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 128 of d_model (the paper's state expansion), at least 4")


class HGRN2(Mixer):
    config_class = HGRN2Config
    saved_names = ("hgrn2_q", "hgrn2_v", "hgrn2_forget")

    def __init__(self, config: HGRN2Config, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads = heads_or_default(config.num_heads, d, 128)
        self.width = d // self.heads  # K = V
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.forget = linear(d, d, ("embed", "heads"), decay=False, dtype=dtype, out_dtype=jnp.float32, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.bound = parameter(jnp.zeros((d,)), ("norm",), decay=False)  # b
        self.norm = rms_norm(d, epsilon=sizes.norm_epsilon, dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    @staticmethod
    def over_depth(mixers, layer_index, num_layers, step=None):
        rows = jnp.stack([mixer.bound[...] for mixer in mixers], axis=1)  # [N, P, D]
        shares = jax.nn.softmax(rows.reshape(-1, rows.shape[-1]), axis=0)
        return jnp.cumsum(shares.at[0].set(0.0), axis=0).reshape(rows.shape)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None, depth=None):
        heads = (*x.shape[:2], self.heads, self.width)
        q = checkpoint_name(rounded_once(jax.nn.silu, self.q(x)).reshape(heads), "hgrn2_q")
        v = checkpoint_name(self.v(x).reshape(heads), "hgrn2_v")
        forget = checkpoint_name(self.forget(x), "hgrn2_forget")
        # A bound of 0 stands for 1e-30: the gate may close to nothing, and its logarithm stays finite.
        bound = jnp.clip(jax.nn.sigmoid(self.bound[...]) if depth is None else depth, 1e-30, 1.0 - 1e-6)
        log_decay = jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + jax.nn.log_sigmoid(forget)).reshape(heads)
        k = ((1.0 - bound) * jax.nn.sigmoid(-forget)).reshape(heads).astype(x.dtype)  # 1 - a_t
        o, final_state = ops.linear_attention(q, k, v, log_decay, initial_state=state, segment_ids=segment_ids)
        y = self.out(self.norm(o.reshape(*x.shape[:2], -1)))
        return y, None if state is None else final_state

    def init_state(self, batch_size, max_length, dtype):
        return jnp.zeros((batch_size, self.heads, self.width, self.width), jnp.float32)

    @staticmethod
    def check(config, d_model):
        return check_heads({"num_heads": heads_or_default(config.num_heads, d_model, 128)}, "d_model", d_model)

    @staticmethod
    def num_parameters(config, d_model):
        return 4 * d_model**2 + 2 * d_model

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        return 8 * d_model**2 + 4 * d_model**2 / heads_or_default(config.num_heads, d_model, 128)
