"""Linear attention as Pallas kernels for TPUs."""

from kernels.linear_attention.mosaic_tpu.op import mosaic_tpu, use

__all__ = ["mosaic_tpu", "use"]
