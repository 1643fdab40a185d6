"""What mixers and the model share: projections, norms, rotary, MLPs, dropout."""

from zoo.layers.dropout import dropout
from zoo.layers.linear import embedding, linear
from zoo.layers.mlp import MLPS, SwiGLU
from zoo.layers.norm import rms_norm
from zoo.layers.rotary import rotary

__all__ = ["MLPS", "SwiGLU", "dropout", "embedding", "linear", "rms_norm", "rotary"]
