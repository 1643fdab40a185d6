"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236).

    S_t = S_{t-1} + phi(k_t) v_t^T             z_t = z_{t-1} + phi(k_t)
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t))    y_t = W_o o_t

Bidirectional: S and z are the sums over all tokens of the document.
phi is elu + 1, relu, exp, the identity, or the second-order Taylor map of exp (Arora et al. 2024, arXiv:2402.18668):
phi(x) = [1, x / K^(1/4), x_i x_j c_ij / sqrt(2 K) for i <= j], c_ii = 1, c_ij = sqrt(2), so that with s = q.k / sqrt(K)
phi(q).phi(k) = 1 + s + s^2/2. The identity is not positive, so it has no normaliser z: a norm per head, of
S_t^T phi(q_t) / sqrt(phi(K)), stands in its place, as it does with `normalise=False`.

State: S, float32 [batch, heads, phi(K), V], and z, float32 [batch, heads * phi(K)] with the normaliser.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import linear, rms_norm, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default
from zoo.settings import setting


def taylor2(x: jax.Array) -> jax.Array:
    """[..., K] -> [..., 1 + K + K (K + 1) / 2]."""
    width = x.shape[-1]
    rows, columns = np.triu_indices(width)
    scale = jnp.asarray(np.where(rows == columns, 1.0, np.sqrt(2.0)) / np.sqrt(2.0 * width), x.dtype)
    return jnp.concatenate(
        [jnp.ones_like(x[..., :1]), x / width**0.25, x[..., rows] * x[..., columns] * scale], axis=-1
    )


MAX_FEATURES = 2**20  # of a head
FEATURE_MAPS = {
    "elu1": lambda x: jax.nn.elu(x) + 1.0,
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "identity": lambda x: x,
    "taylor2": taylor2,
}


@dataclasses.dataclass
class LinearAttentionConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    feature_map: str = setting("elu1", "phi", choices=tuple(FEATURE_MAPS))
    key_width: int = setting(0, "K, before the feature map", zero="d_model / num_heads", at_most=65_536)
    normalise: bool = setting(True, "divide by z . phi(q); off, and with identity: a norm per head")


def _widths(config: LinearAttentionConfig, d_model: int) -> tuple[int, int, int, int]:
    """(heads, K, phi(K), V)."""
    heads = heads_or_default(config.num_heads, d_model, 64)
    value_width = d_model // heads
    key_width = config.key_width or value_width
    features = 1 + key_width + key_width * (key_width + 1) // 2 if config.feature_map == "taylor2" else key_width
    return heads, key_width, features, value_width


def _has_normaliser(config: LinearAttentionConfig) -> bool:
    return config.normalise and config.feature_map != "identity"


def normalised_sum(q, k, v, segment_ids, state, epsilon=1e-6, causal=True):
    """S_t^T q_t / (z_t . q_t + epsilon) of features q and k [B, T, H, phi(K)], and the state after the last token."""
    if not causal:
        o = ops.full_linear_attention(q, k, v, segment_ids=segment_ids, scale=1.0)
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        weight = ops.full_linear_attention(q, k, jnp.ones_like(k[..., :1]), segment_ids=segment_ids, scale=1.0)
        return (o.astype(jnp.float32) / (weight + epsilon)).astype(v.dtype), None
    initial = {"S": None, "z": None} if state is None else state
    o, final_s = ops.linear_attention(q, k, v, initial_state=initial["S"], segment_ids=segment_ids, scale=1.0)
    flat = k.astype(jnp.float32).reshape(*k.shape[:2], -1)
    no_decay = jnp.zeros(flat.shape[-1], jnp.float32)
    z, final_z = ops.linear_scan(flat, no_decay, initial_state=initial["z"], segment_ids=segment_ids)
    weight = jnp.einsum("bthk,bthk->bth", q.astype(jnp.float32), z.reshape(q.shape))
    o = (o.astype(jnp.float32) / (weight[..., None] + epsilon)).astype(v.dtype)
    return o, None if state is None else {"S": final_s, "z": final_z}


class LinearAttention(Mixer):
    config_class = LinearAttentionConfig
    runs_twice = False
    saved_names = ("linear_attention_q", "linear_attention_k", "linear_attention_v")

    def __init__(self, config: LinearAttentionConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.key_width, self.features, self.value_width = _widths(config, d)
        self.feature_map = config.feature_map
        self.has_normaliser = _has_normaliser(config)
        self.q = linear(d, self.heads * self.key_width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, self.heads * self.key_width, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        if not self.has_normaliser:
            self.norm = rms_norm(self.value_width, epsilon=sizes.norm_epsilon, dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        batch, time = x.shape[:2]
        phi = functools.partial(rounded_once, FEATURE_MAPS[self.feature_map])
        q = phi(self.q(x).reshape(batch, time, self.heads, self.key_width))
        k = phi(self.k(x).reshape(batch, time, self.heads, self.key_width))
        v = self.v(x).reshape(batch, time, self.heads, self.value_width)
        q = checkpoint_name(q, "linear_attention_q")
        k = checkpoint_name(k, "linear_attention_k")
        v = checkpoint_name(v, "linear_attention_v")
        if self.has_normaliser:
            o, state = normalised_sum(q, k, v, segment_ids, state, causal=self.causal)
        elif not self.causal:
            o = self.norm(ops.full_linear_attention(q, k, v, segment_ids=segment_ids, scale=self.features**-0.5))
        else:
            initial, scale = None if state is None else state["S"], self.features**-0.5
            o, final_s = ops.linear_attention(q, k, v, initial_state=initial, segment_ids=segment_ids, scale=scale)
            o, state = self.norm(o), None if state is None else {"S": final_s}
        return self.out(o.reshape(batch, time, -1)), state

    def init_state(self, batch_size, max_length, dtype):
        state = {"S": jnp.zeros((batch_size, self.heads, self.features, self.value_width), jnp.float32)}
        if self.has_normaliser:
            state["z"] = jnp.zeros((batch_size, self.heads * self.features), jnp.float32)
        return state

    @staticmethod
    def check(config, d_model):
        problems = check_heads({"num_heads": heads_or_default(config.num_heads, d_model, 64)}, "d_model", d_model)
        if not problems and (features := _widths(config, d_model)[2]) > MAX_FEATURES:
            problems.append(f"key_width: {config.feature_map} makes {features} features of it; at most {MAX_FEATURES}")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        heads, key_width, _, value_width = _widths(config, d_model)
        norm = 0 if _has_normaliser(config) else value_width
        return 2 * d_model * heads * key_width + 2 * d_model * d_model + norm

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, key_width, features, value_width = _widths(config, d_model)
        projections = 2 * d_model * (2 * heads * key_width + 2 * d_model)
        normaliser = 2 * heads * features if _has_normaliser(config) else 0  # z . phi(q)
        return projections + 4 * heads * features * value_width + normaliser
