"""Gated DeltaProduct in every layer, two steps a token.

Sizes: configs/gated_delta_product.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    config.model.mixer = "gated_delta_product"
    return config
