"""Linear attention (fla's `linear_attn`): model.layers.N.attn.{q,k,v,o}_proj, norm.

What is read passes a norm per head. Refused: a normaliser before that norm, feature maps that are learnt, grouped keys.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.family import Field, Fields, Only
from zoo.interop.table import linears, same
from zoo.settings import shown

MAPS = {"elu": "elu1", "relu": "relu", "identity": "identity"}


def _read(fields: Fields, found: dict[str, Any]) -> None:
    heads = found["linear_attention.num_heads"]
    fla.same_heads(fields, heads)
    name = fields.take("feature_map", "elementwise_product")
    if name not in MAPS:
        fields.refuse("feature_map", f"{shown(name)}, of which only {', '.join(MAPS)} can be expressed")
    found["linear_attention.feature_map"] = MAPS.get(name, "elu1")
    found["linear_attention.key_width"] = int(fields.take("expand_k", 1.0) * found["d_model"]) // heads


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    there = {ours: theirs for theirs, ours in MAPS.items()}
    fields["feature_map"] = there.get(mixer.feature_map, mixer.feature_map)
    fields["num_heads"] = mixer.heads
    fields["expand_k"] = mixer.key_width * mixer.heads / settings["d_model"]


FAMILIES = [
    fla.family(
        "linear_attn",
        "LinearAttentionForCausalLM",
        mixer="linear_attention",
        fields={
            "num_heads": Field("linear_attention.num_heads", 4),
            "expand_v": Only(1.0, 1),
            "norm_q": Only(False),
            "norm_k": Only(False),
            "norm_feature_map": Only(False),
            "elementwise_affine": Only(True),
        },
        settings={"linear_attention.normalise": False},
        rules=[
            *fla.AROUND,
            *linears(fla.MIXER, "mixer.", fla.QKV),
            *same(fla.MIXER, "mixer.", {"norm.weight": "norm.scale"}),
        ],
        read=_read,
        write=_write,
        harmless=("tie_feature_map_qk",),
    )
]
