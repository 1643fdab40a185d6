"""Softmax attention with rotary positions and grouped queries (arXiv:1706.03762, 2104.09864, 2305.13245).

    o_t = sum_s p_ts v_s,   p_ts = softmax over s <= t of (q_t . k_s / sqrt(K)),   y_t = W_o o_t

Bidirectional: over all s of the document. Optional: a norm on q and k (2302.05442), of each head or of all together
(OLMo 2's, 2501.00656), a sliding window of `window` tokens, rotary positions on a part of each head or scaled to longer
contexts, a gate on what is read (2505.06708, as in Qwen3-Next): y_t = W_o (o_t * sigmoid(x_t W_g)).
State: the keys and values so far, [batch, kv_heads, max_length, K], and of each row the number of tokens in them and
where its current segment starts. More than max_length tokens, of all segments and padding together, are a ValueError
where their number is known, else NaN. With a window shorter than max_length the state is a ring of the last `window`
tokens, token n in slot n % window, and holds any number of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from zoo import ops
from zoo.errors import UsageError
from zoo.layers import RopeScaling, linear, ring, rms_norm, rotary, rounded_once
from zoo.mixers.base import Mixer, NormedMixerConfig, Sizes, check_heads, heads_or_default, positions_or_default
from zoo.mixers.from_softmax import SIGMOID_OPEN, Softmax, Taken, check_biases, open_gate, projected
from zoo.settings import section, setting
from zoo.taken import Segments

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
    window: int = setting(
        0, "tokens a query sees, itself included (bidirectional: and as many after it)", unit="token", zero="all"
    )
    output_gate: bool = setting(False, "a sigmoid gate on what is read, for each entry of each head")


def _widths(config: AttentionConfig, d_model: int) -> tuple[int, int, int]:
    """(heads, kv_heads, K)."""
    heads = heads_or_default(config.num_heads, d_model, 64)
    return heads, config.num_kv_heads or heads, config.head_dim or d_model // heads


def _turning(config: AttentionConfig, head_dim: int) -> int:
    """The channels of a head that turn."""
    return int(head_dim * config.rotary_fraction)


def _check_state(state: dict[str, jax.Array], batch: int, time: int, is_ring: bool) -> None:
    """Raise ValueError for a state of other sequences, or without room for the tokens where their number is known."""
    sequences, _, length, _ = state["k"].shape
    if sequences != batch:
        raise ValueError(f"attention: state has {sequences} sequences, expected the {batch} of x")
    before = 0 if isinstance(state["index"], jax.core.Tracer) else int(state["index"].max())
    if before + time > length and not is_ring:
        raise ValueError(
            f"attention: state has room for {length} tokens, expected {before} + {time}: make it with that max_length"
        )


# So many tokens read the cache where it lies; for more, it is turned round to the order of tokens.
FEW_TOKENS = 32


class Attention(Mixer):
    config_class = AttentionConfig
    runs_twice = False
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
            _check_state(state, batch, time, self._is_ring(state))
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
            options = {"causal": self.causal, "window": self.window, "log_decay": log_decay}
            o = ops.attention(q, k, v, segment_ids=segment_ids, **options)
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
        """Attend to the state's tokens of the current segment, and to those before t here; and the state after them."""
        index = state["index"]  # [B]
        segments = Segments.all_of(segment_ids, q.shape[:2])
        new = {"k": k, "v": v}
        if log_decay is not None:
            slot = (index - 1) % state["sums"].shape[2]  # of the last token
            before = jnp.take_along_axis(state["sums"], slot[:, None, None, None], axis=2)[:, :, 0]
            new["sums"] = ops.decay_sums(log_decay, jnp.where((index > 0)[:, None, None], before, 0))
        if self._is_ring(state):
            o, cache = _one_in_ring(q, new, state) if q.shape[1] == 1 else _many_in_ring(q, new, segments, state)
        else:
            o, cache = _append(q, new, segments, state, self.window)
        return o, cache | ring.counts_after(state, segments)

    def as_softmax(self, span):
        """A norm on q and k leaves its scale: the family in its place divides by lengths, or by what it reads."""
        d, groups = self.out.out_features, self.heads // self.kv_heads
        scale = {"q": self.q_norm.scale[...], "k": self.k_norm.scale[...]} if self.qk_norm else {}

        def in_heads(name, layer, heads):
            bias = jnp.zeros(layer.out_features) if layer.bias is None else layer.bias[...]
            x = jnp.concatenate([layer.kernel[...], bias[None]]).reshape(d + 1, heads, self.head_dim)
            return x * scale[name].reshape(-1, self.head_dim) if name in scale else x

        layers = {"q": self.q, "k": self.k, "v": self.v, "out": self.out}
        return Softmax(
            q=in_heads("q", self.q, self.heads),
            k=jnp.repeat(in_heads("k", self.k, self.kv_heads), groups, axis=1),
            v=jnp.repeat(in_heads("v", self.v, self.kv_heads), groups, axis=1),
            out=self.out.kernel[...].reshape(self.heads, self.head_dim, d),
            out_bias=None if self.out.bias is None else self.out.bias[...],
            biases=tuple(name for name, layer in layers.items() if layer.bias is not None),
            turned=self.rope_base is not None,
            span=min(span, self.window or span),
        )

    def from_softmax(self, softmax):
        """Softmax attention of as many heads of q; where they come to share keys, the mean of those (2305.13245)."""
        if softmax.q.shape[1:] != (self.heads, self.head_dim):
            return {}
        if self.qk_norm:
            raise UsageError("qk_norm: products of q and k that are normed are not those of softmax attention without")
        check_biases(softmax, {"q": ("q", self.q), "k": ("k", self.k), "v": ("v", self.v), "out": ("out", self.out)})
        rows, of = softmax.q.shape[0], f"{self.heads} heads of {self.head_dim}"

        def mean(x):
            return x.reshape(rows, self.kv_heads, -1, self.head_dim).mean(axis=2).reshape(rows, -1)

        of_k = of if self.kv_heads == self.heads else f"{of}, the mean of every {self.heads // self.kv_heads}"
        out = {"out.kernel": Taken(softmax.out.reshape(-1, self.out.out_features), f"out, {of}")}
        if self.out.bias is not None and softmax.out_bias is not None:
            out["out.bias"] = Taken(softmax.out_bias, "out's bias")
        return (
            projected("q", self.q, softmax.q.reshape(rows, -1), f"q, {of}")
            | projected("k", self.k, mean(softmax.k), f"k, {of_k}")
            | projected("v", self.v, mean(softmax.v), f"v, {of_k}")
            | out
            | open_gate(self, "output_gate", SIGMOID_OPEN)
        )

    def _is_ring(self, state):
        return self.window is not None and state["k"].shape[2] == self.window

    def init_state(self, batch_size, max_length, dtype):
        length = max_length if self.window is None else min(max_length, self.window)
        return ring.init_caches(batch_size, length, self.kv_heads, self.head_dim, dtype)

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


def _append(q, new, segments, state, window):
    """Outputs, and the cache with the tokens behind those that it has, each in the slot of its number."""
    time, length = q.shape[1], state["k"].shape[2]
    index = state["index"][:, None]
    cache = {name: ring.put(state[name], x, state["index"]) for name, x in new.items()}
    slots = jnp.arange(length, dtype=jnp.int32)
    numbers = index + jnp.arange(time, dtype=jnp.int32)
    # Each row's cache, named by the segments of this call: what the state's segment wrote continues token 0's.
    ids = jnp.where((slots >= state["start"][:, None]) & (slots < index), 0, -1)
    ids = jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(ids, numbers, segments.numbers)
    o = _attend(q, new, cache, (segments.numbers, ids), numbers, window)
    # A cache that is too short has lost a key, and which tokens saw it is nobody's to guess.
    fits = (numbers < length) & (index + segments.count()[:, None] <= length)
    return jnp.where(fits[..., None, None], o, jnp.nan), cache


def _one_in_ring(q, new, state):
    """Outputs and cache of one token, which takes the place of the one that left the window."""
    cache, numbers = ring.with_one(new, state)
    visible = (numbers >= state["start"][:, None])[:, None]
    return _read(q, new, cache, visible, ring.in_use(state)), cache


def _many_in_ring(q, new, segments, state):
    """Outputs and cache of any number of tokens, behind those in the ring, in order."""
    window = state["k"].shape[2]
    tokens, ids, cache = ring.with_many(new, state, segments)
    positions = jnp.broadcast_to(window + jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return _attend(q, new, tokens, (segments.numbers, ids), positions, window), cache


def _attend(q, new, cache, ids, positions, window):
    """Causal attention of q [B, T, H, K] at `positions` [B, T] to a cache [B, G, L, K], a position a slot."""
    if q.shape[1] > FEW_TOKENS:
        keys, values = (cache[name].astype(q.dtype).swapaxes(1, 2) for name in ("k", "v"))
        sums = (new["sums"], cache["sums"].swapaxes(1, 2)) if "sums" in cache else None
        return ops.attention(q, keys, values, window=window, segment_ids=ids, q_positions=positions, log_decay=sums)
    distance = positions[:, :, None] - jnp.arange(cache["k"].shape[2], dtype=jnp.int32)
    visible = (ids[0][:, :, None] == ids[1][:, None]) & (distance >= 0)
    visible &= True if window is None else distance < window
    return _read(q, new, cache, visible, jnp.max(positions) + 1)


def _read(q, new, cache, visible, stop):
    """`ops.attention_step` of the queries of `new` tokens to the visible ones of a cache."""
    sums = (new["sums"], cache["sums"]) if "sums" in cache else None
    return ops.attention_step(q, cache["k"].astype(q.dtype), cache["v"].astype(q.dtype), visible, stop=stop, sums=sums)
