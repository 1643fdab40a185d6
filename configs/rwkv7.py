"""RWKV-7 in every layer, with its channel mixing. Sizes: configs/rwkv7.py:tiny, 10m, 125m, 340m, 1.3b."""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer, config.model.mlp = "rwkv7", "channel_mixing_ungated"
    return config
