"""The registry: a family's name, as `model.mixer` spells it, and its class. A folder holds those of one recurrence."""

from zoo.mixers.base import BIDIRECTIONAL, CAUSAL, DIRECTIONS, Mixer, Sizes
from zoo.mixers.both_ways import BothWays, make_mixer, passes
from zoo.mixers.delta.delta_net import DeltaNet
from zoo.mixers.delta.gated_delta_net import GatedDeltaNet
from zoo.mixers.delta.gated_delta_product import GatedDeltaProduct
from zoo.mixers.delta.kda import KDA
from zoo.mixers.delta.rwkv7 import RWKV7
from zoo.mixers.linear.conv_linear import ConvLinear
from zoo.mixers.linear.dfw import DFW
from zoo.mixers.linear.gated_retention import GatedRetention
from zoo.mixers.linear.gateloop import GateLoop
from zoo.mixers.linear.gla import GLA
from zoo.mixers.linear.hgrn2 import HGRN2
from zoo.mixers.linear.lightning import Lightning
from zoo.mixers.linear.linear_attention import LinearAttention
from zoo.mixers.linear.mlstm import MLSTM
from zoo.mixers.linear.performer import Performer
from zoo.mixers.linear.rala import RALA
from zoo.mixers.linear.retnet import RetNet
from zoo.mixers.linear.rwkv6 import RWKV6
from zoo.mixers.linear.transnormer import TransNormer
from zoo.mixers.softmax.attention import Attention
from zoo.mixers.softmax.forgetting_attention import ForgettingAttention
from zoo.mixers.softmax.linformer import Linformer
from zoo.mixers.softmax.longformer import Longformer
from zoo.mixers.state_space.h3 import H3
from zoo.mixers.state_space.mamba import Mamba
from zoo.mixers.state_space.mamba2 import Mamba2
from zoo.mixers.state_space.s4d import S4D

MIXERS: dict[str, type[Mixer]] = {
    # softmax: keep all
    "attention": Attention,
    "forgetting_attention": ForgettingAttention,
    "longformer": Longformer,
    "linformer": Linformer,
    # linear: add and forget
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
    # delta: correct
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_product": GatedDeltaProduct,
    "kda": KDA,
    "rwkv7": RWKV7,
    # state_space: filter
    "s4d": S4D,
    "h3": H3,
    "mamba": Mamba,
    "mamba2": Mamba2,
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
