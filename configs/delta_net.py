"""DeltaNet in every layer. Sizes: configs/delta_net.py:tiny, 10m, 125m, 340m, 1.3b."""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "delta_net"
    return config
