"""GateLoop: linear attention with a complex gate (Katsch 2023, arXiv:2311.01927).

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        a_t = sigmoid(x_t W_a + b) exp(i x_t W_theta)
    o_t = Re(S_t^T q_t) / sqrt(K)              y_t = W_o (norm(o_t) * silu(x_t W_g))

The phases need no complex state: with Phi_t the sum of the phases up to t, S_t = e^{i Phi_t} (a real recurrence of keys
turned by -Phi), and so

    Re(S_t^T q_t) = [q cos Phi, q sin Phi]_t^T R_t,   R_t = diag(|a_t|, |a_t|) R_{t-1} + [k cos Phi, k sin Phi]_t v_t^T

The gate is in polar form, a sigmoid for the magnitude and the identity for the phase; q, k, v are plain projections,
SiLU gates the output. Chosen here: heads of any width (the author's runs have one for each channel, K = V = 1), an
RMS norm per head, and biases that spread the magnitudes over memories of 3 to 400 tokens (a plain sigmoid starts at
1/2).

Phi is summed modulo 2 pi, in turns (modulo 1, which is exact), so that it does not lose digits as it grows.
State: R, float32 [batch, heads, 2 K, V], and Phi, in turns, float32 [batch, heads, K].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import gated, linear, parameter, rms_norm
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting
from zoo.taken import last


@dataclasses.dataclass
class GateLoopConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 256 of d_model, at least 4")
    expand_k: float = setting(0.5, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.0, "V * num_heads / d_model", above=0, at_most=64)


def _widths(config: GateLoopConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, K * heads, V * heads)."""
    heads = heads_or_default(config.num_heads, d_model, 256)
    return heads, int(config.expand_k * d_model), int(config.expand_v * d_model)


def cumulative_phase(phase: jax.Array, initial: jax.Array | None) -> jax.Array:
    """The sums of `phase` [B, T, ...], in turns, over time, modulo 1, in [-1/2, 1/2], on top of `initial` [B, ...]."""
    wrap = lambda turns: turns - jnp.round(jax.lax.stop_gradient(turns))  # noqa: E731
    initial = jnp.zeros_like(phase[:, 0]) if initial is None else initial
    return ops.associative_scan(lambda a, b: wrap(a + b), wrap(phase), initial)


class GateLoop(Mixer):
    config_class = GateLoopConfig
    saved_names = ("gateloop_q", "gateloop_k", "gateloop_v", "gateloop_log_decay", "gateloop_phase")

    def __init__(self, config: GateLoopConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v = _widths(config, d)
        self.key_width, self.value_width = d_k // self.heads, d_v // self.heads
        self.q = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        of_gate = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.magnitude = linear(d, d_k, ("embed", "heads"), **of_gate)
        # Keys of a head start with memories of 3 to 400 tokens: sigmoid(1) ... sigmoid(6).
        bias = jnp.tile(jnp.linspace(1.0, 6.0, self.key_width), self.heads)
        self.magnitude_bias = parameter(bias, ("norm",), decay=False)
        self.phase = linear(d, d_k, ("embed", "heads"), **of_gate)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        initial = {"R": None, "Phi": None} if state is None else state
        heads_k = (*x.shape[:2], self.heads, self.key_width)
        q = checkpoint_name(self.q(x).reshape(heads_k), "gateloop_q")
        k = checkpoint_name(self.k(x).reshape(heads_k), "gateloop_k")
        v = checkpoint_name(self.v(x).reshape(*x.shape[:2], self.heads, self.value_width), "gateloop_v")
        magnitude = self.magnitude(x) + self.magnitude_bias[...]
        log_decay = checkpoint_name(jax.nn.log_sigmoid(magnitude).reshape(heads_k), "gateloop_log_decay")
        phase = checkpoint_name(self.phase(x).reshape(heads_k), "gateloop_phase")
        # Only differences of Phi within a segment count: it may run on over the boundaries of packed documents.
        turns = cumulative_phase(phase / (2 * jnp.pi), initial["Phi"])
        angle = 2 * jnp.pi * turns
        rotation = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)  # [B, T, H, 2 K]
        o, final_r = ops.linear_attention(
            (rotation * jnp.tile(q, 2)).astype(q.dtype),
            (rotation * jnp.tile(k, 2)).astype(k.dtype),
            v,
            jnp.tile(log_decay, 2),
            initial_state=initial["R"],
            segment_ids=segment_ids,
            scale=self.key_width**-0.5,
        )
        y = self.out(gated(self.norm, o, self.output_gate(x), jax.nn.silu))
        return y, None if state is None else {"R": final_r, "Phi": last(turns, segment_ids, initial["Phi"])}

    def init_state(self, batch_size, max_length, dtype):
        return {
            "R": jnp.zeros((batch_size, self.heads, 2 * self.key_width, self.value_width), jnp.float32),
            "Phi": jnp.zeros((batch_size, self.heads, self.key_width), jnp.float32),
        }

    @staticmethod
    def check(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        problems = check_heads({"num_heads": heads}, "expand_k * d_model", d_k)
        return problems + check_heads({"num_heads": heads}, "expand_v * d_model", d_v)

    @staticmethod
    def num_parameters(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        return d_model * (4 * d_k + 3 * d_v) + d_k + d_v // heads

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, d_k, d_v = _widths(config, d_model)
        return 2 * d_model * (4 * d_k + 3 * d_v) + 8 * d_k * d_v / heads
