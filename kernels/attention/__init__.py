"""Softmax attention."""

from kernels.attention.api import attention, attention_step
from kernels.attention.decay import sums

__all__ = ["attention", "attention_step", "sums"]
