"""RWKV-7 (fla's `rwkv7`, fla-hub/rwkv7-*): time and channel mixing, LayerNorms with a bias, one on the embedding.

    model.layers.N.attn.{x_r .. x_g, r_proj, k_proj, v_proj, {w,a,v,g}_lora, k_k, k_a, r_k, g_norm, o_proj},
    .ffn.{x_k, key, value}, .attn_norm, .ffn_norm; model.layers.0.pre_norm

The first layer has no v_lora: its values are those that others are drawn to, and ours, 0 there, change nothing.
Refused: values wider than the model, norms without a bias.
"""

from typing import Any

import numpy as np

from zoo.interop.families import fla
from zoo.interop.families.rwkv6 import AROUND, FFN, FIELDS
from zoo.interop.family import Field, Fields
from zoo.interop.table import TRANSPOSED, Transform, linears, rule, same
from zoo.mixers.delta.rwkv7 import MIXTURES
from zoo.settings import shown

NARROW = {"w": "decay", "a": "rate", "v": "value", "g": "gate"}
MIX = Transform(
    lambda *xs: (np.concatenate([x.reshape(1, -1) for x in xs]),), lambda x: tuple(row.reshape(1, 1, -1) for row in x)
)


def _lora(x: str) -> list:
    lora, ours, absent = f"{fla.MIXER}{x}_lora.lora.", f"mixer.{NARROW[x]}", (0,) if x == "v" else ()
    bias = [] if x == "g" else [rule(lora + "2.bias", f"{ours}_bias", absent=absent)]
    return [
        rule(lora + "0.weight", f"{ours}_down.kernel", TRANSPOSED, absent=absent),
        rule(lora + "2.weight", f"{ours}_up.kernel", TRANSPOSED, absent=absent),
        *bias,
    ]


def _read(fields: Fields, found: dict[str, Any]) -> None:
    width, head_dim = found["d_model"], fields.take("head_dim", 64)
    heads = fields.take("num_heads", width // max(1, head_dim))
    if heads * head_dim != width:
        fields.refuse("head_dim", f"{heads} heads of {head_dim} are not hidden_size = {width}")
    found["rwkv7.num_heads"] = max(1, heads)
    values = fields.take("value_dim", width, (int, list))
    if set(values if isinstance(values, list) else [values]) != {width}:
        fields.refuse("value_dim", f"{shown(values)}, of which only hidden_size = {width} can be expressed")


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"], fields["head_dim"] = mixer.heads, mixer.width
    fields["value_dim"] = [settings["d_model"]] * settings["num_layers"]
    ranks = {"decay": "decay", "a": "rate", "v": "value", "gate": "gate"}
    for theirs, ours in ranks.items():
        fields[f"{theirs}_low_rank_dim"] = getattr(mixer, f"{ours}_down").out_features


FAMILIES = [
    fla.family(
        "rwkv7",
        "RWKV7ForCausalLM",
        mixer="rwkv7",
        has_attention=False,
        fields=FIELDS
        | {
            "norm_eps": Field("norm_epsilon", 1e-5),
            "decay_low_rank_dim": Field("rwkv7.decay_rank", 64),
            "a_low_rank_dim": Field("rwkv7.rate_rank", 64),
            "v_low_rank_dim": Field("rwkv7.value_rank", 16),
            "gate_low_rank_dim": Field("rwkv7.gate_rank", 128),
        },
        settings={"mlp": "channel_mixing_ungated", "norm": "layer_norm"},
        rules=[
            *AROUND,
            *linears(fla.MIXER, "mixer.", {f"{x}_proj": x for x in "rkv"} | {"o_proj": "out"}),
            rule([f"{fla.MIXER}x_{z}" for z in MIXTURES], "mixer.mix", MIX),
            *(one for x in NARROW for one in _lora(x)),
            *same(fla.MIXER, "mixer.", {"k_k": "correction_scale", "k_a": "key_rate", "r_k": "bonus"}),
            *fla.layer_norm(fla.MIXER + "g_norm.", "mixer.norm."),
            *linears(FFN, "mlp.", {"key": "key", "value": "value"}),
            *same(FFN, "mlp.", {"x_k": "key_mix"}),
        ],
        read=_read,
        write=_write,
        width=lambda d, ratio: -(-int(d * (4 if ratio is None else ratio)) // 32) * 32,
    )
]
