"""Recurrences: each says what a part of a sequence does to the state, its `carry` (see `zoo.sharding.sequence`)."""

import functools

import jax
import jax.numpy as jnp

import kernels
from kernels import precision, segments
from zoo import sharding, taken
from zoo.ops.axes import OF_CHANNELS, OF_TOKENS
from zoo.ops.time import previous, reversed_time
from zoo.sharding import sequence
from zoo.taken import Segments, state_of_taken


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

    return recurrence(
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
    return recurrence(kernels.fast_weights, arrays, out_axes, carry, options)


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

    return recurrence(kernels.linear_scan, arrays, (OF_CHANNELS, ("batch", "heads")), carry, options)


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

    return recurrence(kernels.selective_scan, arrays, (OF_CHANNELS, ("batch", "heads", None)), carry, options)


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

    return recurrence(kernels.diagonal_ssm, arrays, (OF_CHANNELS, ("batch", "heads", None)), carry, options)


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


def recurrence(op, arrays, out_axes, carry, options):
    return sharding.on_each_device(
        lambda arrays: op(**arrays, **options),
        arrays,
        out_axes,
        over_time=functools.partial(sequence.carried, carry=carry),
    )
