"""Linformer: softmax attention to a fixed number of mixtures of the keys (Wang et al. 2020, arXiv:2006.04768).

    o_t = sum_j p_tj sum_s F_sj v_s,   p_t = softmax over j <= k of (q_t . sum_s E_sj k_s / sqrt(K)),   y_t = W_o o_t

s runs over all tokens of the document, so that it is bidirectional by its nature: E and F, [length, k], say what each
position gives to each mixture, and a causal form would mix the future. A document shorter than `length` takes their
first rows, where the published code mixes padding in. Contexts above `length` are refused by the config, and a longer
document is NaN. Both sums over s are linear attention, (q . k_s) E_s and (p_t . F_s) v_s, so that documents packed in a
row have mixtures of their own. q and k are turned by rotary positions where the model has them, as in `attention`.

Shared by the heads (`heads`), and by keys and values too (`key_value`: F = E). Sharing over the depth is not here:
layers are slices of one stack, and a parameter of all of them is none of its entries.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import linear, parameter, rotary
from zoo.mixers.base import (
    BIDIRECTIONAL,
    Mixer,
    MixerConfig,
    Sizes,
    check_heads,
    heads_or_default,
    positions_or_default,
)
from zoo.settings import setting

MAX_TABLE = 2**30  # entries of E
SHARING = {
    "none": "E and F of each head", "heads": "one E, one F of all heads", "key_value": "one E = F of all heads",
}  # fmt: skip


@dataclasses.dataclass
class LinformerConfig(MixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    length: int = setting(2048, "the longest document", unit="token", at_most=2**20)
    mixtures: int = setting(64, "k, to which the length is projected", at_most=65_536)
    sharing: str = setting("heads", "of E and F", choices=SHARING)


class Linformer(Mixer):
    config_class = LinformerConfig
    directions = (BIDIRECTIONAL,)
    runs_twice = False
    saved_names = ("linformer_q", "linformer_k", "linformer_v")

    def __init__(self, config: LinformerConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.rope = heads_or_default(config.num_heads, d, 64), sizes.rope
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)

        def mixtures():
            shape = (config.length, self.heads if config.sharing == "none" else 1, config.mixtures)
            bound = config.mixtures**-0.5
            drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            return parameter(drawn, ("positions", "gates", "state"), decay=False)

        self.of_keys = mixtures()
        self.of_values = None if config.sharing == "key_value" else mixtures()
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        heads = (*x.shape[:2], self.heads, -1)
        positions = positions_or_default(positions, x)
        q, k, v = self.q(x).reshape(heads), self.k(x).reshape(heads), self.v(x).reshape(heads)
        if self.rope:
            q, k = rotary(q, positions), rotary(k, positions)
        q = checkpoint_name(q, "linformer_q")
        k = checkpoint_name(k, "linformer_k")
        v = checkpoint_name(v, "linformer_v")

        def of_tokens(table):
            """What each token's position gives, [B, T, H, k]; of positions outside of the table NaN."""
            rows = table[...].at[positions].get(mode="fill", fill_value=jnp.nan)
            return jnp.broadcast_to(rows, (*heads[:3], rows.shape[-1]))

        of_keys = of_tokens(self.of_keys)
        of_values = of_keys if self.of_values is None else of_tokens(self.of_values)
        # Logits are float32 as those of attention: their sums are.
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        logits = ops.full_linear_attention(q, k, of_keys, segment_ids=segment_ids, scale=q.shape[-1] ** -0.5)
        p = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        o = ops.full_linear_attention(p, of_values.astype(v.dtype), v, segment_ids=segment_ids, scale=1.0)
        return self.out(o.reshape(x.shape)), None

    @staticmethod
    def longest(config):
        return config.length

    @staticmethod
    def check(config, d_model):
        heads = heads_or_default(config.num_heads, d_model, 64)
        problems = check_heads({"num_heads": heads}, "d_model", d_model)
        if not problems and (width := d_model // heads) % 2:
            problems.append(f"num_heads: a key width of {width} is odd; rotary needs an even one")
        tables = heads if config.sharing == "none" else 1
        if (size := config.length * config.mixtures * tables) > MAX_TABLE:
            problems.append(f"mixtures: E of {config.length} tokens has {size} entries; expected at most {MAX_TABLE}")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        heads = heads_or_default(config.num_heads, d_model, 64)
        tables = {"none": 2 * heads, "heads": 2, "key_value": 1}
        return 4 * d_model**2 + tables[config.sharing] * config.length * config.mixtures

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        """Projections; and of keys and values into mixtures, and those read."""
        return 8 * d_model**2 + 8 * d_model * config.mixtures
