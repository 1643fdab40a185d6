"""GLA (fla's `gla`): model.layers.N.attn.{q,k,v,g,o}_proj, gk_proj.0, gk_proj.1, g_norm_swish_gate.

Its gates have rank 16 and temperature 16. Refused: grouped keys, feature maps, short convolutions, no output gate.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.family import Field, Fields, Only
from zoo.interop.table import linears, same


def _read(fields: Fields, found: dict[str, Any]) -> None:
    fla.same_heads(fields, found["gla.num_heads"])


FAMILIES = [
    fla.family(
        "gla",
        "GLAForCausalLM",
        mixer="gla",
        fields={
            "num_heads": Field("gla.num_heads", 4),
            "expand_k": Field("gla.expand_k", 0.5),
            "expand_v": Field("gla.expand_v", 1.0),
            "feature_map": Only(None),
            "clamp_min": Only(None),
            "use_short_conv": Only(False),
            "use_output_gate": Only(True),
            "elementwise_affine": Only(True),
            "use_gk": Only(True),
            "use_gv": Only(False),
        },
        settings={"gla.gate": "key", "gla.gate_rank": 16, "gla.gate_temperature": 16.0},
        rules=[
            *fla.AROUND,
            *linears(fla.MIXER, "mixer.", fla.QKV | {"g_proj": "output_gate", "gk_proj.0": "gate_down"}),
            *linears(fla.MIXER, "mixer.", {"gk_proj.1": "gate_up"}),
            *same(fla.MIXER, "mixer.", {"g_norm_swish_gate.weight": "norm.scale"}),
        ],
        read=_read,
        renamed={r"attn\.g_norm\.": "attn.g_norm_swish_gate."},  # without fused kernels
    )
]
