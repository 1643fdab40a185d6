"""DeltaNet (fla's `delta_net`): model.layers.N.attn.{q,k,v,b,o}_proj, {q,k,v}_conv1d, o_norm, and g_proj with a gate.

Refused: other norms and activations of q and k, no convolutions, no beta.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.family import Field, Fields, Only
from zoo.interop.table import linears, same

QKV = {"q_proj": "qkv.q", "k_proj": "qkv.k", "v_proj": "qkv.v", "o_proj": "out", "b_proj": "beta"}


def _read(fields: Fields, found: dict[str, Any]) -> None:
    found["delta_net.beta_max"] = 2.0 if fields.take("allow_neg_eigval", False) else 1.0


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"] = mixer.heads
    fields["allow_neg_eigval"] = mixer.beta_max == 2.0


FAMILIES = [
    fla.family(
        "delta_net",
        "DeltaNetForCausalLM",
        mixer="delta_net",
        fields={
            "num_heads": Field("delta_net.num_heads", 16),
            "expand_k": Field("delta_net.expand_k", 1.0),
            "expand_v": Field("delta_net.expand_v", 1.0),
            "use_gate": Field("delta_net.output_gate", False),
            "conv_size": Field("delta_net.conv_width", 4),
            "use_short_conv": Only(True),
            "use_beta": Only(True),
            "use_output_norm": Only(True),
            "qk_norm": Only("l2"),
            "qk_activation": Only("silu"),
        },
        settings={},
        rules=[
            *fla.AROUND,
            *linears(fla.MIXER, "mixer.", QKV | {"g_proj": "output_gate"}),
            *fla.CONVOLUTIONS,
            *same(fla.MIXER, "mixer.", {"o_norm.weight": "norm.scale"}),
        ],
        read=_read,
        write=_write,
    )
]
