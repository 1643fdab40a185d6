"""Convolutions of growing dilation, each before linear attention: 1, 2 and 4 tokens between taps, in turn.

Sizes: configs/conv_linear.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "conv_linear@dilation=1,conv_linear@dilation=2,conv_linear@dilation=4"
    return config
