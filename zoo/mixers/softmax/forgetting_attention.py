"""Forgetting attention: softmax attention with a decay that the tokens decide (Lin et al. 2025, arXiv:2503.02130).

    o_t = sum_s p_ts v_s,   p_ts = softmax over s <= t of (q_t . k_s / sqrt(K) + sum_{s < u <= t} log f_u)
    f_t = sigmoid(x_t W_f + b), one a head        y_t = W_o o_t

The decay tells tokens their order, so q and k are not turned (`positions=rope` turns them). All else is `attention`,
its settings too; the paper's larger block ("Pro") has its `qk_norm` and `output_gate`.
State: that of `attention`, and the sums of log f up to each token, two float32 [batch, heads, max_length, 2].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo.layers import linear
from zoo.mixers.base import Sizes, heads_or_default
from zoo.mixers.softmax.attention import POSITIONS, Attention, AttentionConfig
from zoo.settings import setting


@dataclasses.dataclass
class ForgettingAttentionConfig(AttentionConfig):
    positions: str = setting("none", "of q and k", choices=POSITIONS)


class ForgettingAttention(Attention):
    config_class = ForgettingAttentionConfig
    runs_twice = True  # its decays have a direction
    saved_names = (*Attention.saved_names, "attention_log_decay")

    def __init__(
        self, config: ForgettingAttentionConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs
    ):
        super().__init__(_without_biases(config), sizes, layer_index=layer_index, rngs=rngs)
        of_gate = {"bias": True, "decay": False, "dtype": sizes.dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.forget = linear(sizes.d_model, self.heads, ("embed", "heads"), **of_gate)

    def log_decay(self, x):
        return checkpoint_name(jax.nn.log_sigmoid(self.forget(x)), "attention_log_decay")

    def init_state(self, batch_size, max_length, dtype):
        state = super().init_state(batch_size, max_length, dtype)
        return state | {"sums": jnp.zeros((batch_size, self.heads, state["k"].shape[2], 2), jnp.float32)}

    @staticmethod
    def num_parameters(config, d_model):
        gate = (d_model + 1) * heads_or_default(config.num_heads, d_model, 64)
        return Attention.num_parameters(_without_biases(config), d_model) + gate

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        gate = 2 * d_model * heads_or_default(config.num_heads, d_model, 64)
        return Attention.flops_per_token(config, d_model, context_length) + gate


def _without_biases(config: ForgettingAttentionConfig) -> ForgettingAttentionConfig:
    """For the parts of `Attention`: the family's own are given what `biases` asks for once."""
    return dataclasses.replace(config, biases="")
