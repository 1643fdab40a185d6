"""Kimi Delta Attention: the delta rule with a decay for each key dimension (Kimi Team 2025, arXiv:2510.26692).

    S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T
    a_t = exp(-exp(A) softplus(x_t W_1 W_2 + c))           b_t = beta_max * sigmoid(x_t W_b)
    o_t = S_t^T q_t / sqrt(K)                              y_t = W_o (norm(o_t) * sigmoid(x_t W_3 W_4 + d))

Gated DeltaNet with GLA's gate: what a head forgets is chosen for each of its keys, through a narrow projection, and so
is the output gate. q, k and v pass a short convolution and SiLU; q and k have unit length; the norm is per head.
exp(A), a number a head, starts uniform between 1 and 16, softplus(c) log-uniform between 1e-3 and 1e-1.

State: S, float32 [batch, heads, K, V], and the last conv_width - 1 inputs of the convolutions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import ConvolvedQKV, gated, linear, parameter, rms_norm, step_size_bias
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.mixers.from_softmax import SIGMOID_OPEN, decaying, open_gate, short_convs, take_over
from zoo.settings import setting


@dataclasses.dataclass
class KDAConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 128 of d_model, at least 4")
    expand_k: float = setting(1.0, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.0, "V * num_heads / d_model", above=0, at_most=64)
    conv_width: int = setting(4, "taps of the convolutions", unit="tap", at_most=1024)
    gate_rank: int = setting(0, "width of x W_1 and of x W_3", zero="V")
    beta_max: float = setting(1.0, "b_t's bound; above 1 there are negative eigenvalues", above=0, at_most=2)


def _widths(config: KDAConfig, d_model: int) -> tuple[int, int, int, int]:
    """(heads, K * heads, V * heads, rank of the gates)."""
    heads = heads_or_default(config.num_heads, d_model, 128)
    d_k, d_v = int(config.expand_k * d_model), int(config.expand_v * d_model)
    return heads, d_k, d_v, config.gate_rank or d_v // heads


class KDA(Mixer):
    config_class = KDAConfig
    saved_names = ("kda_q", "kda_k", "kda_v", "kda_beta", "kda_log_decay")

    def __init__(self, config: KDAConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v, rank = _widths(config, d)
        self.key_width, self.value_width, self.beta_max = d_k // self.heads, d_v // self.heads, config.beta_max
        self.qkv = ConvolvedQKV(
            d,
            key_heads=self.heads,
            key_width=self.key_width,
            heads=self.heads,
            value_width=self.value_width,
            conv_width=config.conv_width,
            dtype=dtype,
            rngs=rngs,
        )
        of_gate = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.beta = linear(d, self.heads, ("embed", "gates"), **of_gate)
        self.decay_down = linear(d, rank, ("embed", "rank"), **of_gate)
        self.decay_up = linear(rank, d_k, ("rank", "heads"), decay=False, dtype=jnp.float32, rngs=rngs)
        self.decay_bias = parameter(step_size_bias(rngs.params(), (d_k,), 1e-3, 1e-1), ("norm",), decay=False)
        rate = jax.random.uniform(rngs.params(), (self.heads,), minval=1.0, maxval=16.0)
        self.A_log = parameter(jnp.log(rate), ("norm",), decay=False)
        self.gate_down = linear(d, rank, ("embed", "rank"), dtype=dtype, rngs=rngs)
        self.gate_up = linear(rank, d_v, ("rank", "heads"), bias=True, dtype=dtype, rngs=rngs)
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        before = {"conv": None, "S": None} if state is None else state
        q, k, v, conv = self.qkv(x, segment_ids=segment_ids, state=before["conv"])
        beta = self.beta_max * jax.nn.sigmoid(self.beta(x))
        step = jax.nn.softplus(self.decay_up(self.decay_down(x)) + self.decay_bias[...])
        log_decay = -jnp.exp(self.A_log[...])[:, None] * step.reshape(q.shape)
        q, k, v, beta, log_decay = map(checkpoint_name, (q, k, v, beta, log_decay), self.saved_names)
        o, final_s = ops.delta_rule(q, k, v, beta, log_decay, initial_state=before["S"], segment_ids=segment_ids)
        y = self.out(gated(self.norm, o, self.gate_up(self.gate_down(x)), jax.nn.sigmoid))
        return y, None if state is None else {"conv": conv, "S": final_s}

    def from_softmax(self, softmax):
        found = take_over(self, softmax, heads=self.heads, q="qkv.q", k="qkv.k", v="qkv.v") | short_convs(self)
        return found | open_gate(self, "gate_up", SIGMOID_OPEN) | decaying(self, softmax, "decay_up")

    def init_state(self, batch_size, max_length, dtype):
        return {
            "conv": self.qkv.init_state(batch_size, dtype),
            "S": jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32),
        }

    @staticmethod
    def check(config, d_model):
        heads, d_k, d_v, _ = _widths(config, d_model)
        problems = check_heads({"num_heads": heads}, "expand_k * d_model", d_k)
        return problems + check_heads({"num_heads": heads}, "expand_v * d_model", d_v)

    @staticmethod
    def num_parameters(config, d_model):
        heads, d_k, d_v, rank = _widths(config, d_model)
        gates = d_model * heads + rank * (2 * d_model + d_k + d_v) + heads + d_k + d_v  # and A, c, d
        qkv = ConvolvedQKV.num_parameters(d_model, d_k, d_v, config.conv_width)
        return qkv + gates + d_model * d_v + d_v // heads  # out, norm

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, d_k, d_v, rank = _widths(config, d_model)
        projections = 2 * (d_model * (heads + d_v) + rank * (2 * d_model + d_k + d_v))
        qkv = ConvolvedQKV.flops_per_token(d_model, d_k, d_v, config.conv_width)
        return qkv + projections + 6 * d_k * d_v / heads
