"""Kimi Delta Attention (fla's `kda`): as Gated DeltaNet, with a decay of each entry of a key, and low ranks.

    model.layers.N.attn.{q,k,v,b,o}_proj, f_proj.0, f_proj.1, g_proj.0, g_proj.1, A_log, dt_bias, {q,k,v}_conv1d, o_norm

Refused: more heads of values than of keys, a bounded gate, no convolutions.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.families.delta_net import QKV
from zoo.interop.family import Field, Fields, Only, ratio
from zoo.interop.table import linears, same

GATES = {"f_proj.0": "decay_down", "f_proj.1": "decay_up", "g_proj.0": "gate_down", "g_proj.1": "gate_up"}


def _read(fields: Fields, found: dict[str, Any]) -> None:
    heads, width, d = found["kda.num_heads"], fields.take("head_dim", 128), found["d_model"]
    if fields.take("num_v_heads", heads) != heads:
        fields.refuse("num_v_heads", f"{fields.values['num_v_heads']} for {heads} heads of keys cannot be expressed")
    found["kda.expand_k"] = ratio(heads * width, d)
    found["kda.expand_v"] = ratio(heads * int(width * fields.take("expand_v", 1.0)), d)
    found["kda.beta_max"] = 2.0 if fields.take("allow_neg_eigval", False) else 1.0


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"], fields["head_dim"] = mixer.heads, mixer.key_width
    fields["expand_v"] = mixer.value_width / mixer.key_width
    fields["allow_neg_eigval"] = mixer.beta_max == 2.0


FAMILIES = [
    fla.family(
        "kda",
        "KDAForCausalLM",
        mixer="kda",
        fields={
            "num_heads": Field("kda.num_heads", 16),
            "conv_size": Field("kda.conv_width", 4),
            "use_short_conv": Only(True),
            "safe_gate": Only(False),
            "lower_bound": Only(None),
        },
        settings={},
        rules=[
            *fla.AROUND,
            *linears(fla.MIXER, "mixer.", QKV | GATES),
            *fla.CONVOLUTIONS,
            *same(fla.MIXER, "mixer.", {"o_norm.weight": "norm.scale", "A_log": "A_log", "dt_bias": "decay_bias"}),
        ],
        read=_read,
        write=_write,
    )
]
