"""The registry: a family's name, as `model.mixer` spells it, and its class."""

from zoo.mixers.attention import Attention
from zoo.mixers.base import Mixer, Sizes
from zoo.mixers.gla import GLA
from zoo.mixers.h3 import H3
from zoo.mixers.linear_attention import LinearAttention
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.retnet import RetNet
from zoo.mixers.s4d import S4D

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "gla": GLA,
    "s4d": S4D,
    "h3": H3,
    "mamba": Mamba,
    "mamba2": Mamba2,
}

__all__ = ["MIXERS", "Mixer", "Sizes"]
