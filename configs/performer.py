"""Performer in every layer. Sizes: configs/performer.py:tiny, 10m, 125m, 340m, 1.3b."""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "performer"
    return config
