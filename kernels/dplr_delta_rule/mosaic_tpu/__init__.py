"""The general delta rule as Pallas kernels for TPUs."""

from kernels.dplr_delta_rule.mosaic_tpu.op import mosaic_tpu, use

__all__ = ["mosaic_tpu", "use"]
