"""Gated DeltaNet in every layer. Sizes: configs/gated_delta_net.py:tiny, 10m, 125m, 340m, 1.3b."""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "gated_delta_net"
    return config
