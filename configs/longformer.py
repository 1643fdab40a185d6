"""Windows of 64, 128 and 256 tokens in turn; of the widest, half of the heads see every other token, 512 back.

Sizes: configs/longformer.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "longformer@window=64,longformer@window=128,longformer@window=256@dilation=1+2"
    return config
