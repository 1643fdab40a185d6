"""H3 with two layers of softmax attention, the second and the one after the middle (arXiv:2212.14052; tiny has one).

Sizes: configs/h3_hybrid.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    layers = config.model.num_layers
    unit = layers // 2 if layers % 2 == 0 else layers  # the pattern stands twice where the depth is even
    config.model.mixer = ",".join("attention" if i == 1 else "h3" for i in range(unit))
    return config
