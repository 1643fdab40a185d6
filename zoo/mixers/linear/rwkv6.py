"""RWKV-6, "Finch": time mixing (Peng et al. 2024, arXiv:2404.05892).

    S_t = diag(w_t) S_{t-1} + k_t v_t^T        w_t = exp(-exp(d_t)), d_t = b_d + tanh(x^w_t W_1) W_2
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t  y_t = W_o (norm(o_t) * silu(x^g_t W_g))

r, k, v, the decay and the output gate each see their own mixture of the token and the one before it, and how much of
each is the data's: with D = x_{t-1} - x_t, for z in r, w, k, v, g

    x^z_t = x_t + D (mu_z + tanh((x_t + D mu) A_z) B_z)

The norm is per head, mean and variance. The other half of the layer is `model.mlp=channel_mixing` (configs/rwkv6.py).
State: S, float32 [batch, heads, K, V], and the last token's x, [batch, d_model].
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import HeadLayerNorm, gated, in_pieces, linear, mixture, parameter, token_shift
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.mixers.from_softmax import NOT_CHOSEN, Taken, constant, open_gate, take_over
from zoo.settings import setting

MIXTURES = 5  # r, w, k, v, g


@dataclasses.dataclass
class RWKV6Config(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    expand_k: float = setting(1.0, "K * num_heads / d_model", above=0, at_most=64)
    expand_v: float = setting(1.0, "V * num_heads / d_model", above=0, at_most=64)
    mix_rank: int = setting(32, "width of x A_z")
    decay_rank: int = setting(64, "width of x W_1")


def _widths(config: RWKV6Config, d_model: int) -> tuple[int, int, int]:
    """(heads, K * heads, V * heads)."""
    heads = heads_or_default(config.num_heads, d_model, 64)
    return heads, int(config.expand_k * d_model), int(config.expand_v * d_model)


class RWKV6(Mixer):
    config_class = RWKV6Config
    saved_names = ("rwkv6_r", "rwkv6_k", "rwkv6_v", "rwkv6_log_decay")

    def __init__(self, config: RWKV6Config, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, d_k, d_v = _widths(config, d)
        self.key_width, self.value_width = d_k // self.heads, d_v // self.heads
        self.dtype, self.d_model, self.mix_rank = dtype, d, config.mix_rank
        # Initial values as in the authors' code: channels see the past on a ramp, upper layers more of it.
        place = layer_index / max(sizes.num_layers - 1, 1)  # 0 in the first layer, 1 in the last
        rest = 1.0 - layer_index / sizes.num_layers
        channel = jnp.arange(d) / d
        ramp = 1.0 - channel**rest
        steep = 1.0 - channel ** (0.5 * rest)
        mix = jnp.stack([steep, ramp, ramp, ramp - 0.3 * place, steep])
        self.shared_mix = parameter(ramp, ("norm",), decay=False)  # mu
        self.mix = parameter(mix, ("gates", "norm"), decay=False)  # mu_z
        of_gate = {"decay": False, "dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.mix_down = linear(d, MIXTURES * config.mix_rank, ("embed", "rank"), **of_gate)
        self.mix_up = linear(
            config.mix_rank, MIXTURES * d, ("rank", "width"), init_scale=0.1, decay=False, dtype=dtype, rngs=rngs
        )
        self.r = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d_k, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.output_gate = linear(d, d_v, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.decay_down = linear(d, config.decay_rank, ("embed", "rank"), **of_gate)
        self.decay_up = linear(
            config.decay_rank, d_k, ("rank", "heads"), init_scale=0.1, decay=False, dtype=jnp.float32, rngs=rngs
        )
        key = jnp.arange(d_k) / max(d_k - 1, 1)
        zigzag = (jnp.arange(d_k) + 1) % 3 - 1
        bonus = place * (1.0 - key) + 0.1 * zigzag
        self.decay_bias = parameter(-6.0 + 5.0 * key ** (0.7 + 1.3 * place), ("norm",), decay=False)
        self.bonus = parameter(bonus.reshape(self.heads, -1), ("gates", "norm"), decay=False)  # u
        norm = {"epsilon": sizes.norm_epsilon, "dtype": jnp.float32, "bias": True}
        self.norm = HeadLayerNorm(self.heads, self.value_width, **norm)
        self.out = linear(d_v, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        initial = {"S": None, "last": None} if state is None else state
        shifted, last = token_shift(x, segment_ids, initial["last"])
        r, d, k, v, gate = in_pieces(self._projections, x, shifted)  # a dozen arrays of x's size inside
        heads_k = (*x.shape[:2], self.heads, self.key_width)
        r = checkpoint_name(r.reshape(heads_k), "rwkv6_r")
        k = checkpoint_name(k.reshape(heads_k), "rwkv6_k")
        v = checkpoint_name(v.reshape(*x.shape[:2], self.heads, self.value_width), "rwkv6_v")
        log_decay = checkpoint_name(-jnp.exp(jnp.minimum(d, 20.0)).reshape(heads_k), "rwkv6_log_decay")
        o, final_s = ops.linear_attention(
            r, k, v, log_decay, bonus=self.bonus[...], initial_state=initial["S"], segment_ids=segment_ids, scale=1.0
        )
        y = self.out(gated(self.norm, o, gate, jax.nn.silu))
        return y, None if state is None else {"S": final_s, "last": last}

    def _projections(self, x, shifted):
        """r, d, k, v and the output gate, each of its own mixture of x_t and x_{t-1}."""
        inner = jnp.tanh(self.mix_down(mixture(x, shifted, self.shared_mix[...])))
        inner = inner.astype(x.dtype).reshape(*x.shape[:2], MIXTURES, self.mix_rank)
        up = self.mix_up.kernel[...].astype(x.dtype).reshape(self.mix_rank, MIXTURES, self.d_model)
        chosen = jnp.einsum("btzr,rzd->zbtd", inner, up)
        r, w, k, v, g = mixture(x, shifted, self.mix[...][:, None, None], chosen)
        d = self.decay_bias[...] + self.decay_up(jnp.tanh(self.decay_down(w)))
        return self.r(r), d, self.k(k), self.v(v), self.output_gate(g)

    def from_softmax(self, softmax):
        """r from q; mixtures start with the token itself, and its own bonus u is 1, as in a sum without one."""
        bias = math.log(-softmax.log_decay)
        return (
            take_over(self, softmax, heads=self.heads, q="r")
            | open_gate(self, "output_gate")
            | {
                "mix": constant(self.mix, 0.0, "0: the token itself"),
                "bonus": constant(self.bonus, 1.0, "1: a token reads what it writes"),
                "decay_up.kernel": Taken(jnp.zeros_like(self.decay_up.kernel[...]), NOT_CHOSEN),
                "decay_bias": constant(self.decay_bias, bias, f"{bias:.4g}: {softmax.forgets}"),
            }
        )

    def init_state(self, batch_size, max_length, dtype):
        return {
            "S": jnp.zeros((batch_size, self.heads, self.key_width, self.value_width), jnp.float32),
            "last": jnp.zeros((batch_size, self.d_model), dtype),
        }

    @staticmethod
    def check(config, d_model):
        heads, d_k, d_v = _widths(config, d_model)
        problems = check_heads({"num_heads": heads}, "expand_k * d_model", d_k)
        problems += check_heads({"num_heads": heads}, "expand_v * d_model", d_v)
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        _, d_k, d_v = _widths(config, d_model)
        low_rank = 2 * MIXTURES * config.mix_rank * d_model + config.decay_rank * (d_model + d_k)
        vectors = (1 + MIXTURES) * d_model + 2 * d_k + 2 * d_v  # mu, mu_z; decay bias, bonus; norm
        return d_model * (2 * d_k + 3 * d_v) + low_rank + vectors

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, d_k, d_v = _widths(config, d_model)
        low_rank = 2 * MIXTURES * config.mix_rank * d_model + config.decay_rank * (d_model + d_k)
        return 2 * d_model * (2 * d_k + 3 * d_v) + 2 * low_rank + 4 * d_k * d_v / heads
