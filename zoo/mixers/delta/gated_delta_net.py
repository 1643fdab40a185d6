"""Gated DeltaNet: the delta rule on a state that decays (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464).

    S_t = (I - b_t k_t k_t^T) a_t S_{t-1} + b_t k_t v_t^T  a_t = exp(-exp(A) softplus(x_t W_a + c)), one a head
    o_t = S_t^T q_t / sqrt(K)                              b_t = beta_max * sigmoid(x_t W_b)
    y_t = W_o (norm(o_t) * silu(x_t W_r))

The gate empties the whole state, the rule corrects what it holds for one key. q, k and v pass a short convolution and
SiLU; q and k have unit length; the norm is per head. exp(A) starts uniform up to 16, softplus(c) log-uniform between
1e-3 and 1e-1, as Mamba-2's.

The layer of Qwen3-Next (transformers, qwen3_next) has fewer heads of q and k than of v: at d_model 2048 it is
num_heads 16, num_v_heads 32, expand_k 1, expand_v 2.

State: S, float32 [batch, v heads, K, V], and the last conv_width - 1 inputs of the convolutions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import ConvolvedQKV, gated, linear, parameter, rms_norm, step_size_bias
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_at_most
from zoo.mixers.from_softmax import decaying, open_gate, short_convs, take_over
from zoo.settings import setting


@dataclasses.dataclass
class GatedDeltaNetConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads of q and k", zero="the fewest with K of at most 128, at least 4")
    num_v_heads: int = setting(0, "heads of v, which share q and k in groups", zero="num_heads")
    expand_k: float = setting(0.75, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.5, "V * num_v_heads / d_model", above=0, at_most=64)
    conv_width: int = setting(4, "taps of the convolutions", unit="tap", at_most=1024)
    beta_max: float = setting(1.0, "b_t's bound; above 1 there are negative eigenvalues", above=0, at_most=2)


def _widths(config: GatedDeltaNetConfig, d_model: int) -> tuple[int, int, int, int]:
    """(heads of q and k, of v, K * heads of q and k, V * heads of v)."""
    d_k, d_v = int(config.expand_k * d_model), int(config.expand_v * d_model)
    heads = heads_at_most(config.num_heads, d_k, 128)
    return heads, config.num_v_heads or heads, d_k, d_v


class GatedDeltaNet(Mixer):
    config_class = GatedDeltaNetConfig
    saved_names = (
        "gated_delta_net_q",
        "gated_delta_net_k",
        "gated_delta_net_v",
        "gated_delta_net_beta",
        "gated_delta_net_log_decay",
    )

    def __init__(self, config: GatedDeltaNetConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.key_heads, self.heads, d_k, d_v = _widths(config, d)
        self.key_width, self.value_width, self.beta_max = d_k // self.key_heads, d_v // self.heads, config.beta_max
        self.qkv = ConvolvedQKV(
            d,
            key_heads=self.key_heads,
            key_width=self.key_width,
            heads=self.heads,
            value_width=self.value_width,
            conv_width=config.conv_width,
            dtype=dtype,
            rngs=rngs,
        )
        of_gate = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.beta = linear(d, self.heads, ("embed", "gates"), **of_gate)
        self.decay = linear(d, self.heads, ("embed", "gates"), **of_gate)
        self.decay_bias = parameter(step_size_bias(rngs.params(), (self.heads,), 1e-3, 1e-1), ("norm",), decay=False)
        rate = jax.random.uniform(rngs.params(), (self.heads,), minval=1e-2, maxval=16.0)
        self.A_log = parameter(jnp.log(rate), ("norm",), decay=False)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        before = {"conv": None, "S": None} if state is None else state
        q, k, v, conv = self.qkv(x, segment_ids=segment_ids, state=before["conv"])
        beta = self.beta_max * jax.nn.sigmoid(self.beta(x))
        log_decay = -jnp.exp(self.A_log[...]) * jax.nn.softplus(self.decay(x) + self.decay_bias[...])
        q, k, v, beta, log_decay = map(checkpoint_name, (q, k, v, beta, log_decay), self.saved_names)
        o, final_s = ops.delta_rule(q, k, v, beta, log_decay, initial_state=before["S"], segment_ids=segment_ids)
        y = self.out(gated(self.norm, o, self.output_gate(x), jax.nn.silu))
        return y, None if state is None else {"conv": conv, "S": final_s}

    def from_softmax(self, softmax):
        of_qkv = {"q": "qkv.q", "k": "qkv.k", "v": "qkv.v"}
        found = take_over(self, softmax, heads=self.heads, key_heads=self.key_heads, **of_qkv) | short_convs(self)
        return found | open_gate(self, "output_gate") | decaying(self, softmax, "decay")

    def init_state(self, batch_size, max_length, dtype):
        return {
            "conv": self.qkv.init_state(batch_size, dtype),
            "S": jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32),
        }

    def spread_over_tensor(self):
        # One head of q and k is on every device.
        return {"num_v_heads": self.heads} | ({"num_heads": self.key_heads} if self.key_heads > 1 else {})

    @staticmethod
    def check(config, d_model):
        key_heads, heads, d_k, d_v = _widths(config, d_model)
        problems = check_heads({"num_heads": key_heads}, "expand_k * d_model", d_k)
        problems += check_heads({"num_v_heads": heads}, "expand_v * d_model", d_v)
        return problems or check_heads({"num_heads": key_heads}, "the number of heads of v", heads)

    @staticmethod
    def num_parameters(config, d_model):
        _, heads, d_k, d_v = _widths(config, d_model)
        gates = 2 * d_model * heads + 2 * heads
        read_out = 2 * d_model * d_v + d_v // heads  # output gate, out; norm
        return ConvolvedQKV.num_parameters(d_model, d_k, d_v, config.conv_width) + gates + read_out

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        key_heads, heads, d_k, d_v = _widths(config, d_model)
        projections = 4 * d_model * (heads + d_v)  # beta, decay; output gate, out
        qkv = ConvolvedQKV.flops_per_token(d_model, d_k, d_v, config.conv_width)
        return qkv + projections + 6 * d_k * d_v / key_heads
