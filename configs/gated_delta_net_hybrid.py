"""Three layers of Gated DeltaNet, then one of gated softmax attention with norms on q and k, as Qwen3-Next has them.

Sizes: configs/gated_delta_net_hybrid.py:125m, 340m, 1.3b; tiny and 10m are one layer of attention after two.
"""

from zoo.config import Config, preset


def get_config(size: str = "tiny") -> Config:
    config = preset(size)
    model = config.model
    model.mixer = ",".join(["gated_delta_net"] * (2 if model.num_layers % 4 else 3) + ["attention"])
    model.attention.qk_norm = model.attention.output_gate = True
    return config
