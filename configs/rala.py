"""Rank-augmented linear attention, both ways, trained on masked tokens.

Sizes: configs/rala.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "rala"
    config.model.direction, config.train.objective = "bidirectional", "masked_tokens"
    return config
