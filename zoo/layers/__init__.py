"""What mixers and the model share: projections, norms, rotary, MLPs, dropout."""

from zoo.layers.diagonal_ssm import DiagonalSSM, DiagonalSSMConfig
from zoo.layers.dropout import dropout
from zoo.layers.linear import embedding, linear
from zoo.layers.mlp import MLPS, SwiGLU
from zoo.layers.norm import GatedRMSNorm, rms_norm
from zoo.layers.rotary import rotary
from zoo.layers.short_conv import ShortConv
from zoo.layers.step_size import step_size_bias

__all__ = [
    "MLPS",
    "DiagonalSSM",
    "DiagonalSSMConfig",
    "GatedRMSNorm",
    "ShortConv",
    "SwiGLU",
    "dropout",
    "embedding",
    "linear",
    "rms_norm",
    "rotary",
    "step_size_bias",
]
