"""Cross entropy of a language model's head."""

from kernels.cross_entropy.api import cross_entropy

__all__ = ["cross_entropy"]
