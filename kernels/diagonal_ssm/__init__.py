"""Time-invariant diagonal state-space model."""

from kernels.diagonal_ssm.api import diagonal_ssm, diagonal_ssm_step

__all__ = ["diagonal_ssm", "diagonal_ssm_step"]
