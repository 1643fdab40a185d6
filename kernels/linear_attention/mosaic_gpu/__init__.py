"""Linear attention on Hopper GPUs: Pallas kernels, forward and backward. Compiled, but never run on a GPU so far."""

from kernels.linear_attention.mosaic_gpu.op import mosaic_gpu

__all__ = ["mosaic_gpu"]
