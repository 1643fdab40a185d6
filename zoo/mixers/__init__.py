"""The registry: a family's name, as `model.mixer` spells it, and its class."""

from zoo.mixers.attention import Attention
from zoo.mixers.base import Mixer, Sizes
from zoo.mixers.gla import GLA
from zoo.mixers.linear_attention import LinearAttention
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.retnet import RetNet

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "gla": GLA,
    "mamba": Mamba,
    "mamba2": Mamba2,
}

__all__ = ["MIXERS", "Mixer", "Sizes"]
