"""Based: linear attention by the Taylor map of exp and softmax in small windows, in turn (arXiv:2402.18668).

Keys of the linear layers have 16 entries, 153 features; windows are of 64 tokens. Of 3 layers the first and the last
are linear. Sizes: configs/based.py:tiny, 10m, 125m, 340m, 1.3b.
"""

from zoo.config import Config, preset

LINEAR, WINDOW = "linear_attention@feature_map=taylor2@key_width=16", "attention@window=64"


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    layers = [LINEAR, WINDOW, LINEAR] if config.model.num_layers == 3 else [LINEAR, WINDOW]
    config.model.mixer = ",".join(layers)
    return config
