"""Longformer's attention: windows, gaps in some heads, global tokens (Beltagy et al. 2020, arXiv:2004.05150).

    o_t = sum_s p_ts v_s,   p_ts = softmax over s = t, t - d, ..., t - (window - 1) d of (q_t . k_s / sqrt(K))
    y_t = W_o o_t

d is the dilation of the head: `dilation` has one for each equal part of the heads. Windows and dilations that grow with
depth are places of a pattern (configs/longformer.py). q and k are turned by rotary positions where the model has them.
Bidirectional: over s = t + d, ..., t + (window - 1) d too; and the first `global_tokens` of a document are seen by all
of its tokens, and see all, by projections of their own: at these o_t = softmax over all s of q'_t . k'_s, of v'_s.
Causal language models have none, as the paper's.
Cost is linear in time: with a dilation d the tokens are d sequences beside one another, in windows without gaps.
State: keys and values of the last (window - 1) max(d) + 1 tokens, a ring, whatever the context.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import lists, ops
from zoo.errors import UsageError
from zoo.layers import linear, ring, rotary, segment_numbers
from zoo.layers.global_tokens import first_tokens, of_first_tokens, window_and_first
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
from zoo.taken import Segments


@dataclasses.dataclass
class LongformerConfig(MixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    window: int = setting(256, "tokens a query sees, itself included", unit="token", at_least=2, at_most=2**20)
    dilation: str = setting("1", "tokens between those seen: 1+2, for each equal part of the heads", parse=lists.counts)
    global_tokens: int = setting(
        0, "first tokens of a document that see all and are seen by all; bidirectional models only", unit="token",
        zero="none", at_most=64,
    )  # fmt: skip


class Longformer(Mixer):
    config_class = LongformerConfig
    runs_twice = False
    saved_names = ("longformer_q", "longformer_k", "longformer_v")

    def __init__(self, config: LongformerConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.window, self.rope = heads_or_default(config.num_heads, d, 64), config.window, sizes.rope
        self.dilations = tuple(lists.counts(config.dilation))
        self.slots = (self.window - 1) * max(self.dilations) + 1
        self.q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.global_tokens = config.global_tokens
        if config.global_tokens:
            self.global_q = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
            self.global_k = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
            self.global_v = linear(d, d, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = linear(d, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        positions = positions_or_default(positions, x)

        def projected(q, k, v):
            q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (q, k, v))
            return (rotary(q, positions), rotary(k, positions), v) if self.rope else (q, k, v)

        q, k, v = projected(self.q, self.k, self.v)
        q, k, v = (checkpoint_name(a, f"longformer_{name}") for a, name in ((q, "q"), (k, "k"), (v, "v")))
        if self.global_tokens:
            if self.causal:
                raise UsageError(_problem(self.global_tokens))
            of_global = projected(self.global_q, self.global_k, self.global_v)
            return self.out(self._with_global(q, k, v, of_global, segment_ids).reshape(x.shape)), None
        if state is not None:
            segments = Segments.all_of(segment_ids, x.shape[:2])
            o, cache = self._one(q, k, v, state) if x.shape[1] == 1 else self._many(q, k, v, segments, state)
            return self.out(o.reshape(x.shape)), cache | ring.counts_after(state, segments)
        # Tokens that are not neighbours become so where there are gaps: then ids may not come back.
        has_gaps = max(self.dilations) > 1
        if segment_ids is None:
            ids = jnp.zeros(x.shape[:2], jnp.int32) if has_gaps and not self.causal else None
        else:
            ids = segment_numbers(segment_ids) if has_gaps else segment_ids
        return self.out(self._in_windows(q, k, v, ids).reshape(x.shape)), None

    def _in_windows(self, q, k, v, ids, kept=0):
        """Keys, values and their ids begin with those of `kept` tokens before the queries."""

        def dilated(q, k, v, dilation):
            of_keys, given = ids, {"causal": self.causal, "window": self.window}
            if kept:  # of which these heads see so many
                unseen = kept - (self.window - 1) * dilation
                k, v, of_keys = k[:, unseen:], v[:, unseen:], ids[:, unseen:]
                given["q_start"] = self.window - 1
            time = q.shape[1]
            q, k, v = (_apart(x, dilation) for x in (q, k, v))
            of_keys = None if ids is None else _apart(of_keys, dilation, -1)
            return _together(ops.attention(q, k, v, segment_ids=of_keys, **given), dilation, time)

        return self._of_parts(dilated, q, k, v)

    def _one(self, q, k, v, state):
        """Outputs and cache of one token."""
        cache, numbers = ring.with_one({"k": k, "v": v}, state)
        age, is_of_segment = state["index"][:, None] - numbers, numbers >= state["start"][:, None]
        # The parts of the heads are rows of their own, and read all slots: a part of the cache would have to be copied.
        dilations = jnp.asarray(self.dilations)[None, :, None]
        visible = is_of_segment[:, None] & (age[:, None] % dilations == 0) & (age[:, None] < self.window * dilations)
        visible = visible.reshape(-1, 1, self.slots)
        k, v = (cache[name].reshape(len(visible), -1, self.slots, q.shape[3]).astype(q.dtype) for name in ("k", "v"))
        o = ops.attention_step(q.reshape(len(visible), 1, -1, q.shape[3]), k, v, visible, stop=ring.in_use(state))
        return o.reshape(q.shape), cache

    def _many(self, q, k, v, segments, state):
        """Outputs and cache of any number of tokens."""
        tokens, ids, cache = ring.with_many({"k": k, "v": v}, state, segments)
        k, v = (tokens[name].swapaxes(1, 2).astype(q.dtype) for name in ("k", "v"))
        return self._in_windows(q, k, v, ids, kept=self.slots), cache

    def _of_parts(self, attend, *arrays):
        """`attend(*arrays, dilation)` of each part of the heads, which are the last axis but one."""
        parts = (jnp.split(x, len(self.dilations), axis=-2) for x in arrays)
        return jnp.concatenate([attend(*part, d) for *part, d in zip(*parts, self.dilations, strict=True)], axis=2)

    def _with_global(self, q, k, v, of_global, segment_ids):
        time, number = q.shape[1], self.global_tokens
        numbers = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_numbers(segment_ids)
        count = ring.counted(q, segment_ids, None)
        start, is_global = jnp.arange(time) - count, count < number
        first_k, first_v = first_tokens(k, start, number), first_tokens(v, start, number)
        ids_of_first = first_tokens(numbers[..., None, None], start, number)[..., 0, 0]
        inside = start[..., None] + jnp.arange(number) < time
        has_first = (ids_of_first == numbers[..., None]) & inside

        def dilated(q, k, v, first_k, first_v, dilation):
            of_tokens = (q, k, v), (first_k, first_v, has_first)
            (q, k, v), first = ([_apart(x, dilation) for x in arrays] for arrays in of_tokens)
            ids, firsts = _apart(numbers, dilation, time), _apart(is_global, dilation)
            return _together(window_and_first(q, k, v, ids, firsts, *first, self.window), dilation, time)

        local = self._of_parts(dilated, q, k, v, first_k, first_v)
        return jnp.where(is_global[..., None, None], of_first_tokens(*of_global, numbers, count, number), local)

    def init_state(self, batch_size, max_length, dtype):
        return ring.init_caches(batch_size, self.slots, self.heads, self.q.out_features // self.heads, dtype)

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
    def check_direction(config, direction):
        return [] if not config.global_tokens or direction == BIDIRECTIONAL else [_problem(config.global_tokens)]

    @staticmethod
    def num_parameters(config, d_model):
        return (7 if config.global_tokens else 4) * d_model**2

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        """Of the window on one side; global tokens see, and are seen by, all."""
        dilations = lists.counts(config.dilation)
        seen = sum(min(config.window, context_length / dilation) for dilation in dilations) / len(dilations)
        of_global = 6 * d_model**2 if config.global_tokens else 0
        return 8 * d_model**2 + of_global + 4 * d_model * (seen + 2 * config.global_tokens)


def _problem(global_tokens: int) -> str:
    return f"global_tokens: {global_tokens} would see what follows; set it to 0, or model.direction=bidirectional"


def _apart(x: jax.Array, dilation: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [B * dilation, T / dilation, ...]: every token of the same place modulo `dilation`, in a row."""
    if dilation == 1:
        return x
    padding = ((0, 0), (0, -x.shape[1] % dilation), *((0, 0),) * (x.ndim - 2))
    x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(x.shape[0], -1, dilation, *x.shape[2:]).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])


def _together(x: jax.Array, dilation: int, time: int) -> jax.Array:
    """What `_apart` took apart."""
    x = x.reshape(-1, dilation, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]
