"""Hopper GPUs that are not there: ahead-of-time compilation."""

import pathlib

import jax
import pytest
from jax.experimental import topologies

TARGET = pathlib.Path(__file__).with_name("h200.txtpb")  # what the compiler asks a GPU for


def h200() -> jax.Device:
    """An H200 to compile for; skips the test where jax's CUDA plugin is not installed."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin and ptxas: make test-gpu-compile")
    options = {"target_config": TARGET.read_text(), "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="h200", **options).devices[0]
