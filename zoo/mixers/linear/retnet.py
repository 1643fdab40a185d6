"""Multi-scale retention (Sun et al. 2023, arXiv:2307.08621).

    S_t = gamma_h S_{t-1} + k_t v_t^T          gamma_h = 1 - 2^(-5-h), h = 0 ... heads - 1
    o_t = S_t^T q_t / sqrt(K)                  y_t = W_o (norm(o_t) * silu(x_t W_g))

q and k are turned by rotary positions; the norm is per head. State: S, float32 [batch, heads, K, V].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import gated, linear, rms_norm, rotary
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.mixers.from_softmax import open_gate, take_over
from zoo.settings import setting


@dataclasses.dataclass
class RetNetConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 256 of d_model, at least 4")
    expand_k: float = setting(1.0, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(2.0, "V * num_heads / d_model", above=0, at_most=64)
    rope_base: float = setting(10_000.0, "the slowest pair turns by 1 / base a token", at_least=1)


def _widths(config: RetNetConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, K * heads, V * heads)."""
    heads = heads_or_default(config.num_heads, d_model, 256)
    return heads, int(config.expand_k * d_model), int(config.expand_v * d_model)


class RetNet(Mixer):
    config_class = RetNetConfig
    saved_names = ("retnet_q", "retnet_k", "retnet_v")

    def __init__(self, config: RetNetConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v = _widths(config, d)
        self.key_width, self.value_width = d_k // self.heads, d_v // self.heads
        self.rope_base = config.rope_base
        self.q = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        positions = positions_or_default(positions, x)
        heads_k = (*x.shape[:2], self.heads, self.key_width)
        heads_v = (*x.shape[:2], self.heads, self.value_width)
        q = checkpoint_name(rotary(self.q(x).reshape(heads_k), positions, self.rope_base), "retnet_q")
        k = checkpoint_name(rotary(self.k(x).reshape(heads_k), positions, self.rope_base), "retnet_k")
        v = checkpoint_name(self.v(x).reshape(heads_v), "retnet_v")
        log_decay = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.heads, dtype=jnp.float32))))  # [H]
        o, final_state = ops.linear_attention(q, k, v, log_decay, initial_state=state, segment_ids=segment_ids)
        y = self.out(gated(self.norm, o, self.output_gate(x), jax.nn.silu))
        return y, None if state is None else final_state

    def from_softmax(self, softmax):
        """Its decays stay those of its definition."""
        return take_over(self, softmax, heads=self.heads, turned=True) | open_gate(self, "output_gate")

    def init_state(self, batch_size, max_length, dtype):
        return jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32)

    @staticmethod
    def check(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        problems = check_heads({"num_heads": heads}, "expand_k * d_model", d_k)
        problems += check_heads({"num_heads": heads}, "expand_v * d_model", d_v)
        if not problems and d_k // heads % 2:
            problems.append(f"num_heads: a key width of {d_k // heads} is odd; rotary needs an even one")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        return d_model * (2 * d_k + 3 * d_v) + d_v // heads

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, d_k, d_v = _widths(config, d_model)
        return 2 * d_model * (2 * d_k + 3 * d_v) + 4 * d_k * d_v / heads
