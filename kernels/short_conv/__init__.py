"""Short causal depthwise convolution."""

from kernels.short_conv.api import short_conv, short_conv_step

__all__ = ["short_conv", "short_conv_step"]
