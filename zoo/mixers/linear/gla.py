"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635).

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        a_t = sigmoid(x_t W_1 W_2 + b)^(1/tau)
    o_t = S_t^T q_t / sqrt(K)                  y_t = W_o (norm(o_t) * silu(x_t W_r))

`gate` takes the gate away step by step, for ablations: "scalar" has one a_t a head, "fixed" RetNet's
a = 1 - 2^(-5-h), "none" a = 1.

State: S, float32 [batch, heads, K, V].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import gated, linear, rms_norm
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads
from zoo.mixers.from_softmax import NOT_CHOSEN, Taken, constant
from zoo.settings import setting

GATES = {"key": "each key dimension", "scalar": "each head", "fixed": "RetNet's, not chosen", "none": "a_t = 1"}


@dataclasses.dataclass
class GLAConfig(NormedMixerConfig):
    num_heads: int = setting(4, "heads")
    expand_k: float = setting(0.5, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.0, "V * num_heads / d_model", above=0, at_most=64)
    gate: str = setting("key", "what a_t is chosen for", choices=GATES)
    gate_rank: int = setting(16, "width of x W_1")
    gate_temperature: float = setting(16.0, "tau: larger forgets more slowly", at_least=1e-3, at_most=1e6)


def _gates(config: GLAConfig, d_model: int) -> int:
    """How many numbers a_t has; 0: it is not computed."""
    return {"key": int(config.expand_k * d_model), "scalar": config.num_heads}.get(config.gate, 0)


class GLA(Mixer):
    config_class = GLAConfig
    saved_names = ("gla_q", "gla_k", "gla_v", "gla_log_decay")

    def __init__(self, config: GLAConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        d_k, d_v = int(config.expand_k * d), int(config.expand_v * d)
        self.heads, self.key_width, self.value_width = (
            config.num_heads,
            d_k // config.num_heads,
            d_v // config.num_heads,
        )
        self.gate, self.temperature = config.gate, config.gate_temperature
        self.q = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        if gates := _gates(config, d):
            self.gate_down = linear(
                d, config.gate_rank, ("embed", "rank"), decay=False, dtype=dtype, out_dtype=jnp.float32, rngs=rngs
            )
            axes = "rank", "heads" if config.gate == "key" else "gates"
            self.gate_up = linear(config.gate_rank, gates, axes, bias=True, decay=False, dtype=jnp.float32, rngs=rngs)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        heads_k = (*x.shape[:2], self.heads, self.key_width)
        heads_v = (*x.shape[:2], self.heads, self.value_width)
        q = checkpoint_name(self.q(x).reshape(heads_k), "gla_q")
        k = checkpoint_name(self.k(x).reshape(heads_k), "gla_k")
        v = checkpoint_name(self.v(x).reshape(heads_v), "gla_v")
        log_decay = self._log_decay(x)
        o, final_state = ops.linear_attention(q, k, v, log_decay, initial_state=state, segment_ids=segment_ids)
        y = self.out(gated(self.norm, o, self.output_gate(x), jax.nn.silu))
        return y, None if state is None else final_state

    def _log_decay(self, x):
        """log a: [B, T, H, K], [B, T, H], [H], or None for 0."""
        if self.gate == "none":
            return None
        if self.gate == "fixed":
            return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.heads, dtype=jnp.float32))))
        gate = jax.nn.log_sigmoid(self.gate_up(self.gate_down(x))) / self.temperature
        shape = (self.heads, self.key_width) if self.gate == "key" else (self.heads,)
        return checkpoint_name(gate.reshape(*x.shape[:2], *shape), "gla_log_decay")

    def from_softmax(self, softmax):
        found = super().from_softmax(softmax)
        if self.gate in ("key", "scalar"):
            # log sigmoid(b) / tau = log_decay
            bias = -math.log(math.expm1(-softmax.log_decay * self.temperature))
            found["gate_up.kernel"] = Taken(jnp.zeros_like(self.gate_up.kernel[...]), NOT_CHOSEN)
            found["gate_up.bias"] = constant(self.gate_up.bias, bias, f"{bias:.4g}: {softmax.forgets}")
        return found

    def init_state(self, batch_size, max_length, dtype):
        return jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32)

    @staticmethod
    def check(config, d_model):
        problems = check_heads({"num_heads": config.num_heads}, "expand_k * d_model", int(config.expand_k * d_model))
        problems += check_heads({"num_heads": config.num_heads}, "expand_v * d_model", int(config.expand_v * d_model))
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        d_k, d_v, gates = int(config.expand_k * d_model), int(config.expand_v * d_model), _gates(config, d_model)
        projections = d_model * (2 * d_k + 3 * d_v)  # q, k; v, output gate, out
        gate = config.gate_rank * (d_model + gates) + gates if gates else 0
        return projections + gate + d_v // config.num_heads

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        d_k, d_v, gates = int(config.expand_k * d_model), int(config.expand_v * d_model), _gates(config, d_model)
        projections = 2 * d_model * (2 * d_k + 3 * d_v) + (2 * config.gate_rank * (d_model + gates) if gates else 0)
        return projections + 4 * d_k * d_v / config.num_heads
