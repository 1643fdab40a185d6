"""Softmax attention. A device takes the keys that its queries see."""

import functools

import jax
import jax.numpy as jnp

import kernels
from kernels.attention import decay
from zoo import sharding
from zoo.ops.time import associative_scan
from zoo.sharding import sequence

TILE = 128  # tokens of which a TPU's attention kernel takes a multiple
OF_QUERIES, OF_KEYS = ("q", "q_sums"), ("k", "v", "kv_sums")


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
