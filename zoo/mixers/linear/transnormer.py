"""TransNormer: attention in blocks below, norm attention above (Qin et al. 2022, arXiv:2210.10340).

    lower half of the layers   o_t = sum_s p_ts v_s,   p_ts = softmax over s <= t of t's block of (q_t . k_s / sqrt(K))
    upper half                 o_t = norm(S_t^T phi(q_t) / sqrt(K)),   S_t = S_{t-1} + phi(k_t) v_t^T,   phi = elu + 1
    both                       y_t = W_o o_t

Below, attention is local and sharp; above, it sees all, without the denominator of linear attention, whose gradients
have no bound: an RMS norm without a scale, over all heads together, is in its place. The published T2; T1 has relu and
elu for softmax and phi. Bidirectional: over all s of the block, and S the sum over all of the document. A document's
blocks begin with it. q and k of the lower half are turned by rotary positions where the model has them. What a layer is
comes from its place in the depth; `kind` may say it instead. A mixer outside a model is a first layer.
State: a ring of the last `block` tokens' keys and values, and S, float32 [batch, heads, K, V]; a layer uses one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import linear, ring, rms_norm, rotary, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.settings import setting
from zoo.taken import Segments

KINDS = {
    "depth": "blocks in the lower half of the layers, norm in the upper",
    "block": "attention in blocks",
    "norm": "norm attention",
}


@dataclasses.dataclass
class TransNormerConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    kind: str = setting("depth", "what a layer is", choices=KINDS)
    block: int = setting(64, "of the lower half", unit="token", at_least=2, at_most=2**20)


class TransNormer(Mixer):
    config_class = TransNormerConfig
    runs_twice = False
    saved_names = ("transnormer_q", "transnormer_k", "transnormer_v")

    def __init__(self, config: TransNormerConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.kind, self.block, self.rope = _heads(config, d), config.kind, config.block, sizes.rope
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.norm = rms_norm(d, epsilon=sizes.norm_epsilon, dtype=dtype, with_scale=False, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    @staticmethod
    def over_depth(mixers, layer_index, num_layers, step=None):
        return 2 * layer_index >= num_layers

    def __call__(self, x, *, segment_ids=None, positions=None, state=None, depth=None):
        heads = (*x.shape[:2], self.heads, -1)
        q = checkpoint_name(self.q(x).reshape(heads), "transnormer_q")
        k = checkpoint_name(self.k(x).reshape(heads), "transnormer_k")
        v = checkpoint_name(self.v(x).reshape(heads), "transnormer_v")

        def in_blocks():
            return self._in_blocks(q, k, v, positions_or_default(positions, x), segment_ids, state)

        def normed():
            phi = lambda x: rounded_once(lambda x: jax.nn.elu(x) + 1.0, x)  # noqa: E731
            if not self.causal:
                o = ops.full_linear_attention(phi(q), phi(k), v, segment_ids=segment_ids)
                return self.norm(o.reshape(x.shape)), None
            initial = None if state is None else state["S"]
            o, final = ops.linear_attention(phi(q), phi(k), v, initial_state=initial, segment_ids=segment_ids)
            after = state
            if state is not None:
                after = state | {"S": final} | ring.counts_after(state, Segments.all_of(segment_ids, x.shape[:2]))
            return self.norm(o.reshape(x.shape)), after

        if self.kind == "norm":
            o, state = normed()
        elif self.kind == "block" or depth is None:
            o, state = in_blocks()
        else:
            o, state = jax.lax.cond(depth, normed, in_blocks)
        return self.out(o), state

    def _in_blocks(self, q, k, v, positions, segment_ids, state):
        if self.rope:
            q, k = rotary(q, positions), rotary(k, positions)
        count = ring.counted(q, segment_ids, state)
        given = {"causal": self.causal, "window": self.block}
        if state is None:
            ids = _of_blocks(count, self.block, segment_ids)
            return ops.attention(q, k, v, segment_ids=ids, **given).reshape(*q.shape[:2], -1), None
        segments, new = Segments.all_of(segment_ids, q.shape[:2]), {"k": k, "v": v}
        if q.shape[1] == 1:
            cache, numbers = ring.with_one(new, state)
            visible = numbers >= state["index"][:, None] - count % self.block
            k, v = (cache[name].astype(q.dtype) for name in ("k", "v"))
            o = ops.attention_step(q, k, v, visible[:, None], stop=ring.in_use(state))
        else:
            tokens, _, cache = ring.with_many(new, state, segments)
            ids = _of_blocks(count, self.block, segments.numbers)
            # Of the kept, those of the first token's block have its id.
            seen = jnp.arange(self.block, 0, -1, dtype=jnp.int32) <= count[:, :1] % self.block
            ids = jnp.concatenate([jnp.where(seen, ids[:, :1], ids[:, :1] - 1), ids], axis=1)
            k, v = (tokens[name].swapaxes(1, 2).astype(q.dtype) for name in ("k", "v"))
            o = ops.attention(q, k, v, segment_ids=ids, q_start=self.block, **given)
        return o.reshape(*q.shape[:2], -1), state | cache | ring.counts_after(state, segments)

    def init_state(self, batch_size, max_length, dtype):
        width = self.q.out_features // self.heads
        S = jnp.zeros((batch_size, self.heads, width, width), jnp.float32)
        return ring.init_caches(batch_size, self.block, self.heads, width, dtype) | {"S": S}

    @staticmethod
    def check(config, d_model):
        problems = check_heads({"num_heads": _heads(config, d_model)}, "d_model", d_model)
        if not problems and (width := d_model // _heads(config, d_model)) % 2:
            problems.append(f"num_heads: a key width of {width} is odd; rotary needs an even one")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        return 4 * d_model**2

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        """By depth: those of the lower half; the upper half's are the same where K is the block."""
        seen = d_model // _heads(config, d_model) if config.kind == "norm" else min(context_length, config.block)
        return 8 * d_model**2 + 4 * d_model * seen


def _of_blocks(count: jax.Array, block: int, numbers: jax.Array | None) -> jax.Array:
    """Ids [B, T] by which neighbours are of one block of one segment; `count` tokens of it come before each."""
    return count // block % 2 + (0 if numbers is None else 2 * numbers)


def _heads(config: TransNormerConfig, d_model: int) -> int:
    return heads_or_default(config.num_heads, d_model, 64)
