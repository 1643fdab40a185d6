"""Shape checks of the public ops: what was wrong, with both shapes, before anything is traced."""

from typing import Any


def check_rank(op: str, name: str, array: Any, dims: str) -> None:
    """Raise ValueError unless `array` has one axis for each letter of `dims` ("B T D")."""
    if array.ndim != len(dims.split()):
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {len(dims.split())} axes [{dims}]")


def check_shape(op: str, name: str, array: Any, *expected: tuple[int, ...], like: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `array.shape` is one of `expected`, which follow from `like`, an array of `shape`."""
    if tuple(array.shape) not in expected:
        wanted = " or ".join(str(one) for one in expected)
        raise ValueError(f"{op}: {name} has shape {array.shape}, expected {wanted} beside {like} of shape {shape}")


def check_chunk_size(op: str, chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}, expected at least 1 token")
