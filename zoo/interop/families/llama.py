"""Llama and what is built as it is (transformers: llama, mistral, phi3; qwen.py has qwen2 and qwen3).

    model.layers.N.input_layernorm, .self_attn.{q,k,v,o}_proj, .post_attention_layernorm, .mlp.{gate,up,down}_proj

Phi-3 has q, k, v in one matrix, and gate and up.
Refused: experts, layers that differ in their window, other activations.
"""

import dataclasses
from typing import Any

from zoo.config import ModelConfig
from zoo.interop.families import rope
from zoo.interop.family import Family, Field, Fields, Only
from zoo.interop.table import TRANSPOSED, linears, rule, same, split
from zoo.settings import shown

BLOCK = "model.layers.{N}."
ENDS = [
    rule("model.embed_tokens.weight", "embed.embedding"),
    rule("model.norm.weight", "norm.scale"),
    rule("lm_head.weight", "head.kernel", TRANSPOSED),
]
NORMS = same(
    BLOCK, "", {"input_layernorm.weight": "mixer_norm.scale", "post_attention_layernorm.weight": "mlp_norm.scale"}
)
ATTENTION = linears(
    BLOCK + "self_attn.", "mixer.", {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}, "attention"
) + same(
    BLOCK + "self_attn.", "mixer.", {"q_norm.weight": "q_norm.scale", "k_norm.weight": "k_norm.scale"}, "attention"
)
MLP = linears(BLOCK + "mlp.", "mlp.", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})
SIZES = {
    "vocab_size": Field("vocab_size", 32000),
    "hidden_size": Field("d_model", 4096),
    "intermediate_size": Field("d_ff", 11008),
    "num_hidden_layers": Field("num_layers", 32),
    "tie_word_embeddings": Field("tie_embeddings", False),
    "rms_norm_eps": Field("norm_epsilon", 1e-6),
}
HEADS = {
    "num_attention_heads": Field("attention.num_heads", 32),
    "num_key_value_heads": Field("attention.num_kv_heads"),
    "head_dim": Field("attention.head_dim"),
}


def read_heads(fields: Fields, found: dict[str, Any]) -> None:
    heads, width = found["attention.num_heads"], found["d_model"]
    if not found.get("attention.head_dim") and width % heads:
        fields.refuse("num_attention_heads", f"{heads} heads do not divide hidden_size = {width}")


def write_heads(mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_attention_heads"], fields["num_key_value_heads"] = mixer.heads, mixer.kv_heads
    if "head_dim" in fields:
        fields["head_dim"] = mixer.head_dim


def set_biases(found: dict[str, Any], names: str) -> None:
    if names:
        found["attention.biases"] = names


def _read(fields: Fields, found: dict[str, Any]) -> None:
    read_heads(fields, found)
    rope.read(fields, found)
    set_biases(found, "q,k,v,out" if fields.take("attention_bias", False) else "")
    if fields.take("mlp_bias", False):
        found["mlp_bias"] = True


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    write_heads(mixers[0], fields)
    rope.write(settings, fields)
    fields["attention_bias"] = bool(settings.get("attention.biases"))
    fields["mlp_bias"] = bool(settings.get("mlp_bias"))


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=SIZES | HEADS | {"hidden_act": Only("silu")},
    settings={"mixer": "attention", "mlp": "swiglu", "positions": "rope"},
    rules=ENDS + NORMS + ATTENTION + MLP,
    read=_read,
    write=_write,
    unread=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def _read_mistral(fields: Fields, found: dict[str, Any]) -> None:
    read_heads(fields, found)
    rope.read(fields, found)
    kind = "sliding_attention" if found["attention.window"] else "full_attention"  # of all, whatever a list says
    if [layer for layer in fields.take("layer_types", []) if layer != kind]:
        fields.refuse("layer_types", f"got {shown(fields.values['layer_types'])}; sliding_window says {kind} of all")


def _write_mistral(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    write_heads(mixers[0], fields)
    rope.write(settings, fields)
    fields["sliding_window"] = settings["attention.window"] or None


MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    fields=LLAMA.fields
    | {
        "intermediate_size": Field("d_ff", 14336),
        "num_key_value_heads": Field("attention.num_kv_heads", 8),
        "sliding_window": Field("attention.window", 4096),
    },
    read=_read_mistral,
    write=_write_mistral,
)


def _read_phi3(fields: Fields, found: dict[str, Any]) -> None:
    read_heads(fields, found)
    rope.read(fields, found, fraction=1.0)


def _phi3_rules(model: ModelConfig) -> list:
    heads = model.attention.num_heads
    width = model.attention.head_dim or model.d_model // heads
    of_kv = (model.attention.num_kv_heads or heads) * width
    names = [f"mixer.{name}.kernel" for name in ("q", "k", "v")]
    qkv = rule(BLOCK + "self_attn.qkv_proj.weight", names, split(heads * width, of_kv, of_kv), "attention")
    halves = split(model.d_ff, model.d_ff)
    mlp = rule(BLOCK + "mlp.gate_up_proj.weight", ("mlp.gate.kernel", "mlp.up.kernel"), halves)
    return [
        *ENDS, *NORMS, qkv, mlp,
        *linears(BLOCK, "", {"self_attn.o_proj": "mixer.out", "mlp.down_proj": "mlp.down"}),
    ]  # fmt: skip


PHI3 = dataclasses.replace(
    MISTRAL,
    name="phi3",
    architecture="Phi3ForCausalLM",
    fields={name: field for name, field in LLAMA.fields.items() if name != "head_dim"}
    | {
        "vocab_size": Field("vocab_size", 32064),
        "hidden_size": Field("d_model", 3072),
        "intermediate_size": Field("d_ff", 8192),
        "rms_norm_eps": Field("norm_epsilon", 1e-5),
        "sliding_window": Field("attention.window"),
    },
    rules=_phi3_rules,
    read=_read_phi3,
    harmless=("original_max_position_embeddings",),
)
FAMILIES = [LLAMA, MISTRAL, PHI3]
