"""Hopper GPUs that are not there, to compile for."""

import jax
import pytest

from zoo.training import topology


def h200() -> jax.Device:
    """An H200; skips the test where jax's CUDA plugin is not installed."""
    return h200s(1)[0]


def h200s(count: int) -> list[jax.Device]:
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin and ptxas: make test-gpu-compile")
    return topology.devices(f"h200:{count}")
