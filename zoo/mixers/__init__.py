"""The registry: a family's name, as `model.mixer` spells it, and its class."""

from zoo.mixers.attention import Attention
from zoo.mixers.base import BIDIRECTIONAL, CAUSAL, DIRECTIONS, Mixer, Sizes
from zoo.mixers.both_ways import BothWays, make_mixer, passes
from zoo.mixers.conv_linear import ConvLinear
from zoo.mixers.delta_net import DeltaNet
from zoo.mixers.dfw import DFW
from zoo.mixers.forgetting_attention import ForgettingAttention
from zoo.mixers.gated_delta_net import GatedDeltaNet
from zoo.mixers.gated_delta_product import GatedDeltaProduct
from zoo.mixers.gated_retention import GatedRetention
from zoo.mixers.gateloop import GateLoop
from zoo.mixers.gla import GLA
from zoo.mixers.h3 import H3
from zoo.mixers.hgrn2 import HGRN2
from zoo.mixers.kda import KDA
from zoo.mixers.lightning import Lightning
from zoo.mixers.linear_attention import LinearAttention
from zoo.mixers.linformer import Linformer
from zoo.mixers.longformer import Longformer
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.mlstm import MLSTM
from zoo.mixers.performer import Performer
from zoo.mixers.rala import RALA
from zoo.mixers.retnet import RetNet
from zoo.mixers.rwkv6 import RWKV6
from zoo.mixers.rwkv7 import RWKV7
from zoo.mixers.s4d import S4D
from zoo.mixers.transnormer import TransNormer

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "forgetting_attention": ForgettingAttention,
    "longformer": Longformer,
    "linformer": Linformer,
    "linear_attention": LinearAttention,
    "performer": Performer,
    "rala": RALA,
    "transnormer": TransNormer,
    "conv_linear": ConvLinear,
    "retnet": RetNet,
    "lightning": Lightning,
    "gated_retention": GatedRetention,
    "mlstm": MLSTM,
    "gla": GLA,
    "hgrn2": HGRN2,
    "rwkv6": RWKV6,
    "gateloop": GateLoop,
    "dfw": DFW,
    "s4d": S4D,
    "h3": H3,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_product": GatedDeltaProduct,
    "kda": KDA,
    "rwkv7": RWKV7,
}

# Those that language models can be made of.
CAUSAL_MIXERS = {name: mixer for name, mixer in MIXERS.items() if CAUSAL in mixer.directions}

__all__ = [
    "BIDIRECTIONAL",
    "CAUSAL",
    "CAUSAL_MIXERS",
    "DIRECTIONS",
    "MIXERS",
    "BothWays",
    "Mixer",
    "Sizes",
    "make_mixer",
    "passes",
]
