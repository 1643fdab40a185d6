"""Granite 4 (transformers' `granitemoehybrid`) without experts: Mamba-2 layers, some of attention, an MLP after each.

    model.layers.N.{mamba.*, self_attn.{q,k,v,o}_proj}, .input_layernorm, .post_attention_layernorm,
    .shared_mlp.{input_linear (gate, up), output_linear}

Its four multipliers go into weights: embedding_multiplier into the embedding, logits_scaling (and, with a tied head,
the former) into the last norm, residual_multiplier into what mixers and MLPs put out, attention_multiplier into q. An
export writes them as 1. Refused: experts, several groups of B and C, multipliers below 1e-6 or above 1e6.
"""

from collections.abc import Mapping
from typing import Any

from zoo.config import ModelConfig
from zoo.interop.families import bamba, hybrid, llama, rope
from zoo.interop.families.mamba2 import mixer_rules
from zoo.interop.family import Family, Field, Fields, Only
from zoo.interop.table import Rule, linears, rule, split

BLOCK = llama.BLOCK
MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


def _rules(model: ModelConfig) -> list[Rule]:
    halves = split(model.d_ff, model.d_ff)
    return [
        *llama.ENDS,
        *llama.NORMS,
        *llama.ATTENTION,
        *mixer_rules(model, BLOCK + "mamba.", "mamba2"),
        rule(BLOCK + "shared_mlp.input_linear.weight", ("mlp.gate.kernel", "mlp.up.kernel"), halves),
        *linears(BLOCK + "shared_mlp.", "mlp.", {"output_linear": "down"}),
    ]


def _multiplier(fields: Fields, name: str) -> float:
    value = fields.take(name, 1.0)
    if not 1e-6 <= value <= 1e6:  # NaN too; products of these and weights stay far from the ends of float32
        fields.refuse(name, f"got {value}, expected from 1e-6 to 1e6")
    return value


def _factors(values: Mapping[str, Any], model: ModelConfig) -> dict[str, float]:
    embedding, logits, residual, attention = (_multiplier(Fields(values), name) for name in MULTIPLIERS)
    width = model.attention.head_dim or model.d_model // max(1, model.attention.num_heads)
    return {
        "embed.embedding": embedding,
        "norm.scale": 1 / (logits * (embedding if model.tie_embeddings else 1.0)),
        "mixer.out.kernel": residual,
        "mixer.out.bias": residual,
        "mlp.down.kernel": residual,
        "mixer.q.kernel": attention * width**0.5,
        "mixer.q.bias": attention * width**0.5,
    }


def _read(fields: Fields, found: dict[str, Any]) -> None:
    llama.read_heads(fields, found)
    rope.read(fields, found)
    positions = fields.only("position_embedding_type", None, "rope", "nope")
    found["positions"] = "rope" if positions == "rope" else "none"
    layers = fields.take("layer_types", fields.take("layers_block_type", ["linear_attention"] * found["num_layers"]))
    hybrid.read_layers(fields, found, "layer_types", layers)
    hybrid.read_mamba(fields, found)
    if fields.take("attention_bias", False):
        found["attention.biases"] = "q,k,v,out"
    for name in MULTIPLIERS:
        _multiplier(fields, name)


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    layers = ["full_attention" if type(mixer).__name__ == "Attention" else "linear_attention" for mixer in mixers]
    fields["layer_types"] = layers * (settings["num_layers"] // len(mixers))
    hybrid.write_attention(settings, mixers, fields)
    fields["attention_multiplier"] = fields["head_dim"] ** -0.5
    hybrid.write_mamba(settings, mixers, fields)
    rope.write(settings, fields)
    fields["position_embedding_type"] = "rope" if settings["positions"] == "rope" else None
    fields["attention_bias"] = bool(settings["attention.biases"])


FAMILIES = [
    Family(
        name="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        fields={name: field for name, field in llama.SIZES.items() if name != "intermediate_size"}
        | llama.HEADS
        | bamba.MAMBA_FIELDS
        | {
            "shared_intermediate_size": Field("d_ff", 1024),
            "num_local_experts": Only(0),
            "hidden_act": Only("silu"),
        },
        settings={"mlp": "swiglu", "mamba2.groups": 1},
        rules=_rules,
        factors=_factors,
        read=_read,
        write=_write,
        harmless=(
            *bamba.HARMLESS, "intermediate_size", "num_experts_per_tok", "output_router_logits",
            "router_aux_loss_coef", "normalization_function", "init_method", "mlp_bias",
        ),
        hybrid=("mamba2", "attention"),
        fixed={"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0},
    )
]  # fmt: skip
