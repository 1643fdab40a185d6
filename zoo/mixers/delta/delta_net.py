"""DeltaNet: linear attention that corrects (Yang et al. 2024, arXiv:2406.06484; Schlag et al. 2021, 2102.11174).

    S_t = S_{t-1} + b_t k_t (v_t - S_{t-1}^T k_t)^T        b_t = beta_max * sigmoid(x_t W_b)
    o_t = S_t^T q_t / sqrt(K)                              y_t = W_o norm(o_t)

What the state holds for k_t is moved towards v_t, where linear attention adds v_t to it: S_t = (I - b_t k_t k_t^T)
S_{t-1} + b_t k_t v_t^T. q, k and v pass a short convolution and SiLU; q and k have unit length, so that b_t = 1 writes
v_t in place of the old value. With `beta_max` above 1 the transition has negative eigenvalues (arXiv:2411.12537).
`output_gate` makes norm(o_t) * silu(x_t W_r) of norm(o_t), which is per head.

State: S, float32 [batch, heads, K, V], and the last conv_width - 1 inputs of the convolutions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import ConvolvedQKV, gated, linear, rms_norm, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.mixers.from_softmax import open_gate, short_convs, take_over
from zoo.settings import setting


@dataclasses.dataclass
class DeltaNetConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 128 of d_model, at least 4")
    expand_k: float = setting(1.0, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.0, "V * num_heads / d_model", above=0, at_most=64)
    conv_width: int = setting(4, "taps of the convolutions", unit="tap", at_most=1024)
    beta_max: float = setting(1.0, "b_t's bound; above 1 there are negative eigenvalues", above=0, at_most=2)
    output_gate: bool = setting(False, "a SiLU gate on what is read")


def _widths(config: DeltaNetConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, K * heads, V * heads)."""
    heads = heads_or_default(config.num_heads, d_model, 128)
    return heads, int(config.expand_k * d_model), int(config.expand_v * d_model)


class DeltaNet(Mixer):
    config_class = DeltaNetConfig
    saved_names = ("delta_net_q", "delta_net_k", "delta_net_v", "delta_net_beta")

    def __init__(self, config: DeltaNetConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v = _widths(config, d)
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
        gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs) if config.output_gate else None
        self.output_gate = gate
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        before = {"conv": None, "S": None} if state is None else state
        q, k, v, conv = self.qkv(x, segment_ids=segment_ids, state=before["conv"])
        q, k, v = (checkpoint_name(a, f"delta_net_{name}") for a, name in ((q, "q"), (k, "k"), (v, "v")))
        beta = checkpoint_name(self.beta_max * jax.nn.sigmoid(self.beta(x)), "delta_net_beta")
        o, final_s = ops.delta_rule(q, k, v, beta, initial_state=before["S"], segment_ids=segment_ids)
        if self.output_gate is None:
            o = rounded_once(self.norm, o).reshape(*x.shape[:2], -1)
        else:
            o = gated(self.norm, o, self.output_gate(x), jax.nn.silu)
        return self.out(o), None if state is None else {"conv": conv, "S": final_s}

    def from_softmax(self, softmax):
        found = take_over(self, softmax, heads=self.heads, q="qkv.q", k="qkv.k", v="qkv.v")
        return found | short_convs(self) | open_gate(self, "output_gate")

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
        heads, d_k, d_v = _widths(config, d_model)
        read_out = d_model * d_v * (1 + config.output_gate) + d_v // heads  # gate, out; norm
        return ConvolvedQKV.num_parameters(d_model, d_k, d_v, config.conv_width) + d_model * heads + read_out

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, d_k, d_v = _widths(config, d_model)
        projections = 2 * d_model * (heads + d_v * (1 + config.output_gate))
        return ConvolvedQKV.flops_per_token(d_model, d_k, d_v, config.conv_width) + projections + 6 * d_k * d_v / heads
