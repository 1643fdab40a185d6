"""Mamba-2, a little attention without positions, and MLPs as layers of their own (arXiv:2406.07887).

Of 56 layers 24 are mamba2, 4 attention, 28 mlp: configs/mamba2_hybrid.py:8b. Sizes tiny, 10m, 125m, 340m, 1.3b keep
the shares as nearly as their depths allow, and the parameters of the other architectures.
"""

from zoo.config import Config, preset
from zoo.mixers import MIXERS


def get_config(size: str = "tiny") -> Config:
    config = preset("1.3b" if size == "8b" else size)
    model = config.model
    model.mlp, model.positions = "none", "none"
    if size == "8b":
        mixers = ["mamba2"] * 3 + ["attention"] + ["mamba2"] * 3
        model.num_layers, model.d_model = 56, 4096
        model.mamba2.state_dim, model.mamba2.groups = 128, 8
        model.attention.num_heads, model.attention.num_kv_heads = 32, 8
        model.d_ff = 10_944  # gated: the parameters of the paper's ungated 4 d_model
        model.vocab_size, model.tie_embeddings = 256_000, False
    else:
        mixers = (
            ["mamba2", "attention", "mamba2"]
            if model.num_layers == 3
            else ["mamba2"] * 3 + ["attention"] + ["mamba2"] * 2
        )
        of_mixers = sum(MIXERS[name].num_parameters(getattr(model, name), model.d_model) for name in mixers)
        # What brings a mixer and an MLP to 12 d_model^2 parameters, on average over the pattern.
        model.d_ff = round((12 * model.d_model**2 - of_mixers / len(mixers)) / (3 * model.d_model) / 8) * 8
        model.num_layers *= 2
    model.mixer = ",".join(f"{name},mlp" for name in mixers)
    return config
