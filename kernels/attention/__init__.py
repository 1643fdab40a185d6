"""Softmax attention."""

from kernels.attention.api import attention
from kernels.attention.decay import sums

__all__ = ["attention", "sums"]
