"""The kernels as mixers see them: the same calls, put on the mesh in use. Mixers never import `kernels`.

Each device runs an op on its own sequences and heads, or channels. Where the mesh spreads the time too, an op says here
what has to travel: a recurrence what a part of a sequence does to the state (`carry`, see `zoo.sharding.sequence`), a
convolution how far it looks back, and attention takes the keys that its queries see.
"""

import functools

import jax
import jax.numpy as jnp

import kernels
from kernels import precision, segments
from kernels.attention import decay
from zoo import sharding, taken
from zoo.sharding import sequence
from zoo.taken import Segments, state_of_taken

__all__ = [
    "associative_scan",
    "attention",
    "attention_step",
    "cross_entropy",
    "decay_sums",
    "delta_rule",
    "diagonal_ssm",
    "dplr_delta_rule",
    "earlier",
    "fast_weights",
    "full_linear_attention",
    "linear_attention",
    "linear_scan",
    "previous",
    "reversed_time",
    "segment_max",
    "segment_starts",
    "segment_sum",
    "selective_scan",
    "short_conv",
    "tokens_since_start",
]

TILE = 128  # tokens of which a TPU's attention kernel takes a multiple
OF_TOKENS = ("batch", "time")
OF_CHANNELS = ("batch", "time", "heads")
OF_QUERIES, OF_KEYS = ("q", "q_sums"), ("k", "v", "kv_sums")  # in attention


def attention(q, k, v, *, causal=True, window=None, segment_ids=None, q_positions=None, kv_positions=None, **options):
    """`kernels.attention`, with each device's sequences and heads on it; see there.

    Of queries and keys that are the same tokens, in order, a device has the queries of its part of the time too. Keys
    come to it: those of the window, from its neighbours, or all of them. Of causal attention to all keys it computes
    half of its queries and half of those of the device that mirrors it, which is equal work for all.
    """
    pair = isinstance(segment_ids, tuple)
    ids = dict(zip(("q_ids", "kv_ids"), segment_ids if pair else (segment_ids,), strict=False))
    log_decay = options.pop("log_decay", None)
    if log_decay is not None and not isinstance(log_decay, tuple):
        log_decay = (decay_sums(log_decay),) * 2
    of_decays = dict(zip(("q_sums", "kv_sums"), log_decay or (), strict=False))

    def call(arrays, **of_part):
        local = tuple(arrays[name] for name in ids if name in arrays)
        local = local if pair else local[0] if local else None
        others = {name: array for name, array in arrays.items() if name not in ids | of_decays}
        others |= {"log_decay": (arrays["q_sums"], arrays["kv_sums"])} if of_decays else {}
        return kernels.attention(**others, segment_ids=local, causal=causal, window=window, **options, **of_part)

    groups = k.shape[2]  # a device has the heads of q that read its heads of k, or the only one
    heads = "heads" if groups == 1 or groups % sharding.axis_size("heads") == 0 else None
    in_order = not pair and q_positions is None and kv_positions is None and q.shape[1] == k.shape[1]
    time = "time" if in_order else None
    of_keys = ("batch", time, None if groups == 1 else heads, None)
    arrays = {"q": (q, ("batch", time, heads, None)), "k": (k, of_keys), "v": (v, of_keys)}
    of_tokens = ids | {"q_positions": q_positions, "kv_positions": kv_positions}
    arrays |= {name: (array, ("batch", time)) for name, array in of_tokens.items()}
    arrays |= {name: (array, ("batch", time, heads, None)) for name, array in of_decays.items()}
    over_time = functools.partial(_keys_to_queries, causal=causal, window=window)
    return sharding.on_each_device(call, arrays, ("batch", time, heads, None), over_time=over_time)


def decay_sums(log_decay, before=None):
    """`kernels.attention.sums` of log_decay [B, T, H], on top of those of earlier tokens, `before` [B, H, 2]."""
    zeros = jnp.zeros((log_decay.shape[0], log_decay.shape[2]), jnp.float32)
    first = decay.pair(zeros) if before is None else (before[..., 0], before[..., 1])
    return jnp.stack(associative_scan(decay.add, decay.pair(log_decay), first), axis=-1)


def attention_step(q, k, v, visible, *, stop, sums=None):
    """`kernels.attention_step`, with each device's sequences and heads on it; see there."""
    groups = k.shape[1]
    heads = "heads" if groups == 1 or groups % sharding.axis_size("heads") == 0 else None
    of_keys = ("batch", None if groups == 1 else heads, None, None)
    arrays = {"q": (q, ("batch", None, heads, None)), "k": (k, of_keys), "v": (v, of_keys), "stop": (stop, ())}
    arrays["visible"] = (visible, ("batch", None, None))
    if sums is not None:
        arrays |= {"of_q": (sums[0], ("batch", None, heads, None)), "of_k": (sums[1], ("batch", heads, None, None))}

    def call(arrays):
        pair = (arrays.pop("of_q"), arrays.pop("of_k")) if "of_q" in arrays else None
        return kernels.attention_step(**arrays, sums=pair)

    return sharding.on_each_device(call, arrays, ("batch", None, heads, None))


@state_of_taken("k", "log_decay")
def linear_attention(q, k, v, log_decay=None, *, bonus=None, initial_state=None, segment_ids=None, **options):
    """`kernels.linear_attention`, with each device's sequences, heads and part of the time on it; see there."""
    groups = q.shape[2]
    # Heads of q and k that several devices' heads of v share are on all of them.
    heads = "heads" if groups == 1 or groups % sharding.axis_size("heads") == 0 else None
    shared = None if groups == 1 else heads
    decay_axes = {0: (), 1: (heads,), 3: ("batch", "time", heads), 4: ("batch", "time", heads, None)}
    arrays = {
        "q": (q, ("batch", "time", shared, None)),
        "k": (k, ("batch", "time", shared, None)),
        "v": (v, ("batch", "time", heads, None)),
        "log_decay": (log_decay, decay_axes[0 if log_decay is None else log_decay.ndim]),
        "bonus": (bonus, (heads, None)),
        "initial_state": (initial_state, ("batch", heads, None, None)),
        "segment_ids": (segment_ids, OF_TOKENS),
    }

    def carry(arrays):
        k, v, g = arrays["k"], arrays["v"], arrays.get("log_decay")
        k = jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
        if g is None:
            g = jnp.zeros(v.shape[2], jnp.float32)
        g = g[..., None] if g.ndim < 4 else g  # [B, T, H, K], [B, T, H, 1] or [H, 1]
        total, rest = _decays(g, k.shape[1])
        return jnp.exp(total)[..., None], _written(k, jnp.exp(rest), v, arrays)

    return _recurrence(
        kernels.linear_attention,
        arrays,
        (("batch", "time", heads, None), ("batch", heads, None, None)),
        carry,
        options,
    )


def full_linear_attention(q, k, v, *, segment_ids=None, scale=None):
    """o_t = scale q_t^T sum_s k_s v_s^T over all tokens s of t's segment: linear attention that sees both ways.

    It is the sum of `linear_attention` up to t and, in reversed time, of what comes after t: two scans, whatever the
    number of segments.
    """
    of_heads = ("heads", None)
    before, _ = linear_attention(q, k, v, segment_ids=segment_ids, scale=scale)
    q, k, v = (reversed_time(x, *of_heads) for x in (q, k, v))
    ids = None if segment_ids is None else reversed_time(segment_ids)
    k, v = (previous(x, *of_heads, segment_ids=ids)[0] for x in (k, v))
    after, _ = linear_attention(q, k, v, segment_ids=ids, scale=scale)
    return before + reversed_time(after, *of_heads)


@state_of_taken("beta", "log_decay")
def delta_rule(q, k, v, beta, log_decay=None, *, initial_state=None, segment_ids=None, **options):
    """`kernels.delta_rule`, with each device's sequences, heads and part of the time on it; see there.

    A part of the time runs twice: from zero and from the unit matrix, for its map, and from the state that enters it.
    """
    groups = q.shape[2]
    heads = "heads" if groups == 1 or groups % sharding.axis_size("heads") == 0 else None
    shared = None if groups == 1 else heads
    of_keys = ("batch", "time", shared, None)
    arrays = {
        "q": (q, of_keys),
        "k": (k, of_keys),
        "v": (v, ("batch", "time", heads, None)),
        "beta": (beta, ("batch", "time", heads)),
        "log_decay": (log_decay, ("batch", "time", heads) + (None,) * (log_decay is not None and log_decay.ndim == 4)),
        "initial_state": (initial_state, ("batch", heads, None, None)),
        "segment_ids": (segment_ids, OF_TOKENS),
    }
    out_axes = (("batch", "time", heads, None), ("batch", heads, None, None))
    return _matrix_recurrence(kernels.delta_rule, arrays, out_axes, options)


@state_of_taken("k", "a", "log_decay")
def dplr_delta_rule(q, k, v, a, b, log_decay, *, initial_state=None, segment_ids=None, **options):
    """`kernels.dplr_delta_rule`, on the mesh as `delta_rule`; see there."""
    of_heads = ("batch", "time", "heads", None)
    of_tokens = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay}
    arrays = {name: (array, of_heads) for name, array in of_tokens.items()}
    arrays["initial_state"] = (initial_state, ("batch", "heads", None, None))
    arrays["segment_ids"] = (segment_ids, OF_TOKENS)
    out_axes = (of_heads, ("batch", "heads", None, None))
    return _matrix_recurrence(kernels.dplr_delta_rule, arrays, out_axes, options)


@state_of_taken("k", "key_log_decay", "value_log_decay")
def fast_weights(q, k, v, key_log_decay, value_log_decay, *, initial_state=None, segment_ids=None, **options):
    """`kernels.fast_weights`, with each device's sequences, heads and part of the time on it; see there."""
    of_heads = ("batch", "time", "heads", None)
    of_tokens = {"q": q, "k": k, "v": v, "key_log_decay": key_log_decay, "value_log_decay": value_log_decay}
    arrays = {name: (array, of_heads) for name, array in of_tokens.items()}
    arrays["initial_state"] = (initial_state, ("batch", "heads", None, None))
    arrays["segment_ids"] = (segment_ids, OF_TOKENS)

    def carry(arrays):
        k, v = arrays["k"], arrays["v"]
        of_keys, keys_left = _decays(arrays["key_log_decay"], k.shape[1])
        of_values, values_left = _decays(arrays["value_log_decay"], k.shape[1])
        v = (v * jnp.exp(values_left)).astype(v.dtype)
        return jnp.exp(of_keys[..., None] + of_values[..., None, :]), _written(k, jnp.exp(keys_left), v, arrays)

    out_axes = (of_heads, ("batch", "heads", None, None))
    return _recurrence(kernels.fast_weights, arrays, out_axes, carry, options)


@state_of_taken("x", "log_decay")
def linear_scan(x, log_decay, *, initial_state=None, segment_ids=None, **options):
    """`kernels.linear_scan`, with each device's sequences, channels and part of the time on it; see there."""
    arrays = {
        "x": (x, OF_CHANNELS),
        "log_decay": (log_decay, OF_CHANNELS if log_decay.ndim == 3 else ("heads",)),
        "initial_state": (initial_state, ("batch", "heads")),
        "segment_ids": (segment_ids, OF_TOKENS),
    }

    def carry(arrays):
        x = arrays["x"]
        total, rest = _decays(arrays["log_decay"], x.shape[1])
        return jnp.exp(total), jnp.sum(_of_last_segment(x * jnp.exp(rest), arrays), axis=1)

    return _recurrence(kernels.linear_scan, arrays, (OF_CHANNELS, ("batch", "heads")), carry, options)


@state_of_taken("dt")
def selective_scan(x, dt, A, B, C, D=None, *, initial_state=None, segment_ids=None, **options):
    """`kernels.selective_scan`, with each device's sequences, channels and part of the time on it; see there.

    A part of the time runs twice: from zero, for its state, and from the state that enters it.
    """
    arrays = {
        "x": (x, OF_CHANNELS),
        "dt": (dt, OF_CHANNELS),
        "A": (A, ("heads", None)),
        "B": (B, ("batch", "time", None)),
        "C": (C, ("batch", "time", None)),
        "D": (D, ("heads",)),
        "initial_state": (initial_state, ("batch", "heads", None)),
        "segment_ids": (segment_ids, OF_TOKENS),
    }

    def carry(arrays):
        total = jnp.sum(arrays["dt"].astype(jnp.float32), axis=1)
        written = kernels.selective_scan(**arrays, **options)[1]
        return jnp.exp(total[..., None] * arrays["A"]), written

    return _recurrence(kernels.selective_scan, arrays, (OF_CHANNELS, ("batch", "heads", None)), carry, options)


def diagonal_ssm(x, log_a, b, c, d=None, *, initial_state=None, segment_ids=None, **options):
    """`kernels.diagonal_ssm`, with each device's sequences, channels and part of the time on it; see there."""
    if isinstance(segment_ids, Segments):

        def written(x, ids):
            return diagonal_ssm(x, log_a, b, c, segment_ids=ids, **options)[1]

        y, _ = diagonal_ssm(x, log_a, b, c, d, initial_state=initial_state, segment_ids=segment_ids.numbers, **options)
        a = jnp.exp(log_a.astype(jnp.complex64))
        return y, taken.fixed_transition(written, x, a, segment_ids, initial_state)
    arrays = {name: (array, ("heads", None)) for name, array in {"log_a": log_a, "b": b, "c": c}.items()}
    arrays |= {
        "x": (x, OF_CHANNELS),
        "d": (d, ("heads",)),
        "initial_state": (initial_state, ("batch", "heads", None)),
        "segment_ids": (segment_ids, OF_TOKENS),
    }

    def carry(arrays):
        # A power of the decay: exp(T log a) turns a fast oscillation by what float32 loses of T times its angle.
        a = jnp.exp(arrays["log_a"].astype(jnp.complex64))
        written = kernels.diagonal_ssm(**arrays, **options)[1]
        return jax.lax.integer_pow(a, arrays["x"].shape[1])[None], written

    return _recurrence(kernels.diagonal_ssm, arrays, (OF_CHANNELS, ("batch", "heads", None)), carry, options)


def short_conv(x, weight, bias=None, *, initial_state=None, segment_ids=None, **options):
    """`kernels.short_conv`, with each device's sequences, channels and part of the time on it; see there."""
    width = weight.shape[1] - 1
    if isinstance(segment_ids, Segments):
        whole = {"initial_state": initial_state, "segment_ids": segment_ids.numbers}
        y, _ = short_conv(x, weight, bias, **whole, **options)
        return y, taken.last_inputs(x, width, segment_ids, initial_state)
    arrays = {
        "x": (x, OF_CHANNELS),
        "weight": (weight, ("heads", None)),
        "bias": (bias, ("heads",)),
        "initial_state": (initial_state, ("batch", None, "heads")),
        "segment_ids": (segment_ids, OF_TOKENS),
    }
    over_time = functools.partial(sequence.convolved, name="x", width=width)
    if initial_state is not None and width > x.shape[1] // sharding.axis_size("time"):
        over_time = None  # it would reach into more than the first part
    return sharding.on_each_device(
        lambda arrays: kernels.short_conv(**arrays, **options),
        arrays,
        (OF_CHANNELS, ("batch", None, "heads")),
        over_time=over_time,
    )


def previous(x, *axes, initial_state=None, segment_ids=None):
    """(x_{t-1} at each t, and the last x), of x [B, T, ...]; `initial_state` [B, ...] is before token 0, else zero.

    x_{t-1} is zero at a segment's first token; `initial_state` belongs to the segment of token 0. `axes`: logical axes
    after the time; none by default.
    """
    before = None if initial_state is None else initial_state[:, None]
    shifted, last = earlier(x, 1, *axes, initial_state=before, segment_ids=segment_ids)
    return shifted, last[:, 0]


def earlier(x, distance, *axes, initial_state=None, segment_ids=None):
    """(x_{t - distance} at each t, and the last `distance` x), of x [B, T, ...]; see `previous`.

    Zero where that token is of another segment. `initial_state` [B, distance, ...] is before token 0 and of its
    segment, else zero; what is returned is of the last segment.
    """
    if isinstance(segment_ids, Segments):
        shifted, _ = earlier(x, distance, *axes, initial_state=initial_state, segment_ids=segment_ids.numbers)
        return shifted, taken.last_inputs(x, distance, segment_ids, initial_state)
    of_state = ("batch", None, *(axes or (None,) * (x.ndim - 2)))
    axes = ("batch", "time", *of_state[2:])
    arrays = {"x": (x, axes), "initial_state": (initial_state, of_state), "segment_ids": (segment_ids, OF_TOKENS)}

    def call(arrays):
        x, ids = arrays["x"], arrays.get("segment_ids")
        time, before = x.shape[1], arrays.get("initial_state")
        before = jnp.zeros((len(x), distance, *x.shape[2:]), x.dtype) if before is None else before.astype(x.dtype)
        found = jnp.concatenate([before, x], axis=1)
        if ids is None:
            return found[:, :time], found[:, time:]
        numbers = segments.segment_numbers(ids)
        of_found = jnp.pad(numbers, ((0, 0), (distance, 0)))
        same = of_found[:, :time] == numbers, of_found[:, time:] == numbers[:, -1:]
        parts = zip(same, (found[:, :time], found[:, time:]), strict=True)
        return tuple(jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), part, 0) for mask, part in parts)

    over_time = functools.partial(sequence.convolved, name="x", width=distance)
    if initial_state is not None and distance > x.shape[1] // sharding.axis_size("time"):
        over_time = None  # it would reach into more than the first part
    return sharding.on_each_device(call, arrays, (axes, of_state), over_time=over_time)


def reversed_time(x, *axes):
    """x [B, T, ...] from the last token to the first. `axes`: logical axes after the time; none by default."""
    axes = ("batch", "time", *(axes or (None,) * (x.ndim - 2)))

    def over_time(call):
        return lambda arrays: sequence.reversed_time(arrays["x"])

    return sharding.on_each_device(lambda arrays: jnp.flip(arrays["x"], 1), {"x": (x, axes)}, axes, over_time=over_time)


def segment_sum(x, *, segment_ids=None):
    """The sum of x [B, T, H, V] over each token's segment, [B, T, H, V]; without segments [B, 1, H, V]."""
    if segment_ids is None:
        return jnp.sum(x, axis=1, keepdims=True)
    ones = jnp.ones((*x.shape[:3], 1), x.dtype)
    return full_linear_attention(ones, ones, x, segment_ids=segment_ids, scale=1.0)


def segment_max(x, *, segment_ids=None):
    """The largest of x [B, T, H] in each token's segment, [B, T, H]; without segments [B, 1, H]."""
    if segment_ids is None:
        return jnp.max(x, axis=1, keepdims=True)

    def up_to(x, ids):
        closed = jnp.where(segment_starts(ids), -jnp.inf, jnp.zeros(ids.shape, x.dtype))[..., None]
        shut = jnp.broadcast_to(closed, x.shape)
        first = jnp.zeros_like(x[:, 0]), jnp.full_like(x[:, 0], -jnp.inf)
        after = lambda a, b: (a[0] + b[0], jnp.maximum(a[1] + b[0], b[1]))  # noqa: E731
        return associative_scan(after, (shut, x), first)[1]

    return jnp.maximum(up_to(x, segment_ids), reversed_time(up_to(reversed_time(x), reversed_time(segment_ids))))


def segment_starts(segment_ids):
    """`kernels.segments.segment_starts`, on a mesh too."""
    segment_ids = segment_ids.numbers if isinstance(segment_ids, Segments) else segment_ids
    # The id before token 0 is its own.
    before, _ = previous(segment_ids, initial_state=segment_ids[:, 0])
    return segment_ids != before


def tokens_since_start(segment_ids, before):
    """`kernels.segments.tokens_since_start`, `before` [B] being the tokens of the first segment in earlier calls."""
    segment_ids = segment_ids.numbers if isinstance(segment_ids, Segments) else segment_ids
    arrays = {"segment_ids": (segment_ids, OF_TOKENS), "initial_state": (before, ("batch",))}

    def call(segment_ids, initial_state):
        count = segments.tokens_since_start(segment_ids, initial_state)
        return count, count[:, -1] + 1

    def carry(arrays):
        written = call(arrays["segment_ids"], 0)[1]
        return jnp.ones_like(written), written

    return _recurrence(call, arrays, (OF_TOKENS, ("batch",)), carry, {})[0]


def associative_scan(compose, elements, first):
    """The inclusive scan over time of `elements`, arrays [B, T, ...], by an associative `compose(left, right)`.

    `first`: what comes before token 0, [B, ...].
    """
    leaves, structure = jax.tree.flatten(elements)
    axes = [("batch", "time", *(None,) * (leaf.ndim - 2)) for leaf in leaves]
    arrays = {f"x{i}": pair for i, pair in enumerate(zip(leaves, axes, strict=True))}
    firsts = zip(jax.tree.leaves(first), [("batch", *of_x[2:]) for of_x in axes], strict=True)
    arrays |= {f"first{i}": pair for i, pair in enumerate(firsts)}

    def scan(arrays, entering=lambda first, inside: first):
        x, first = (structure.unflatten([arrays[f"{name}{i}"] for i in range(len(axes))]) for name in ("x", "first"))
        inside = jax.lax.associative_scan(compose, x, axis=1)
        return compose(jax.tree.map(lambda x: x[:, None], entering(first, inside)), inside)

    def over_time(scan):
        def entering(first, inside):
            return sequence.before(compose, jax.tree.map(lambda x: x[:, -1], inside), first)

        return lambda arrays: scan(arrays, entering)

    return sharding.on_each_device(scan, arrays, structure.unflatten(axes), over_time=over_time)


def cross_entropy(hidden, head, targets, weights, **options):
    """`kernels.cross_entropy` of hidden [B, T, D] and targets, weights [B, T], with each device's tokens on it.

    The compiler spreads the vocabulary.
    """
    arrays = {
        "hidden": (hidden, ("batch", "time", None)),
        "head": (head, (None, None)),
        "targets": (targets, OF_TOKENS),
        "weights": (weights, OF_TOKENS),
    }

    def call(arrays):
        flat = {name: arrays[name].reshape(-1, *arrays[name].shape[2:]) for name in ("hidden", "targets", "weights")}
        return kernels.cross_entropy(**flat, head=arrays["head"], **options).reshape(arrays["targets"].shape)

    return sharding.on_each_device(call, arrays, OF_TOKENS, over_time=lambda call: call, whole=("tensor",))


def _recurrence(op, arrays, out_axes, carry, options):
    return sharding.on_each_device(
        lambda arrays: op(**arrays, **options),
        arrays,
        out_axes,
        over_time=functools.partial(sequence.carried, carry=carry),
    )


def _matrix_recurrence(op, arrays, out_axes, options):
    """A recurrence of states [B, H, K, V] whose transitions are matrices that its own kernel multiplies: values of zero
    leave A of an initial unit matrix, beside the W that its own values leave of zero."""

    def carry(arrays):
        k, v = arrays["k"], arrays["v"]
        (batch, time, heads, value_dim), key_dim = v.shape, k.shape[3]
        wide = jnp.concatenate([v, jnp.zeros((batch, time, heads, key_dim), v.dtype)], axis=-1)
        initial = jnp.concatenate([jnp.zeros((key_dim, value_dim)), jnp.eye(key_dim)], axis=-1)
        initial = jnp.broadcast_to(initial, (batch, heads, *initial.shape))
        final = op(**arrays | {"v": wide, "initial_state": initial}, **options)[1]
        return final[..., value_dim:], final[..., :value_dim]

    over_time = functools.partial(sequence.carried, carry=carry, apply=jnp.matmul)
    return sharding.on_each_device(lambda arrays: op(**arrays, **options), arrays, out_axes, over_time=over_time)


def _decays(log_decay, time):
    """Its sum over the time, [B, ...], and over what follows each token, [B, T, ...]; a fixed decay is [...]."""
    log_decay = log_decay if jnp.iscomplexobj(log_decay) else log_decay.astype(jnp.float32)
    if log_decay.ndim < 3:
        steps = jnp.arange(time - 1, -1, -1, dtype=jnp.float32).reshape(-1, *(1,) * log_decay.ndim)
        return (time * log_decay)[None], (steps * log_decay)[None]
    following = jnp.concatenate([log_decay[:, 1:], jnp.zeros_like(log_decay[:, :1])], axis=1)
    return jnp.sum(log_decay, axis=1), jax.lax.cumsum(following, axis=1, reverse=True)


def _written(k, decay, v, arrays):
    """sum_t decay_t k_t v_t^T [B, H, K, V] over the last segment's tokens: the state that they leave, from zero."""
    k = _of_last_segment((k * decay).astype(v.dtype), arrays)
    return precision.dot("bthk,bthv->bhkv", k, v, like=v)


def _of_last_segment(x, arrays):
    """x [B, T, ...] at tokens of the last segment, and zero before it."""
    if "segment_ids" not in arrays:
        return x
    numbers = segments.segment_numbers(arrays["segment_ids"])
    return jnp.where((numbers == numbers[:, -1:]).reshape(*numbers.shape, *(1,) * (x.ndim - 2)), x, 0)


def _keys_to_queries(call, *, causal, window):
    """Attention's `over_time`."""

    def run(arrays):
        queries, keys = ({name: arrays[name] for name in names if name in arrays} for names in (OF_QUERIES, OF_KEYS))
        ids, time = arrays.get("q_ids"), arrays["q"].shape[1]
        shards, index = jax.lax.axis_size(sequence.AXIS), jax.lax.axis_index(sequence.AXIS)
        numbers = None if ids is None else sequence.segment_numbers(ids)
        if window is not None and window <= (shards - 1) * time // (1 if causal else 2):
            # Where there is no key at the side there is a zero, of a segment that no query is of.
            keys["q_ids"] = 1 + (jnp.zeros(arrays["q"].shape[:2], jnp.int32) if ids is None else numbers)
            width = -(-(window - 1) // TILE) * TILE if time % TILE == 0 else window - 1
            seen = {name: [sequence.halo(x, width), x] for name, x in keys.items()}
            if not causal:
                seen = {name: [*parts, sequence.halo_after(parts[-1], width)] for name, parts in seen.items()}
            keys = {name: jnp.concatenate(parts, 1) for name, parts in seen.items()}
            return call(keys | queries, q_start=width)

        keys |= {} if ids is None else {"q_ids": numbers}
        keys = {name: sequence.gathered(x) for name, x in keys.items()}
        if not causal or time % 2:
            return call(keys | queries, q_start=index * time)
        half = time // 2
        first = {name: x[:, :half] for name, x in queries.items()}
        second = {name: sequence.mirrored(x[:, half:]) for name, x in queries.items()}
        own = call(keys | first, q_start=index * time)
        others = call(keys | second, q_start=(shards - 1 - index) * time + half)
        return jnp.concatenate([own, sequence.mirrored(others)], axis=1)

    return run
