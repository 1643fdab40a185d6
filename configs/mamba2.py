"""Mamba-2 in every layer, each with an MLP (the paper's own stack is `--config.model.mlp=none` at twice the depth).

Sizes: configs/mamba2.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "mamba2"
    return config
