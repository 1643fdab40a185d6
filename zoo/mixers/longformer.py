"""Longformer's attention: windows, with gaps in some heads (Beltagy et al. 2020, arXiv:2004.05150).

    o_t = sum_s p_ts v_s,   p_ts = softmax over s = t, t - d, ..., t - (window - 1) d of (q_t . k_s / sqrt(K))
    y_t = W_o o_t

d is the dilation of the head: `dilation` has one for each equal part of the heads. Windows and dilations that grow with
depth are places of a pattern (configs/longformer.py). Causal, as the paper's language models, which have no global
tokens. q and k are turned by rotary positions where the model has them.
Cost is linear in time: with a dilation d the tokens are d sequences beside one another, in windows without gaps.
State: keys and values of the last (window - 1) max(d) tokens, whatever the context.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import lists, ops
from zoo.layers import counted, init_recent, linear, rotary, segment_numbers, with_recent
from zoo.mixers.base import Mixer, MixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.settings import setting
from zoo.taken import Segments


@dataclasses.dataclass
class LongformerConfig(MixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    window: int = setting(256, "tokens a query sees, itself included", unit="token", at_least=2, at_most=2**20)
    dilation: str = setting("1", "tokens between those seen: 1+2, for each equal part of the heads", parse=lists.counts)


class Longformer(Mixer):
    config_class = LongformerConfig
    saved_names = ("longformer_q", "longformer_k", "longformer_v")

    def __init__(self, config: LongformerConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.window, self.rope = heads_or_default(config.num_heads, d, 64), config.window, sizes.rope
        self.dilations = tuple(lists.counts(config.dilation))
        self.slots = (self.window - 1) * max(self.dilations)
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        positions = positions_or_default(positions, x)
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        if self.rope:
            q, k = rotary(q, positions), rotary(k, positions)
        q, k, v = (checkpoint_name(a, f"longformer_{name}") for a, name in ((q, "q"), (k, "k"), (v, "v")))
        # Tokens that are not neighbours become so where there are gaps: then ids may not come back.
        if segment_ids is None:
            ids = None if state is None else jnp.zeros(x.shape[:2], jnp.int32)
        elif isinstance(segment_ids, Segments):
            ids = segment_ids.numbers
        else:
            ids = segment_ids if state is None and max(self.dilations) == 1 else segment_numbers(segment_ids)
        if state is not None:
            count = counted(x, segment_ids, state)
            of_call = {"seen": count[:, 0], "count": count, "segment_ids": segment_ids}
            k, v, ids, state = with_recent(k, v, ids, state, **of_call)
        part = self.heads // len(self.dilations)
        parts = []
        for i, dilation in enumerate(self.dilations):
            here = slice(i * part, (i + 1) * part)
            parts.append(self._dilated(q[:, :, here], k[:, :, here], v[:, :, here], ids, dilation, state is not None))
        return self.out(jnp.concatenate(parts, 2).reshape(x.shape)), state

    def _dilated(self, q, k, v, ids, dilation, has_kept):
        """Outputs of heads [B, T, part, K]; keys begin with those kept, of which these heads see so many."""
        given = {"window": self.window}
        if has_kept:
            unseen = self.slots - (self.window - 1) * dilation
            k, v, ids = k[:, unseen:], v[:, unseen:], ids[:, unseen:]
            given["q_start"] = self.window - 1
        batch, time = q.shape[:2]
        q, k, v = (_apart(x, dilation) for x in (q, k, v))
        o = ops.attention(q, k, v, segment_ids=None if ids is None else _apart(ids, dilation), **given)
        return o.reshape(batch, dilation, -1, *o.shape[2:]).swapaxes(1, 2).reshape(batch, -1, *o.shape[2:])[:, :time]

    def init_state(self, batch_size, max_length, dtype):
        return init_recent(batch_size, self.slots, self.heads, self.q.out_features // self.heads, dtype)

    def spread_over_tensor(self):
        return {"num_heads": self.heads // len(self.dilations)}

    @staticmethod
    def check(config, d_model):
        heads = heads_or_default(config.num_heads, d_model, 64)
        problems = check_heads({"num_heads": heads}, "d_model", d_model)
        if not problems and (width := d_model // heads) % 2:
            problems.append(f"num_heads: a key width of {width} is odd; rotary needs an even one")
        if heads % (parts := len(lists.counts(config.dilation))):
            problems.append(f"dilation: {parts} dilations do not divide the {heads} heads; give as many as divide them")
        return problems

    @staticmethod
    def num_parameters(config, d_model):
        return 4 * d_model**2

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        dilations = lists.counts(config.dilation)
        seen = sum(min(config.window, context_length / dilation) for dilation in dilations) / len(dilations)
        return 8 * d_model**2 + 4 * d_model * seen


def _apart(x: jax.Array, dilation: int) -> jax.Array:
    """[B, T, ...] -> [B * dilation, T / dilation, ...]: every token of the same place modulo `dilation`, in a row."""
    if dilation == 1:
        return x
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % dilation), *((0, 0),) * (x.ndim - 2)), mode="edge")
    x = x.reshape(x.shape[0], -1, dilation, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])
