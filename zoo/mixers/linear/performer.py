"""Performer: softmax attention by random features, as linear attention (Choromanski et al. 2020, arXiv:2009.14794).

    S_t = S_{t-1} + phi(k_t) v_t^T             z_t = z_{t-1} + phi(k_t)
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t))    y_t = W_o o_t

phi are FAVOR+'s positive orthogonal features (`zoo.layers.random_features`), whose products are exp(q . k / sqrt(K)) on
average, with an error of features^(-1/2); or relu(W x), "generalised attention", which approximates no softmax. The
random W differs from layer to layer and is shared by heads; it is no parameter, but drawn from `feature_seed`. With
`redraw_every` training takes another one every so many steps, known from the step alone; evaluation and generation use
the first. Bidirectional: S and z are the sums over all of the document. q and k are turned by rotary positions where
the model has them, as in `attention`. Published code takes the maximum of the keys' exponents over time, which sees the
future; none is taken here.
State: S, float32 [batch, heads, features, V], and z, float32 [batch, heads * features].
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo.layers import exp_features, in_pieces, linear, random_features, relu_features, rotary, rounded_once
from zoo.mixers.base import Mixer, MixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.mixers.linear.linear_attention import MAX_FEATURES, normalised_sum
from zoo.settings import setting

FEATURES = {"exp": exp_features, "relu": relu_features}


@dataclasses.dataclass
class PerformerConfig(MixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    features: int = setting(0, "of a head", zero="K ln K, to a multiple of 8", at_most=MAX_FEATURES)
    kernel: str = setting("exp", "phi", choices={"exp": "softmax's, FAVOR+", "relu": "generalised attention"})
    feature_seed: int = setting(0, "of W", at_least=0, at_most=2**31 - 1)
    redraw_every: int = setting(0, "of training, for another W", unit="step", zero="never")


def _widths(config: PerformerConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, K, features)."""
    heads = heads_or_default(config.num_heads, d_model, 64)
    width = d_model // heads
    return heads, width, config.features or -(-math.ceil(width * math.log(width)) // 8) * 8 or 8


class Performer(Mixer):
    config_class = PerformerConfig
    runs_twice = False
    saved_names = ("performer_q", "performer_k", "performer_v")

    def __init__(self, config: PerformerConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.width, self.features = _widths(config, d)
        self.kernel, self.rope = config.kernel, sizes.rope
        self.feature_seed, self.redraw_every = config.feature_seed, config.redraw_every
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    @staticmethod
    def over_depth(mixers, layer_index, num_layers, step=None):
        """W of each layer, [N, P, features, K], zeros where places of the pattern have fewer features."""
        found = [mixer.drawn(layer_index[:, place], num_layers, step) for place, mixer in enumerate(mixers)]
        most = [max(w.shape[axis] for w in found) for axis in (1, 2)]
        to_most = lambda w: [(0, 0), *((0, size - has) for size, has in zip(most, w.shape[1:], strict=True))]  # noqa: E731
        return jnp.stack([jnp.pad(w, to_most(w)) for w in found], axis=1)

    def drawn(self, layers, num_layers=1, step=None):
        """W of `layers`, at a step of training or (None) the first: a constant of the program."""
        of_draw = functools.partial(random_features.draw, features=self.features, width=self.width)
        if step is not None and self.redraw_every:
            return of_draw(self.feature_seed, step // self.redraw_every, layers)
        with jax.ensure_compile_time_eval():
            of_all = of_draw(self.feature_seed, 0, jnp.arange(num_layers))
        return of_all[layers]

    def __call__(self, x, *, segment_ids=None, positions=None, state=None, depth=None):
        heads = (*x.shape[:2], self.heads, self.width)
        w = self.drawn(jnp.zeros(1, jnp.int32))[0] if depth is None else depth[: self.features, : self.width]
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        positions = positions_or_default(positions, x)

        def phi(x, at, of_queries):
            x = rotary(x, at.astype(jnp.int32)) if self.rope else x
            return FEATURES[self.kernel](x, w, of_queries=of_queries)

        def both(q, k, at):
            of_queries = rounded_once(lambda q: phi(q, at, True), q)
            return of_queries, rounded_once(lambda k: phi(k, at, False), k)

        # Features are several times as wide as x, and a few arrays of them lie between x and phi.
        q, k = in_pieces(both, q, k, positions.astype(jnp.float32))
        q, k = checkpoint_name(q, "performer_q"), checkpoint_name(k, "performer_k")
        v = checkpoint_name(v, "performer_v")
        o, state = normalised_sum(q, k, v, segment_ids, state, epsilon=1e-12, causal=self.causal)
        return self.out(o.reshape(x.shape)), state

    def init_state(self, batch_size, max_length, dtype):
        return {
            "S": jnp.zeros((batch_size, self.heads, self.features, self.width), jnp.float32),
            "z": jnp.zeros((batch_size, self.heads * self.features), jnp.float32),
        }

    @staticmethod
    def check(config, d_model):
        problems = check_heads({"num_heads": heads_or_default(config.num_heads, d_model, 64)}, "d_model", d_model)
        if not problems and (width := _widths(config, d_model)[1]) % 2:
            problems.append(f"num_heads: a key width of {width} is odd; rotary needs an even one")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        return 4 * d_model**2

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, width, features = _widths(config, d_model)
        of_features = 4 * heads * width * features  # W q and W k
        return 8 * d_model**2 + of_features + 4 * heads * features * width + 2 * heads * features
