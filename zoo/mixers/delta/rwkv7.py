"""RWKV-7, "Goose": time mixing (Peng et al. 2025, arXiv:2503.14456).

    S_t = (diag(w_t) - (a_t * c_t) c_t^T) S_{t-1} + k_t v_t^T      o_t = S_t^T r_t
    w_t = exp(-exp(-1/2) sigmoid(b_w + tanh(x^w W_1) W_2))         a_t = sigmoid(b_a + x^a A_1 A_2)
    c_t = unit(xi * x^k W_k), a head at a time                     k_t = x^k W_k * (1 + alpha * (a_t - 1))
    y_t = W_o ((norm(o_t) + ((rho * k_t) . r_t) v_t) * sigmoid(x^g G_1) G_2)

A delta rule that corrects what the state holds for c_t at a rate a_t of its own for each entry, and writes by another
key, k_t. Every x^z lies between the token and the one before it: x^z_t = x_t + mu_z (x_{t-1} - x_t). Values go part of
the way to the first layer's, v_t = u_t + sigmoid(b_v + x^v V_1 V_2) * (f_t - u_t) with u_t = x^v W_v: f_t is the u_t of
the family's first layer, of the model's input (`on_input`; where another family comes before it, the first layer's own
u_t is not f_t). A mixer outside a model reads f_t = 0.

The norm is per head, mean and variance. The other half of the layer is `model.mlp=channel_mixing_ungated`
(configs/rwkv7.py). State: S, float32 [batch, heads, K, V], and the last token's x, [batch, d_model].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import HeadLayerNorm, in_pieces, linear, mixture, parameter, rounded_once, token_shift, unit_length
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting

MIXTURES = "rwkvag"  # x^z, in this order
RANKS = {"decay_rank": 2.5, "rate_rank": 2.5, "value_rank": 1.7, "gate_rank": 5.0}  # times sqrt(d_model), by default


def _of_root(factor: float) -> str:
    return f"{factor} sqrt(d_model), rounded to a multiple of 32, at least that"


@dataclasses.dataclass
class RWKV7Config(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    decay_rank: int = setting(0, "width of x W_1", zero=_of_root(RANKS["decay_rank"]))
    rate_rank: int = setting(0, "width of x A_1", zero=_of_root(RANKS["rate_rank"]))
    value_rank: int = setting(0, "width of x V_1", zero=_of_root(RANKS["value_rank"]))
    gate_rank: int = setting(0, "width of x G_1", zero=_of_root(RANKS["gate_rank"]))


def _ranks(config: RWKV7Config, d_model: int) -> tuple[int, ...]:
    """Of the decay, the rate, the values and the gate."""
    default = {name: max(32, round(factor * d_model**0.5 / 32) * 32) for name, factor in RANKS.items()}
    return tuple(getattr(config, name) or rank for name, rank in default.items())


class RWKV7(Mixer):
    config_class = RWKV7Config
    reads_input = True
    saved_names = ("rwkv7_r", "rwkv7_k", "rwkv7_v", "rwkv7_a", "rwkv7_b", "rwkv7_log_decay")

    def __init__(self, config: RWKV7Config, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.d_model = heads_or_default(config.num_heads, d, 64), d
        self.width = width = d // self.heads  # K = V
        of_decay, of_rate, of_value, of_gate = _ranks(config, d)
        # Initial values as in the authors' code: channels see the past on ramps, upper layers more of it.
        place = layer_index / max(sizes.num_layers - 1, 1)  # 0 in the first layer, 1 in the last
        rest = 1.0 - layer_index / sizes.num_layers
        powers = jnp.asarray([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None]
        vector = {"axes": ("norm",), "decay": False}
        self.mix = parameter(1.0 - (jnp.arange(d) / d) ** (powers * rest), ("gates", "norm"), decay=False)  # mu_z
        self.r = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), init_scale=0.1, dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)

        def narrow(rank):
            to_rank = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
            from_rank = {"init_scale": 0.1, "decay": False, "dtype": jnp.float32, "rngs": rngs}
            return linear(d, rank, ("embed", "rank"), **to_rank), linear(rank, d, ("rank", "heads"), **from_rank)

        self.decay_down, self.decay_up = narrow(of_decay)
        self.rate_down, self.rate_up = narrow(of_rate)
        self.value_down, self.value_up = narrow(of_value)
        self.gate_down = linear(d, of_gate, ("embed", "rank"), dtype=dtype, rngs=rngs)
        self.gate_up = linear(of_gate, d, ("rank", "heads"), dtype=dtype, rngs=rngs)
        ramp = jnp.arange(d) / max(d - 1, 1)
        of_head = 2.0 * (jnp.arange(d) % width) / max(width - 1, 1) - 1.0
        bend = of_head * jnp.abs(of_head)
        self.decay_bias = parameter(-5.5 + 6.0 * ramp ** (1.0 + place**0.3) + 2.5 * bend, **vector)
        self.rate_bias = parameter(-0.19 + 0.3 * bend + 0.4 * (ramp - 0.5), **vector)
        self.value_bias = parameter(0.73 - 0.4 * (ramp - 0.5), **vector)
        self.correction_scale = parameter(0.71 - 0.1 * (ramp - 0.5), **vector)  # xi
        self.key_rate = parameter(jnp.full((d,), 1.02), **vector)  # alpha
        self.bonus = parameter(jnp.full((self.heads, width), -0.04), ("gates", "norm"), decay=False)  # rho
        norm = {"epsilon": width * sizes.norm_epsilon, "dtype": jnp.float32, "bias": True}
        self.norm = HeadLayerNorm(self.heads, width, **norm)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def on_input(self, x, *, segment_ids=None, state=None):
        shifted, last = token_shift(x, segment_ids, state)
        return self.v(mixture(x, shifted, self.mix[...][MIXTURES.index("v")])), last

    def init_input_state(self, batch_size, dtype):
        return jnp.zeros((batch_size, self.d_model), dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None, of_input=None):
        initial = {"S": None, "last": None} if state is None else state
        shifted, last = token_shift(x, segment_ids, initial["last"])
        first = jnp.zeros_like(x) if of_input is None else of_input
        *arrays, gate = in_pieces(self._projections, x, shifted, first)  # a dozen arrays of x's size inside
        r, k, v, a, b, log_decay = map(checkpoint_name, arrays, self.saved_names)
        o, final_s = ops.dplr_delta_rule(
            r, k, v, a, b, log_decay, initial_state=initial["S"], segment_ids=segment_ids, scale=1.0
        )
        y = in_pieces(self._read_out, o, r, k, v, gate)
        return y, None if state is None else {"S": final_s, "last": last}

    def _projections(self, x, shifted, first):
        """r, k, v, -c, a * c and the log-decay, in heads, and the output gate."""
        xs = dict(zip(MIXTURES, (mixture(x, shifted, mix) for mix in self.mix[...]), strict=True))
        heads = lambda x: x.reshape(*x.shape[:2], self.heads, self.width)  # noqa: E731
        decay = self.decay_bias[...] + self.decay_up(jnp.tanh(self.decay_down(xs["w"])))
        rate = jax.nn.sigmoid(self.rate_bias[...] + self.rate_up(self.rate_down(xs["a"])))
        share = jax.nn.sigmoid(self.value_bias[...] + self.value_up(self.value_down(xs["v"])))
        key, value = self.k(xs["k"]), self.v(xs["v"])
        k = rounded_once(lambda key, rate: key * (1.0 + self.key_rate[...] * (rate - 1.0)), key, rate)
        v = rounded_once(lambda value, first, share: value + share * (first - value), value, first, share)

        def corrected(key):  # c
            return unit_length(heads(key * self.correction_scale[...]))

        a = rounded_once(lambda key: -corrected(key), key)
        b = rounded_once(lambda key, rate: corrected(key) * heads(rate), key, rate)
        log_decay = -jnp.exp(-0.5) * jax.nn.sigmoid(decay)
        gate = self.gate_up(rounded_once(jax.nn.sigmoid, self.gate_down(xs["g"])))
        return heads(self.r(xs["r"])), heads(k), heads(v), a, b, heads(log_decay), gate

    def _read_out(self, o, r, k, v, gate):
        def read(o, r, k, v, gate):
            bonus = jnp.sum(self.bonus[...] * k * r, axis=-1, keepdims=True) * v
            return (self.norm(o) + bonus.reshape(gate.shape)) * gate

        return self.out(rounded_once(read, o, r, k, v, gate))

    def init_state(self, batch_size, max_length, dtype):
        return {
            "S": jnp.zeros((batch_size, self.heads, self.width, self.width), jnp.float32),
            "last": jnp.zeros((batch_size, self.d_model), dtype),
        }

    @staticmethod
    def check(config, d_model):
        return check_heads({"num_heads": heads_or_default(config.num_heads, d_model, 64)}, "d_model", d_model)

    @staticmethod
    def num_parameters(config, d_model):
        vectors = len(MIXTURES) + 8  # biases of decay, rate, values; xi, alpha, rho; norm's two
        return 4 * d_model**2 + 2 * sum(_ranks(config, d_model)) * d_model + vectors * d_model

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads = heads_or_default(config.num_heads, d_model, 64)
        return 8 * d_model**2 + 4 * sum(_ranks(config, d_model)) * d_model + 8 * d_model**2 / heads
