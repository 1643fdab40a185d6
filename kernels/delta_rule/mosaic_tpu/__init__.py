"""The delta rule as Pallas kernels for TPUs."""

from kernels.delta_rule.mosaic_tpu.op import mosaic_tpu, use

__all__ = ["mosaic_tpu", "use"]
