"""What mixers and the model share: projections, norms, rotary, token shift, MLPs, dropout, soft caps, segments."""

from kernels.segments import segment_numbers
from kernels.softcap import soft_cap
from zoo.layers import random_features, ring
from zoo.layers.diagonal_ssm import DiagonalSSM, DiagonalSSMConfig
from zoo.layers.dilated_conv import DilatedConv
from zoo.layers.dropout import dropout
from zoo.layers.in_pieces import in_pieces
from zoo.layers.linear import embedding, linear
from zoo.layers.mlp import GELU, MLPS, ChannelMixing, SwiGLU
from zoo.layers.norm import NORM_PARAMETERS, NORMS, GatedRMSNorm, HeadLayerNorm, gated, rms_norm, unit_length
from zoo.layers.parameter import parameter, with_axes
from zoo.layers.qkv import ConvolvedQKV
from zoo.layers.random_features import exp_features, relu_features
from zoo.layers.rotary import RopeScaling, rotary
from zoo.layers.rounded_once import rounded_once
from zoo.layers.short_conv import ShortConv
from zoo.layers.step_size import check_steps, step_size_bias
from zoo.layers.token_shift import mixture, token_shift

__all__ = [
    "GELU",
    "MLPS",
    "NORMS",
    "NORM_PARAMETERS",
    "ChannelMixing",
    "ConvolvedQKV",
    "DiagonalSSM",
    "DiagonalSSMConfig",
    "DilatedConv",
    "GatedRMSNorm",
    "HeadLayerNorm",
    "RopeScaling",
    "ShortConv",
    "SwiGLU",
    "check_steps",
    "dropout",
    "embedding",
    "exp_features",
    "gated",
    "in_pieces",
    "linear",
    "mixture",
    "parameter",
    "random_features",
    "relu_features",
    "ring",
    "rms_norm",
    "rotary",
    "rounded_once",
    "segment_numbers",
    "soft_cap",
    "step_size_bias",
    "token_shift",
    "unit_length",
    "with_axes",
]
