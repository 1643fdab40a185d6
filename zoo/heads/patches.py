"""Numbers as positions of a model: so many steps of all channels together."""

from kernels.array_typing import Array, Float


def patches(values: Float[Array, "B steps C"], patch: int) -> Float[Array, "B T patch_C"]:
    """[B, T * patch, C] as [B, T, patch * C]."""
    rows, steps, channels = values.shape
    return values.reshape(rows, steps // patch, patch * channels)
