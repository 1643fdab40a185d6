"""Linformer: softmax attention to a fixed number of mixtures of the keys, both ways, trained on masked tokens.

Sizes: configs/linformer.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "linformer"
    config.model.direction, config.train.objective = "bidirectional", "masked_tokens"
    config.model.linformer.length = config.train.context_length
    config.model.linformer.mixtures = config.train.context_length // 8  # the paper's 256 of 2048
    return config
