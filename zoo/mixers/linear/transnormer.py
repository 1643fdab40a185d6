"""TransNormer: attention in blocks below, norm attention above (Qin et al. 2022, arXiv:2210.10340).

    lower half of the layers   o_t = sum_s p_ts v_s,   p_ts = softmax over s <= t of t's block of (q_t . k_s / sqrt(K))
    upper half                 o_t = norm(S_t^T phi(q_t) / sqrt(K)),   S_t = S_{t-1} + phi(k_t) v_t^T,   phi = elu + 1
    both                       y_t = W_o o_t

Below, attention is local and sharp; above, it sees all, without the denominator of linear attention, whose gradients
have no bound: an RMS norm without a scale, over all heads together, is in its place. The published T2; T1 has relu and
elu for softmax and phi. Bidirectional: over all s of the block, and S the sum over all of the document. A document's
blocks begin with it. q and k of the lower half are turned by rotary positions where the model has them. What a layer is
comes from its place in the depth; `kind` may say it instead. A mixer outside a model is a first layer.
State: keys and values of the last block - 1 tokens, and S, float32 [batch, heads, K, V]; a layer uses one of the two.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import counted, init_recent, linear, rms_norm, rotary, rounded_once, with_recent
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.settings import setting
from zoo.taken import Segments, last

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
        count = counted(x, segment_ids, state)

        def in_blocks():
            return self._in_blocks(q, k, v, count, positions_or_default(positions, x), segment_ids, state)

        def normed():
            phi = lambda x: rounded_once(lambda x: jax.nn.elu(x) + 1.0, x)  # noqa: E731
            if not self.causal:
                o = ops.full_linear_attention(phi(q), phi(k), v, segment_ids=segment_ids)
                return self.norm(o.reshape(x.shape)), None
            initial = None if state is None else state["S"]
            o, final = ops.linear_attention(phi(q), phi(k), v, initial_state=initial, segment_ids=segment_ids)
            after = state
            if state is not None:
                after = state | {"S": final, "count": last(count + 1, segment_ids, state["count"])}
            return self.norm(o.reshape(x.shape)), after

        if self.kind == "norm":
            o, state = normed()
        elif self.kind == "block" or depth is None:
            o, state = in_blocks()
        else:
            o, state = jax.lax.cond(depth, normed, in_blocks)
        return self.out(o), state

    def _in_blocks(self, q, k, v, count, positions, segment_ids, state):
        if self.rope:
            q, k = rotary(q, positions), rotary(k, positions)
        # Neighbours are of one id if they are of one block of one segment.
        numbers = segment_ids.numbers if isinstance(segment_ids, Segments) else segment_ids
        ids = count // self.block % 2 + (0 if numbers is None else 2 * numbers)
        given = {"causal": self.causal, "window": self.block, "segment_ids": ids}
        if state is not None:
            of_call = {"seen": count[:, 0] % self.block, "count": count, "segment_ids": segment_ids}
            k, v, ids, after = with_recent(k, v, ids, state, **of_call)
            state, given = state | after, given | {"segment_ids": ids, "q_start": self.block - 1}
        return ops.attention(q, k, v, **given).reshape(*q.shape[:2], -1), state

    def init_state(self, batch_size, max_length, dtype):
        width = self.q.out_features // self.heads
        S = jnp.zeros((batch_size, self.heads, width, width), jnp.float32)
        return init_recent(batch_size, self.block - 1, self.heads, width, dtype) | {"S": S}

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


def _heads(config: TransNormerConfig, d_model: int) -> int:
    return heads_or_default(config.num_heads, d_model, 64)
