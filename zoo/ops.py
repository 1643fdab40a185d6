"""The kernels as mixers see them: the same calls, put on the mesh in use.

On a mesh of one device, and for the XLA implementations that the compiler partitions by itself, there is nothing
to add. Kernels that need their operands local to a device (Pallas) are wrapped here, with `zoo.sharding`; mixers never
import `kernels`.
"""

import kernels
from kernels import cross_entropy, diagonal_ssm, dispatch, fast_weights, short_conv
from zoo import sharding

__all__ = [
    "attention",
    "cross_entropy",
    "diagonal_ssm",
    "fast_weights",
    "linear_attention",
    "linear_scan",
    "selective_scan",
    "short_conv",
]


def attention(q, k, v, *, segment_ids=None, q_positions=None, kv_positions=None, **options):
    """`kernels.attention`, on TPUs with each device's sequences and heads on it; see there.

    Elsewhere the compiler partitions it, over time too: what runs there is XLA's or cuDNN's.
    """
    pair = isinstance(segment_ids, tuple)
    ids = dict(zip(("q_ids", "kv_ids"), segment_ids if pair else (segment_ids,), strict=False))

    def call(arrays):
        local = tuple(arrays.pop(name) for name in ids if name in arrays)
        local = local if pair else local[0] if local else None
        return kernels.attention(**arrays, segment_ids=local, **options)

    of_tokens = ids | {"q_positions": q_positions, "kv_positions": kv_positions}
    if dispatch.device().platform != "tpu":
        given = {name: array for name, array in of_tokens.items() if array is not None}
        return call({"q": q, "k": k, "v": v} | given)
    groups = k.shape[2]  # a device has the heads of q that read its heads of k, or the only one
    heads = "heads" if groups == 1 or groups % sharding.axis_size("heads") == 0 else None
    of_keys = ("batch", None, None if groups == 1 else heads, None)
    arrays = {"q": (q, ("batch", None, heads, None)), "k": (k, of_keys), "v": (v, of_keys)}
    arrays |= {name: (array, ("batch", None)) for name, array in of_tokens.items()}
    return sharding.on_each_device(call, arrays, ("batch", None, heads, None))


def linear_attention(q, k, v, log_decay=None, *, bonus=None, initial_state=None, segment_ids=None, **options):
    """`kernels.linear_attention`, with each device's sequences and heads on it; see there."""
    groups = q.shape[2]
    # Heads of q and k that several devices' heads of v share are on all of them.
    shared = None if groups == 1 else "heads"
    heads = "heads" if groups == 1 or groups % sharding.axis_size("heads") == 0 else None
    shared = shared and heads
    decay_axes = {0: (), 1: (heads,), 3: ("batch", None, heads), 4: ("batch", None, heads, None)}
    arrays = {
        "q": (q, ("batch", None, shared, None)),
        "k": (k, ("batch", None, shared, None)),
        "v": (v, ("batch", None, heads, None)),
        "log_decay": (log_decay, decay_axes[0 if log_decay is None else log_decay.ndim]),
        "bonus": (bonus, (heads, None)),
        "initial_state": (initial_state, ("batch", heads, None, None)),
        "segment_ids": (segment_ids, ("batch", None)),
    }
    return sharding.on_each_device(
        lambda arrays: kernels.linear_attention(**arrays, **options),
        arrays,
        (("batch", None, heads, None), ("batch", heads, None, None)),
    )


def linear_scan(x, log_decay, *, initial_state=None, segment_ids=None, **options):
    """`kernels.linear_scan`, with each device's sequences and channels on it; see there."""
    channels = ("batch", None, "heads")
    arrays = {
        "x": (x, channels),
        "log_decay": (log_decay, channels if log_decay.ndim == 3 else ("heads",)),
        "initial_state": (initial_state, ("batch", "heads")),
        "segment_ids": (segment_ids, ("batch", None)),
    }
    return sharding.on_each_device(
        lambda arrays: kernels.linear_scan(**arrays, **options), arrays, (channels, ("batch", "heads"))
    )


def selective_scan(x, dt, A, B, C, D=None, *, initial_state=None, segment_ids=None, **options):
    """`kernels.selective_scan`, with each device's sequences and channels on it; see there."""
    arrays = {
        "x": (x, ("batch", None, "heads")),
        "dt": (dt, ("batch", None, "heads")),
        "A": (A, ("heads", None)),
        "B": (B, ("batch", None, None)),
        "C": (C, ("batch", None, None)),
        "D": (D, ("heads",)),
        "initial_state": (initial_state, ("batch", "heads", None)),
        "segment_ids": (segment_ids, ("batch", None)),
    }
    return sharding.on_each_device(
        lambda arrays: kernels.selective_scan(**{"D": None} | arrays, **options),
        arrays,
        (("batch", None, "heads"), ("batch", "heads", None)),
    )
