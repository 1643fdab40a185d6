"""The kernels as mixers see them: the same calls, put on the mesh in use.

On a mesh of one device, and for the XLA implementations that the compiler partitions by itself, there is nothing
to add. Kernels that need their operands local to a device (Pallas) are wrapped here, with `zoo.sharding`; mixers never
import `kernels`.
"""

import kernels
from kernels import attention, cross_entropy, diagonal_ssm, fast_weights, short_conv
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
