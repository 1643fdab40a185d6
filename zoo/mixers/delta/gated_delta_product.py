"""Gated DeltaProduct: several steps of the delta rule for a token (Siems et al. 2025, arXiv:2502.10297).

    S_t0 = a_t S_{t-1}                                     a_t = exp(-exp(A) softplus(x_t W_a + c)), one a head
    S_tj = (I - b_tj k_tj k_tj^T) S_t,j-1 + b_tj k_tj v_tj^T   j = 1 ... n = num_householder, and S_t = S_tn
    o_t = S_t^T q_t / sqrt(K)                              b_tj = beta_max * sigmoid(x_t W_b)
    y_t = W_o (norm(o_t) * silu(x_t W_r))

A step with b = 2 is a reflection (Householder's), n of them make any orthogonal matrix that moves n dimensions: n steps
follow groups whose elements one does not. Everything else is Gated DeltaNet's, with n keys and values a token. To the
op a token is n tokens, of which the last is read.

State: S, float32 [batch, heads, K, V], and the last conv_width - 1 inputs of the convolutions.
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
from zoo.taken import repeated


@dataclasses.dataclass
class GatedDeltaProductConfig(NormedMixerConfig):
    num_householder: int = setting(2, "n, steps of the delta rule for a token", unit="step", at_most=64)
    num_heads: int = setting(0, "heads", zero="the fewest with K of at most 128, at least 4")
    expand_k: float = setting(0.75, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.5, "V * num_heads / d_model", above=0, at_most=64)
    conv_width: int = setting(4, "taps of the convolutions", unit="tap", at_most=1024)
    beta_max: float = setting(2.0, "b_t's bound; above 1 there are negative eigenvalues", above=0, at_most=2)
    forget_gate: bool = setting(True, "a_t; without it a_t = 1: DeltaProduct")


def _widths(config: GatedDeltaProductConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, K * heads, V * heads)."""
    d_k, d_v = int(config.expand_k * d_model), int(config.expand_v * d_model)
    return heads_at_most(config.num_heads, d_k, 128), d_k, d_v


class GatedDeltaProduct(Mixer):
    config_class = GatedDeltaProductConfig
    saved_names = (
        "gated_delta_product_q",
        "gated_delta_product_k",
        "gated_delta_product_v",
        "gated_delta_product_beta",
        "gated_delta_product_log_decay",
    )

    def __init__(self, config: GatedDeltaProductConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v = _widths(config, d)
        self.key_width, self.value_width = d_k // self.heads, d_v // self.heads
        self.steps, self.beta_max = config.num_householder, config.beta_max
        self.qkv = ConvolvedQKV(
            d,
            key_heads=self.heads,
            key_width=self.key_width,
            heads=self.heads,
            value_width=self.value_width,
            conv_width=config.conv_width,
            writes=self.steps,
            dtype=dtype,
            rngs=rngs,
        )
        of_gate = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.beta = linear(d, self.steps * self.heads, ("embed", "gates"), **of_gate)
        self.decay = linear(d, self.heads, ("embed", "gates"), **of_gate) if config.forget_gate else None
        if config.forget_gate:
            bias = step_size_bias(rngs.params(), (self.heads,), 1e-3, 1e-1)
            self.decay_bias = parameter(bias, ("norm",), decay=False)
            rate = jax.random.uniform(rngs.params(), (self.heads,), minval=1e-2, maxval=16.0)
            self.A_log = parameter(jnp.log(rate), ("norm",), decay=False)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        before = {"conv": None, "S": None} if state is None else state
        batch, time, n = *x.shape[:2], self.steps
        q, k, v, conv = self.qkv(x, segment_ids=segment_ids, state=before["conv"])
        beta = self.beta_max * jax.nn.sigmoid(self.beta(x)).reshape(batch, time * n, self.heads)
        q, k, v, beta = map(checkpoint_name, (q, k, v, beta), self.saved_names[:4])
        log_decay = None
        if self.decay is not None:
            log_decay = -jnp.exp(self.A_log[...]) * jax.nn.softplus(self.decay(x) + self.decay_bias[...])
            log_decay = _among_zeros(checkpoint_name(log_decay, self.saved_names[4]), n, 0)
        o, final_s = ops.delta_rule(
            _among_zeros(q, n, n - 1),
            k,
            v,
            beta,
            log_decay,
            initial_state=before["S"],
            segment_ids=repeated(segment_ids, n, axis=1),
        )
        o = o.reshape(batch, time, n, self.heads, self.value_width)[:, :, -1]
        y = self.out(gated(self.norm, o, self.output_gate(x), jax.nn.silu))
        return y, None if state is None else {"conv": conv, "S": final_s}

    def from_softmax(self, softmax):
        """k and v alike at each step: steps b_1 ... b_n with one key are one step, 1 - (1 - b_1) ... (1 - b_n)."""
        of_qkv = {"q": "qkv.q", "k": "qkv.k", "v": "qkv.v"}
        found = take_over(self, softmax, heads=self.heads, writes=self.steps, **of_qkv) | short_convs(self)
        found |= open_gate(self, "output_gate")
        return found | (decaying(self, softmax, "decay") if self.decay is not None else {})

    def init_state(self, batch_size, max_length, dtype):
        return {
            "conv": self.qkv.init_state(batch_size, dtype),
            "S": jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32),
        }

    @staticmethod
    def check(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        problems = check_heads({"num_heads": heads}, "expand_k * d_model", d_k)
        return problems + check_heads({"num_heads": heads}, "expand_v * d_model", d_v)

    @staticmethod
    def num_parameters(config, d_model):
        (heads, d_k, d_v), n = _widths(config, d_model), config.num_householder
        gates = d_model * heads * n + config.forget_gate * (d_model + 2) * heads
        read_out = 2 * d_model * d_v + d_v // heads  # output gate, out; norm
        return ConvolvedQKV.num_parameters(d_model, d_k, d_v, config.conv_width, n) + gates + read_out

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        (heads, d_k, d_v), n = _widths(config, d_model), config.num_householder
        projections = 2 * d_model * (heads * (n + config.forget_gate) + 2 * d_v)
        qkv = ConvolvedQKV.flops_per_token(d_model, d_k, d_v, config.conv_width, n)
        return qkv + projections + n * 6 * d_k * d_v / heads


def _among_zeros(x: jax.Array, count: int, place: int) -> jax.Array:
    """[B, T, ...] -> [B, T * count, ...]: each entry at `place` of `count`, the others 0."""
    padding = [(0, 0), (0, 0), (place, count - 1 - place), *((0, 0),) * (x.ndim - 2)]
    return jnp.pad(x[:, :, None], padding).reshape(x.shape[0], x.shape[1] * count, *x.shape[2:])
