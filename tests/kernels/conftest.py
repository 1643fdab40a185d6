"""Kernels of Hopper GPUs are interpreted on a CPU here."""

import pytest

from kernels import mosaic_gpu


@pytest.fixture(autouse=True)
def interpreted():
    with mosaic_gpu.use_interpret(mosaic_gpu.InterpretGPUParams()):
        yield
