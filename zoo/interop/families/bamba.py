"""Bamba (transformers' `bamba`): Mamba-2 layers, some of attention, an MLP after each.

    model.layers.N.{mamba.*, self_attn.{q,k,v,o}_proj}, .input_layernorm, .pre_ff_layernorm, .feed_forward.*

Half of each head turns. Refused: several groups of B and C, whose norm there is over all of them.
"""

from typing import Any

from zoo.config import ModelConfig
from zoo.interop.families import hybrid, llama, rope
from zoo.interop.families.mamba2 import mixer_rules
from zoo.interop.family import Family, Field, Fields, Only
from zoo.interop.table import Rule, linears, rule, same

BLOCK = "model.layers.{N}."
MAMBA_FIELDS = {
    "mamba_d_state": Field("mamba2.state_dim", 256),
    "mamba_d_conv": Field("mamba2.conv_width", 4),
    "mamba_n_groups": Only(1),
    "mamba_conv_bias": Only(True),
}
HARMLESS = ("mamba_chunk_size", "z_loss_coefficient")


def _rules(model: ModelConfig) -> list[Rule]:
    norms = {"input_layernorm.weight": "mixer_norm.scale", "pre_ff_layernorm.weight": "mlp_norm.scale"}
    mlp = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return [
        *llama.ENDS[::2],
        rule("model.final_layernorm.weight", "norm.scale"),
        *same(BLOCK, "", norms),
        *llama.ATTENTION,
        *mixer_rules(model, BLOCK + "mamba.", "mamba2"),
        *linears(BLOCK + "feed_forward.", "mlp.", mlp),
    ]


def _read(fields: Fields, found: dict[str, Any]) -> None:
    llama.read_heads(fields, found)
    rope.read(fields, found, fraction=0.5)
    places = fields.take("attn_layer_indices", [])
    layers = ["full_attention" if i in places else "linear_attention" for i in range(found["num_layers"])]
    hybrid.read_layers(fields, found, "attn_layer_indices", layers)
    hybrid.read_mamba(fields, found)
    if fields.take("attention_bias", False):
        found["attention.biases"] = "q,k,v,out"
    found["mlp_bias"] = fields.take("mlp_bias", False)


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    layers = [type(mixer).__name__ for mixer in mixers] * (settings["num_layers"] // len(mixers))
    fields["attn_layer_indices"] = [i for i, name in enumerate(layers) if name == "Attention"]
    hybrid.write_attention(settings, mixers, fields)
    hybrid.write_mamba(settings, mixers, fields)
    rope.write(settings, fields)
    fields["attention_bias"], fields["mlp_bias"] = bool(settings["attention.biases"]), settings["mlp_bias"]


FAMILIES = [
    Family(
        name="bamba",
        architecture="BambaForCausalLM",
        fields=llama.SIZES
        | llama.HEADS
        | MAMBA_FIELDS
        | {
            "vocab_size": Field("vocab_size", 128000),
            "intermediate_size": Field("d_ff", 14336),
            "num_key_value_heads": Field("attention.num_kv_heads", 8),
            "rms_norm_eps": Field("norm_epsilon", 1e-5),
            "hidden_act": Only("silu"),
        },
        settings={"mlp": "swiglu", "positions": "rope", "mamba2.groups": 1},
        rules=_rules,
        read=_read,
        write=_write,
        harmless=(*HARMLESS, "layer_types"),
        hybrid=("mamba2", "attention"),
    )
]
