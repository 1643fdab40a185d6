"""RetNet (fla's `retnet`): model.layers.N.attn.{q,k,v,g,o}_proj, g_norm_swish_gate; rotary positions of base 10,000.

Refused: grouped keys, feature maps, short convolutions, no output gate.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.family import Field, Fields, Only
from zoo.interop.table import linears, same


def _read(fields: Fields, found: dict[str, Any]) -> None:
    fla.same_heads(fields, found["retnet.num_heads"])


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"] = mixer.heads


FAMILIES = [
    fla.family(
        "retnet",
        "RetNetForCausalLM",
        mixer="retnet",
        fields={
            "num_heads": Field("retnet.num_heads", 8),
            "expand_k": Field("retnet.expand_k", 1.0),
            "expand_v": Field("retnet.expand_v", 2.0),
            "feature_map": Only(None),
            "use_short_conv": Only(False),
            "use_output_gate": Only(True),
            "elementwise_affine": Only(True),
        },
        settings={"retnet.rope_base": 10_000.0},
        rules=[
            *fla.AROUND,
            *linears(fla.MIXER, "mixer.", fla.QKV | {"g_proj": "output_gate"}),
            *same(fla.MIXER, "mixer.", {"g_norm_swish_gate.weight": "norm.scale"}),
        ],
        read=_read,
        write=_write,
        width=lambda d, ratio: fla.mlp_width(d, 2 if ratio is None else ratio),
        renamed={r"attn\.g_norm\.": "attn.g_norm_swish_gate."},
    )
]
