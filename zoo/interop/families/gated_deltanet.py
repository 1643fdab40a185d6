"""Gated DeltaNet (fla's `gated_deltanet`): as DeltaNet, and model.layers.N.attn.{a,g}_proj, A_log, dt_bias.

Refused: no output gate, another activation of it, no convolutions.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.families.delta_net import QKV
from zoo.interop.family import Field, Fields, Only, ratio
from zoo.interop.table import linears, same


def _read(fields: Fields, found: dict[str, Any]) -> None:
    heads, width, d = found["gated_delta_net.num_heads"], fields.take("head_dim", 256), found["d_model"]
    v_heads = fields.take("num_v_heads", heads)
    found["gated_delta_net.num_v_heads"] = v_heads
    found["gated_delta_net.expand_k"] = ratio(heads * width, d)
    found["gated_delta_net.expand_v"] = ratio(v_heads * int(width * fields.take("expand_v", 2.0)), d)
    found["gated_delta_net.beta_max"] = 2.0 if fields.take("allow_neg_eigval", False) else 1.0


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"], fields["num_v_heads"], fields["head_dim"] = mixer.key_heads, mixer.heads, mixer.key_width
    fields["expand_v"] = mixer.value_width / mixer.key_width
    fields["allow_neg_eigval"] = mixer.beta_max == 2.0


FAMILIES = [
    fla.family(
        "gated_deltanet",
        "GatedDeltaNetForCausalLM",
        mixer="gated_delta_net",
        fields={
            "num_hidden_layers": Field("num_layers", 21),
            "num_heads": Field("gated_delta_net.num_heads", 6),
            "conv_size": Field("gated_delta_net.conv_width", 4),
            "use_gate": Only(True),
            "use_short_conv": Only(True),
            "output_gate_activation": Only("swish", "silu"),
        },
        settings={},
        rules=[
            *fla.AROUND,
            *linears(fla.MIXER, "mixer.", QKV | {"a_proj": "decay", "g_proj": "output_gate"}),
            *fla.CONVOLUTIONS,
            *same(fla.MIXER, "mixer.", {"o_norm.weight": "norm.scale", "A_log": "A_log", "dt_bias": "decay_bias"}),
        ],
        read=_read,
        write=_write,
    )
]
