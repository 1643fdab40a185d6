"""Qwen3-Next's dense layers and Qwen3.5's text (transformers' `qwen3_next`, `qwen3_5_text`): Gated DeltaNet, attention.

    model.layers.N.linear_attn.{in_proj_qkvz, in_proj_ba, conv1d over q k v, dt_bias, A_log, norm, out_proj}
    model.layers.N.self_attn.{q_proj, k_proj, v_proj, o_proj, q_norm, k_norm}

Rows of qkvz are interleaved: each head of keys has its q, k and the v and z of its heads of values. Qwen3.5 has them
in in_proj_qkv, in_proj_z, in_proj_b and in_proj_a instead, one after the other. q_proj has each head's q, then its
gate. Norms but linear_attn's multiply by 1 + weight. Refused: experts.
"""

import dataclasses
from typing import Any

import numpy as np

from zoo.config import ModelConfig
from zoo.interop.families import hybrid, llama, rope
from zoo.interop.family import Family, Field, Fields, Only, ratio, shortest_pattern
from zoo.interop.table import CONVOLUTION, Rule, Transform, linears, rule, same, shifted, split, then

ATTENTION, DELTA = llama.BLOCK + "self_attn.", llama.BLOCK + "linear_attn."
LAYERS = {"linear_attention": "gated_delta_net", "full_attention": "attention"}


def _interleaved(heads: int, *widths: int) -> Transform:
    """Rows by head, of each so many for every parameter."""
    ends = np.cumsum(widths)[:-1]

    def read(x):
        parts = np.split(x.reshape(heads, sum(widths), -1), ends, axis=1)
        return tuple(part.reshape(-1, x.shape[-1]).T for part in parts)

    def write(*parts):
        joined = [part.T.reshape(heads, width, -1) for part, width in zip(parts, widths, strict=True)]
        return (np.concatenate(joined, axis=1).reshape(-1, parts[0].shape[0]),)

    return Transform(read, write)


def _attention(model: ModelConfig) -> list[Rule]:
    width = model.attention.head_dim
    gated = _interleaved(model.attention.num_heads, width, width)
    return [
        rule(ATTENTION + "q_proj.weight", ("mixer.q.kernel", "mixer.output_gate.kernel"), gated, "attention"),
        *linears(ATTENTION, "mixer.", {"k_proj": "k", "v_proj": "v", "o_proj": "out"}, "attention"),
        *(rule(f"{ATTENTION}{x}_norm.weight", f"mixer.{x}_norm.scale", shifted(1), "attention") for x in "qk"),
    ]


def _around() -> list[Rule]:
    moved = [dataclasses.replace(one, transform=shifted(1)) for one in [llama.ENDS[1], *llama.NORMS]]
    return [llama.ENDS[0], llama.ENDS[2], *moved, *llama.MLP]


def _delta(model: ModelConfig, projections: list[Rule]) -> list[Rule]:
    config, family = model.gated_delta_net, "gated_delta_net"
    d_k, d_v = int(config.expand_k * model.d_model), int(config.expand_v * model.d_model)
    convolutions = then(split(d_k, d_k, d_v, transposed=False), CONVOLUTION)
    names = {"dt_bias": "decay_bias", "A_log": "A_log", "norm.weight": "norm.scale"}
    return [
        *projections,
        rule(DELTA + "conv1d.weight", [f"mixer.qkv.{x}_conv.weight" for x in "qkv"], convolutions, family),
        *same(DELTA, "mixer.", names, family),
        *linears(DELTA, "mixer.", {"out_proj": "out"}, family),
    ]


def _rules(model: ModelConfig) -> list[Rule]:
    config, family = model.gated_delta_net, "gated_delta_net"
    heads, each = config.num_heads, config.num_v_heads // config.num_heads
    keys = int(config.expand_k * model.d_model) // heads
    values = int(config.expand_v * model.d_model) // heads  # of the heads of values that share a head of keys
    qkvz = [f"mixer.qkv.{x}.kernel" for x in "qkv"] + ["mixer.output_gate.kernel"]
    fused = [
        rule(DELTA + "in_proj_qkvz.weight", qkvz, _interleaved(heads, keys, keys, values, values), family),
        rule(
            DELTA + "in_proj_ba.weight",
            ("mixer.beta.kernel", "mixer.decay.kernel"),
            _interleaved(heads, each, each),
            family,
        ),
    ]
    return [*_around(), *_attention(model), *_delta(model, fused)]


def _rules_5(model: ModelConfig) -> list[Rule]:
    config, family = model.gated_delta_net, "gated_delta_net"
    d_k, d_v = int(config.expand_k * model.d_model), int(config.expand_v * model.d_model)
    qkv = [f"mixer.qkv.{x}.kernel" for x in "qkv"]
    single = {"in_proj_z": "output_gate", "in_proj_b": "beta", "in_proj_a": "decay"}
    apart = [
        rule(DELTA + "in_proj_qkv.weight", qkv, split(d_k, d_k, d_v), family),
        *linears(DELTA, "mixer.", single, family),
    ]
    return [*_around(), *_attention(model), *_delta(model, apart)]


def _read(fields: Fields, found: dict[str, Any]) -> None:
    rope.read(fields, found, fraction=0.25)
    keys, values = fields.take("linear_num_key_heads", 16), fields.take("linear_num_value_heads", 32)
    if keys < 1 or values % keys:
        fields.refuse("linear_num_value_heads", f"{values} heads are no multiple of linear_num_key_heads = {keys}")
        keys = values = 1
    d = found["d_model"]
    found["gated_delta_net.num_heads"], found["gated_delta_net.num_v_heads"] = keys, values
    found["gated_delta_net.expand_k"] = ratio(keys * fields.take("linear_key_head_dim", 128), d)
    found["gated_delta_net.expand_v"] = ratio(values * fields.take("linear_value_head_dim", 128), d)
    every = fields.take("full_attention_interval", 4)
    default = [
        "full_attention" if (i + 1) % max(1, every) == 0 else "linear_attention" for i in range(found["num_layers"])
    ]
    layers = fields.take("layer_types", default)
    if len(layers) != found["num_layers"] or not all(layer in LAYERS for layer in layers):
        fields.refuse("layer_types", f"expected {found['num_layers']} of {', '.join(LAYERS)}")
        return
    found["mixer"] = shortest_pattern([LAYERS[layer] for layer in layers])


def _read_next(fields: Fields, found: dict[str, Any]) -> None:
    _read(fields, found)
    dense = set(fields.take("mlp_only_layers", []))
    if fields.take("num_experts", 512) and not dense >= set(range(found["num_layers"])):
        fields.refuse("num_experts", "experts cannot be expressed, only layers of mlp_only_layers")


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    rope.write(settings, fields)
    names = ["full_attention" if type(mixer).__name__ == "Attention" else "linear_attention" for mixer in mixers]
    fields["layer_types"] = names * (settings["num_layers"] // len(mixers))
    hybrid.write_attention(settings, mixers, fields)
    if delta := hybrid.of_layers(mixers, "gateddeltanet"):
        fields["linear_num_key_heads"], fields["linear_num_value_heads"] = delta.key_heads, delta.heads
        fields["linear_key_head_dim"], fields["linear_value_head_dim"] = delta.key_width, delta.value_width


NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    fields=llama.SIZES
    | {
        "vocab_size": Field("vocab_size", 151936),
        "hidden_size": Field("d_model", 2048),
        "intermediate_size": Field("d_ff", 5632),
        "num_hidden_layers": Field("num_layers", 48),
        "num_attention_heads": Field("attention.num_heads", 16),
        "num_key_value_heads": Field("attention.num_kv_heads", 2),
        "head_dim": Field("attention.head_dim", 256),
        "linear_conv_kernel_dim": Field("gated_delta_net.conv_width", 4),
        "attention_bias": Only(False),
        "hidden_act": Only("silu"),
    },
    settings={
        "mlp": "swiglu",
        "positions": "rope",
        "attention.qk_norm": True,
        "attention.output_gate": True,
        "gated_delta_net.beta_max": 1.0,
    },
    rules=_rules,
    read=_read_next,
    write=_write,
    harmless=(
        "decoder_sparse_step", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok", "output_router_logits",
        "router_aux_loss_coef", "shared_expert_intermediate_size",
    ),
    hybrid=("gated_delta_net", "attention"),
    fixed={"num_experts": 0, "mlp_only_layers": []},
)  # fmt: skip
TEXT_5 = dataclasses.replace(
    NEXT,
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    fields=NEXT.fields
    | {
        "vocab_size": Field("vocab_size", 248320),
        "hidden_size": Field("d_model", 4096),
        "intermediate_size": Field("d_ff", 12288),
        "num_hidden_layers": Field("num_layers", 32),
        "num_key_value_heads": Field("attention.num_kv_heads", 4),
    },
    rules=_rules_5,
    read=_read,
    fixed={},
    harmless=("mtp_num_hidden_layers", "mamba_ssm_dtype", "attn_output_gate", "mlp_only_layers"),
    unread=(r"mtp\..*",),
)
FAMILIES = [NEXT, TEXT_5]
