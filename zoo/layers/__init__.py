"""What mixers and the model share: projections, norms, rotary, token shift, MLPs, dropout."""

from zoo.layers.dropout import dropout
from zoo.layers.linear import embedding, linear
from zoo.layers.mlp import MLPS, ChannelMixing, SwiGLU
from zoo.layers.norm import HeadLayerNorm, rms_norm
from zoo.layers.rotary import rotary
from zoo.layers.token_shift import token_shift

__all__ = [
    "MLPS",
    "ChannelMixing",
    "HeadLayerNorm",
    "SwiGLU",
    "dropout",
    "embedding",
    "linear",
    "rms_norm",
    "rotary",
    "token_shift",
]
