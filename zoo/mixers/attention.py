"""Softmax attention with rotary positions and grouped queries (arXiv:1706.03762, 2104.09864, 2305.13245).

    o_t = sum_s p_ts v_s,   p_ts = softmax over s <= t of (q_t . k_s / sqrt(K)),   y_t = W_o o_t

Optional: a norm on q and k (2302.05442), of each head or of all together (OLMo 2's, 2501.00656), a sliding window of
`window` tokens, rotary positions on a part of each head or scaled to longer contexts, a gate on what is read
(2505.06708, as in Qwen3-Next): y_t = W_o (o_t * sigmoid(x_t W_g)).
State: the keys and values so far, [batch, max_length, kv_heads, K], and of each row the number of tokens in them and
where its current segment starts. More than max_length tokens, of all segments and padding together, with a window too,
are a ValueError where their number is known, else NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.layers import RopeScaling, linear, rms_norm, rotary, rounded_once, segment_numbers
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.settings import section, setting

POSITIONS = {"model": "model.positions", "rope": "rotary", "none": ""}


@dataclasses.dataclass
class AttentionConfig(NormedMixerConfig):
    num_heads: int = setting(0, "heads", zero="one for each 64 of d_model, at least 4")
    num_kv_heads: int = setting(0, "heads of k and v", zero="num_heads")
    head_dim: int = setting(0, "K", zero="d_model / num_heads", at_least=2)
    rope_base: float = setting(10_000.0, "the slowest pair turns by 1 / base a token", at_least=1)
    positions: str = setting("model", "of q and k", choices=POSITIONS)
    rotary_fraction: float = setting(1.0, "share of each head's channels that turn", above=0, at_most=1)
    rope_scaling: RopeScaling = section(RopeScaling)
    qk_norm: bool = setting(False, "an RMS norm on each head's q and k")
    qk_norm_whole: bool = setting(False, "with qk_norm: one norm over all heads of q, and of k")
    window: int = setting(0, "tokens a query sees, itself included", unit="token", zero="all before it")
    output_gate: bool = setting(False, "a sigmoid gate on what is read, for each entry of each head")


def _widths(config: AttentionConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, kv_heads, K)."""
    heads = heads_or_default(config.num_heads, d_model, 64)
    return heads, config.num_kv_heads or heads, config.head_dim or d_model // heads


def _turning(config: AttentionConfig, head_dim: int) -> int:
    """The channels of a head that turn."""
    return int(head_dim * config.rotary_fraction)


def _check_state(state: dict[str, jax.Array], batch: int, time: int) -> None:
    """Raise ValueError for a state of other sequences, or without room for the tokens where their number is known."""
    sequences, length = state["k"].shape[:2]
    if sequences != batch:
        raise ValueError(f"attention: state has {sequences} sequences, expected the {batch} of x")
    before = 0 if isinstance(state["index"], jax.core.Tracer) else int(state["index"].max())
    if before + time > length:
        raise ValueError(
            f"attention: state has room for {length} tokens, expected {before} + {time}: make it with that max_length"
        )


def _put(cache: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
    """`cache` [B, L, ...] with x [B, T, ...] from each row's `index` [B] on."""
    put = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    return put(cache, x.astype(cache.dtype), index)


class Attention(Mixer):
    config_class = AttentionConfig
    saved_names = ("attention_q", "attention_k", "attention_v")

    def __init__(self, config: AttentionConfig, sizes: Sizes, *, layer_index: jax.Array | int, rngs: nnx.Rngs):
        d, dtype = sizes.d_model, sizes.dtype
        self.heads, self.kv_heads, self.head_dim = _widths(config, d)
        has_rope = {"model": sizes.rope, "rope": True, "none": False}[config.positions]
        self.rope_base = config.rope_base if has_rope else None
        self.turning, self.rope_scaling = _turning(config, self.head_dim), dataclasses.astuple(config.rope_scaling)
        self.window = config.window or None
        self.q = linear(d, self.heads * self.head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.k = linear(d, self.kv_heads * self.head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.v = linear(d, self.kv_heads * self.head_dim, ("embed", "heads"), dtype=dtype, rngs=rngs)
        self.qk_norm, self.qk_norm_whole = config.qk_norm, config.qk_norm_whole
        if config.qk_norm:
            of_q, of_k = (
                heads * self.head_dim if config.qk_norm_whole else self.head_dim
                for heads in (self.heads, self.kv_heads)
            )
            self.q_norm = rms_norm(of_q, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
            self.k_norm = rms_norm(of_k, epsilon=sizes.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        width = self.heads * self.head_dim
        self.output_gate = linear(d, width, ("embed", "heads"), dtype=dtype, rngs=rngs) if config.output_gate else None
        self.out = linear(width, d, ("heads", "embed"), init_scale=sizes.output_scale, dtype=dtype, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, state=None):
        batch, time = x.shape[:2]
        if state is not None:
            _check_state(state, batch, time)
        positions = positions_or_default(positions, x)
        q = self.q(x).reshape(batch, time, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, time, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, time, self.kv_heads, self.head_dim)

        def turn(x):
            scaling = RopeScaling(*self.rope_scaling)
            return (
                x
                if self.rope_base is None
                else rotary(x, positions, self.rope_base, width=self.turning, scaling=scaling)
            )

        def normed(norm, x):
            return norm(x.reshape(batch, time, -1)).reshape(x.shape) if self.qk_norm_whole else norm(x)

        if self.qk_norm:
            q = rounded_once(lambda q: turn(normed(self.q_norm, q)), q)
            k = rounded_once(lambda k: turn(normed(self.k_norm, k)), k)
        else:
            q, k = turn(q), turn(k)
        q, k, v = (checkpoint_name(a, f"attention_{name}") for a, name in ((q, "q"), (k, "k"), (v, "v")))
        log_decay = self.log_decay(x)
        if state is None:
            o = ops.attention(q, k, v, window=self.window, segment_ids=segment_ids, log_decay=log_decay)
        else:
            o, state = self._continue(q, k, v, log_decay, segment_ids, state)
        o = o.reshape(batch, time, -1)
        if self.output_gate is not None:
            o = rounded_once(lambda o, gate: o * jax.nn.sigmoid(gate), o, self.output_gate(x))
        return self.out(o), state

    def log_decay(self, x):
        """What a token leaves of the keys before it, [B, T, heads]; None: all."""
        return None

    def _continue(self, q, k, v, log_decay, segment_ids, state):
        """Append k and v to the cache and attend to it: entries of the current segment, and those before t here."""
        batch, time = q.shape[:2]
        length = state["k"].shape[1]
        index = state["index"]  # [B] tokens in the cache
        keys = _put(state["k"], k, index)
        values = _put(state["v"], v, index)
        slots = jnp.arange(length, dtype=jnp.int32)
        # Each row's cache, named by the segments of this call: what the state's segment wrote continues token 0's.
        cached = jnp.where((slots >= state["start"][:, None]) & (slots < index[:, None]), 0, -1)
        count = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else segment_numbers(segment_ids)
        decays, after = None, {}
        if log_decay is not None:
            before = jnp.take_along_axis(state["sums"], (index - 1)[:, None, None, None], axis=1)[:, 0]
            of_queries = ops.decay_sums(log_decay, jnp.where((index > 0)[:, None, None], before, 0))
            after["sums"] = _put(state["sums"], of_queries, index)
            decays = of_queries, after["sums"]
        o = ops.attention(
            q,
            keys.astype(q.dtype),
            values.astype(q.dtype),
            window=self.window,
            segment_ids=(count, _put(cached, count, index)),
            # Keys stand at their own slot, so only the slots up to here are read.
            q_positions=index[:, None] + jnp.arange(time, dtype=jnp.int32),
            log_decay=decays,
        )
        # A cache that is too short has lost a key, and which tokens saw it is nobody's to guess.
        o = jnp.where((index + time <= length)[:, None, None, None], o, jnp.nan)
        # The last segment starts at its first token here, unless the whole call continues the state's.
        last_start = index + jnp.argmax(count == count[:, -1:], axis=1).astype(jnp.int32)
        start = jnp.where(count[:, -1] == 0, state["start"], last_start)
        return o, after | {"k": keys, "v": values, "index": index + time, "start": start}

    def init_state(self, batch_size, max_length, dtype):
        cache = jnp.zeros((batch_size, max_length, self.kv_heads, self.head_dim), dtype)
        zeros = jnp.zeros((batch_size,), jnp.int32)
        return {"k": cache, "v": cache, "index": zeros, "start": zeros}

    def spread_over_tensor(self):
        # One head of k and v is on every device.
        return {"num_heads": self.heads} | ({"num_kv_heads": self.kv_heads} if self.kv_heads > 1 else {})

    @staticmethod
    def check(config, d_model):
        heads = heads_or_default(config.num_heads, d_model, 64)
        # With a head width of its own, any number of heads will do.
        problems = check_heads({"num_heads": heads}, "d_model", heads if config.head_dim else d_model)
        if problems:
            return problems
        heads, kv_heads, head_dim = _widths(config, d_model)
        problems += check_heads({"num_kv_heads": kv_heads}, "num_heads", heads)
        turning = _turning(config, head_dim)
        if config.rotary_fraction == 1 and head_dim % 2:
            problems.append(f"head_dim: got {head_dim}, expected an even width (rotary turns pairs)")
        elif turning < 2 or turning % 2:
            what = f"{turning} of head_dim = {head_dim} channels"
            problems.append(
                f"rotary_fraction: {config.rotary_fraction:g} turns {what}, expected an even number, at least 2"
            )
        if config.qk_norm_whole and not config.qk_norm:
            problems.append("qk_norm_whole: does nothing without a norm on q and k; set qk_norm too")
        return problems + [f"rope_scaling.{problem}" for problem in config.rope_scaling.check()]

    @staticmethod
    def num_parameters(config, d_model):
        heads, kv_heads, head_dim = _widths(config, d_model)
        gate = d_model * head_dim * heads if config.output_gate else 0
        norms = head_dim * (heads + kv_heads if config.qk_norm_whole else 2) if config.qk_norm else 0
        return 2 * d_model * head_dim * (heads + kv_heads) + gate + norms

    @staticmethod
    def flops_per_token(config, d_model, context_length):
        heads, kv_heads, head_dim = _widths(config, d_model)
        gate = 2 * d_model * head_dim * heads if config.output_gate else 0
        return 4 * d_model * head_dim * (heads + kv_heads) + gate + 4 * heads * head_dim * context_length
