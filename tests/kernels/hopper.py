"""Hopper GPUs that are not there, to compile for."""

import re

import jax
import pytest

from tests.kernels.tpu import compile_for_tpu as compile_without_cache
from zoo.training import topology


def h200() -> jax.Device:
    """An H200; skips the test where jax's CUDA plugin is not installed."""
    return h200s(1)[0]


def h200s(count: int) -> list[jax.Device]:
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin and ptxas: make test-gpu-compile")
    return topology.devices(f"h200:{count}")


def compiled_kernels(traced: jax.stages.Traced, monkeypatch, capfd) -> set[str]:
    """Compiles a call, prints the registers of a thread of each kernel, and returns their names: none spills, and all
    have wgmma instructions."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    capfd.readouterr()
    compile_without_cache(traced.lower(lowering_platforms=("cuda",)))
    printed = "".join(capfd.readouterr())
    reports = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) reg", printed, re.S)
    with capfd.disabled():
        for kernel, spilled, registers in reports:
            print(f"\n{kernel}: {registers} registers, {spilled} bytes spilled", end="")
    assert all(spilled == "0" for _, spilled, _ in reports), reports
    entries = printed.split(".entry ")[1:]
    assert len(entries) == len(reports) and all("wgmma.mma_async" in entry for entry in entries)
    return {kernel for kernel, _, _ in reports}
