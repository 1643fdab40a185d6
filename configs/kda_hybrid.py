"""Three layers of Kimi Delta Attention, then one of softmax attention without positions, as Kimi Linear has them.

The recurrences tell the order; attention looks up by content alone. Sizes: configs/kda_hybrid.py:125m, 340m, 1.3b; tiny
and 10m are one layer of attention after two.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    model = config.model
    model.mixer = ",".join(["kda"] * (2 if model.num_layers % 4 else 3) + ["attention"])
    model.positions = "none"
    return config
