"""The selective scan as Pallas kernels for TPUs."""

from kernels.selective_scan.mosaic_tpu.op import mosaic_tpu, use

__all__ = ["mosaic_tpu", "use"]
