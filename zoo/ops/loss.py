"""The loss of tokens."""

import kernels
from zoo import sharding
from zoo.ops.axes import OF_TOKENS


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
