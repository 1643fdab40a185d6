"""mLSTM: matrix memory, exponential input gate (Beck et al. 2024, arXiv:2405.04517), as in xLSTM 7B (2503.13427).

    S_t = f_t S_{t-1} + i_t k_t v_t^T          f_t = sigmoid(cap(x_t W_f + b_f)), i_t = exp(cap(x_t W_i + b_i))
    n_t = f_t n_{t-1} + i_t k_t                cap(z) = 15 tanh(z / 15), one gate a head
    o_t = S_t^T q_t / max(|n_t . q_t|, 1)      y_t = W_o (norm(o_t) * sigmoid(x_t W_r)),   q_t = x_t W_q / sqrt(K)

Everything is kept divided by exp(m_t), so that no exponential overflows: m_t = max(log f_t + m_{t-1}, log i_t) makes a
decay exp(log f_t + m_{t-1} - m_t) and an input gate exp(log i_t - m_t) that are at most 1, and the 1 in the denominator
exp(-m_t). o does not depend on m, so no gradient flows through it. The norm is per head, mean and variance.

State: S, float32 [batch, heads, K, V], n, float32 [batch, heads * K], m, float32 [batch, heads].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import HeadLayerNorm, gated, linear, parameter, soft_cap
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting
from zoo.taken import last


@dataclasses.dataclass
class MLSTMConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 512 of d_model, at least 4")
    expand_k: float = setting(0.5, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.0, "V * num_heads / d_model", above=0, at_most=64)
    gate_soft_cap: float = setting(15.0, "of the gates' logits", zero="none", at_least=1e-3, at_most=1e6)
    input_gate_bias: float = setting(0.0, "b_i at the start; xLSTM 7B has -10", at_least=-1000, at_most=1000)


def _widths(config: MLSTMConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, K * heads, V * heads)."""
    heads = heads_or_default(config.num_heads, d_model, 512)
    return heads, int(config.expand_k * d_model), int(config.expand_v * d_model)


def running_maximum(log_forget: jax.Array, log_input: jax.Array, initial: jax.Array, segment_ids: jax.Array | None):
    """m_t and m_{t-1}, [B, T, H]: m_t = max(log_forget_t + m_{t-1}, log_input_t), and m before a segment is 0."""

    def after(a, b):  # max-plus: m -> max(shift + m, value), one after the other
        return a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])

    shift, value = log_forget, log_input
    if segment_ids is not None:
        starts = ops.segment_starts(segment_ids)[..., None]
        shift, value = jnp.where(starts, -jnp.inf, shift), jnp.where(starts, jnp.maximum(log_forget, value), value)
    _, m = ops.associative_scan(after, (shift, value), (jnp.zeros_like(initial), initial))
    before, _ = ops.previous(m, initial_state=initial, segment_ids=segment_ids)
    return m, before


class MLSTM(Mixer):
    config_class = MLSTMConfig
    saved_names = ("mlstm_q", "mlstm_k", "mlstm_v")

    def __init__(self, config: MLSTMConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v = _widths(config, d)
        self.key_width, self.value_width = d_k // self.heads, d_v // self.heads
        self.soft_cap = config.gate_soft_cap
        self.q = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        gate = {"init_scale": 0.1, "decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.input_gate = linear(d, self.heads, ("embed", "gates"), **gate)
        self.forget_gate = linear(d, self.heads, ("embed", "gates"), **gate)
        # Heads start with memories of 20 to 400 tokens, as in the paper.
        vector = {"axes": ("norm",), "decay": False}
        self.input_bias = parameter(jnp.full((self.heads,), config.input_gate_bias, jnp.float32), **vector)
        self.forget_bias = parameter(jnp.linspace(3.0, 6.0, self.heads), **vector)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = HeadLayerNorm(self.heads, self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        batch, time = x.shape[:2]
        initial = {"S": None, "n": None, "m": jnp.zeros((batch, self.heads), jnp.float32)} if state is None else state
        q = checkpoint_name(self.q(x).reshape(batch, time, self.heads, self.key_width), "mlstm_q")
        k = checkpoint_name(self.k(x).reshape(batch, time, self.heads, self.key_width), "mlstm_k")
        v = checkpoint_name(self.v(x).reshape(batch, time, self.heads, self.value_width), "mlstm_v")
        log_input = self._cap(self.input_gate(x) + self.input_bias[...])  # [B, T, H]
        forget = self._cap(self.forget_gate(x) + self.forget_bias[...])
        log_forget = jax.nn.log_sigmoid(forget)
        m, before = jax.lax.stop_gradient(running_maximum(log_forget, log_input, initial["m"], segment_ids))
        log_decay = log_forget + (before - m)
        log_decay -= jax.lax.stop_gradient(jnp.maximum(log_decay, 0))  # it is at most 0 but for rounding
        k = (jnp.exp(log_input - m)[..., None] * k).astype(x.dtype)
        scale = self.key_width**-0.5
        o, final_s = ops.linear_attention(
            q, k, v, log_decay, initial_state=initial["S"], segment_ids=segment_ids, scale=scale
        )
        keys = k.astype(jnp.float32).reshape(batch, time, -1)
        decays = jnp.repeat(log_decay, self.key_width, axis=-1)
        n, final_n = ops.linear_scan(keys, decays, initial_state=initial["n"], segment_ids=segment_ids)
        weight = scale * jnp.einsum("bthk,bthk->bth", q.astype(jnp.float32), n.reshape(q.shape))
        divisor = (jnp.maximum(jnp.abs(weight), jnp.exp(-m)) + 1e-6)[..., None]
        y = self.out(gated(lambda o: self.norm(o / divisor), o, self.output_gate(x), jax.nn.sigmoid))
        return y, None if state is None else {"S": final_s, "n": final_n, "m": last(m, segment_ids, initial["m"])}

    def _cap(self, logits):
        return soft_cap(logits, self.soft_cap) if self.soft_cap else logits

    def init_state(self, batch_size, max_length, dtype):
        return {
            "S": jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32),
            "n": jnp.zeros((batch_size, self.heads * self.key_width), jnp.float32),
            "m": jnp.zeros((batch_size, self.heads), jnp.float32),
        }

    @staticmethod
    def check(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        problems = check_heads({"num_heads": heads}, "expand_k * d_model", d_k)
        problems += check_heads({"num_heads": heads}, "expand_v * d_model", d_v)
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        return d_model * (2 * d_k + 3 * d_v + 2 * heads) + 2 * heads + d_v

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, d_k, d_v = _widths(config, d_model)
        return 2 * d_model * (2 * d_k + 3 * d_v + 2 * heads) + 4 * d_k * d_v / heads + 2 * d_k  # and n . q
