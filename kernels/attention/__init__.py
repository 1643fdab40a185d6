"""Softmax attention."""

from kernels.attention.api import attention

__all__ = ["attention"]
