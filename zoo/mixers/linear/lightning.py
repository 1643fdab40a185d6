"""Lightning attention (Qin et al. 2024, arXiv:2401.04658), the layer of MiniMax-01 (arXiv:2501.08313).

    S_t = lambda_h S_{t-1} + k_t v_t^T         log lambda_h = -2^(-8 h / heads) (1 - layer / (depth - 1) + 1e-5)
    o_t = S_t^T q_t, h = 1 ... heads           y_t = W_o (norm(o_t) * sigmoid(x_t W_g))

q, k and v pass a SiLU; the norm is over all heads together. The slopes are TransNormerLLM's (2307.14995): the first
layer forgets fastest, the last hardly at all. A mixer outside a model is a first layer.
State: S, float32 [batch, heads, K, V].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import gated, linear, rms_norm, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting


@dataclasses.dataclass
class LightningConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 128 of d_model, at least 4")
    head_dim: int = setting(0, "K = V", zero="d_model / num_heads")


def _widths(config: LightningConfig, d_model: int) -> tuple[int, int]:
    """(heads, K)."""
    heads = heads_or_default(config.num_heads, d_model, 128)
    return heads, config.head_dim or d_model // heads


class Lightning(Mixer):
    config_class = LightningConfig
    saved_names = ("lightning_q", "lightning_k", "lightning_v")

    def __init__(self, config: LightningConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.head_dim = _widths(config, d)
        width = self.heads * self.head_dim
        self.q = linear(d, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.output_gate = linear(d, width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(width, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    @staticmethod
    def over_depth(mixers, layer_index, num_layers, step=None):
        return 1.0 - layer_index / max(num_layers - 1, 1)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None, depth=None):
        heads = (*x.shape[:2], self.heads, self.head_dim)
        q = checkpoint_name(rounded_once(jax.nn.silu, self.q(x)).reshape(heads), "lightning_q")
        k = checkpoint_name(rounded_once(jax.nn.silu, self.k(x)).reshape(heads), "lightning_k")
        v = checkpoint_name(rounded_once(jax.nn.silu, self.v(x)).reshape(heads), "lightning_v")
        slope = 2.0 ** (-8.0 * jnp.arange(1, self.heads + 1) / self.heads)
        log_decay = -slope * ((1.0 if depth is None else depth) + 1e-5)  # [H]
        o, final_state = ops.linear_attention(
            q, k, v, log_decay, initial_state=state, segment_ids=segment_ids, scale=1.0
        )
        y = self.out(gated(self.norm, o.reshape(*x.shape[:2], -1), self.output_gate(x), jax.nn.sigmoid))
        return y, None if state is None else final_state

    def init_state(self, batch_size, max_length, dtype):
        return jnp.zeros((batch_size, self.heads, self.head_dim, self.head_dim), jnp.float32)

    @staticmethod
    def check(config, d_model):
        heads = heads_or_default(config.num_heads, d_model, 128)
        return [] if config.head_dim else check_heads({"num_heads": heads}, "d_model", d_model)

    @staticmethod
    def num_parameters(config, d_model):
        heads, head_dim = _widths(config, d_model)
        return 5 * d_model * heads * head_dim + heads * head_dim

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, head_dim = _widths(config, d_model)
        return 10 * d_model * heads * head_dim + 4 * heads * head_dim**2
