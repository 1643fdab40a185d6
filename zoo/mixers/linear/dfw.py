"""Decaying fast weights (Mao 2022, arXiv:2210.04243): a gate for each key and one for each value.

    S_t = (a_t b_t^T) o S_{t-1} + k_t v_t^T    a_t = sigmoid(x_t W_a + c_a), b_t = sigmoid(x_t W_b + c_b)
    o_t = S_t^T q_t / sqrt(K)                  y_t = W_o norm(o_t)

q and k have no feature map and there is no normaliser: those are what the paper takes away from kernel attention. It
goes on from the weights of a softmax model; a model that starts from nothing gets, as in the zoo's other families, a
norm per head, which bounds what a slow gate adds up, and gate biases spread over memories of 7 to 400 tokens (the
authors' kernels are tested with gates uniform between 0 and 1, a memory of 2 tokens at the median).
State: S, float32 [batch, heads, K, V].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import linear, parameter, rms_norm
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting


@dataclasses.dataclass
class DFWConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")


class DFW(Mixer):
    config_class = DFWConfig
    saved_names = ("dfw_q", "dfw_k", "dfw_v", "dfw_key_log_decay", "dfw_value_log_decay")

    def __init__(self, config: DFWConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads = heads_or_default(config.num_heads, d, 64)
        self.width = d // self.heads  # K = V
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        of_gate = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.key_gate = linear(d, d, ("embed", "heads"), **of_gate)
        self.value_gate = linear(d, d, ("embed", "heads"), **of_gate)
        # Rows and columns of a head start with memories of 7 to 400 tokens: sigmoid(2) ... sigmoid(6).
        bias = jnp.tile(jnp.linspace(2.0, 6.0, self.width), self.heads)
        self.key_bias = parameter(bias, ("norm",), decay=False)
        self.value_bias = parameter(bias, ("norm",), decay=False)
        self.norm = rms_norm(self.width, epsilon=sizes.norm_epsilon, dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        heads = (*x.shape[:2], self.heads, self.width)
        q = checkpoint_name(self.q(x).reshape(heads), "dfw_q")
        k = checkpoint_name(self.k(x).reshape(heads), "dfw_k")
        v = checkpoint_name(self.v(x).reshape(heads), "dfw_v")
        key_gate = self.key_gate(x) + self.key_bias[...]
        value_gate = self.value_gate(x) + self.value_bias[...]
        g = checkpoint_name(jax.nn.log_sigmoid(key_gate).reshape(heads), "dfw_key_log_decay")
        f = checkpoint_name(jax.nn.log_sigmoid(value_gate).reshape(heads), "dfw_value_log_decay")
        o, final_state = ops.fast_weights(q, k, v, g, f, initial_state=state, segment_ids=segment_ids)
        y = self.out(self.norm(o).reshape(*x.shape[:2], -1))
        return y, None if state is None else final_state

    def init_state(self, batch_size, max_length, dtype):
        return jnp.zeros((batch_size, self.heads, self.width, self.width), jnp.float32)

    @staticmethod
    def check(config, d_model):
        return check_heads({"num_heads": heads_or_default(config.num_heads, d_model, 64)}, "d_model", d_model)

    @staticmethod
    def num_parameters(config, d_model):
        return 6 * d_model**2 + 2 * d_model + d_model // heads_or_default(config.num_heads, d_model, 64)

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        return 12 * d_model**2 + 4 * d_model**2 / heads_or_default(config.num_heads, d_model, 64)
