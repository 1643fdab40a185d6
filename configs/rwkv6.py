"""RWKV-6 in every layer, with its channel mixing. Sizes: configs/rwkv6.py:tiny, 10m, 125m, 340m, 1.3b."""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer, config.model.mlp = "rwkv6", "channel_mixing"
    return config
