"""Nemotron-H's dense models (transformers' `nemotron_h`): layers of Mamba-2, of attention without positions, of an MLP.

    backbone.layers.N.norm, .mixer.{a Mamba-2 layer's, {q,k,v,o}_proj, or {up,down}_proj}, backbone.norm_f

An MLP is a layer of its own, of squared ReLU. Which layer is which is a list, or in older files a string of M, *, -.
Refused: experts, several tokens predicted at once, other activations.
"""

from typing import Any

from zoo.config import MLP_LAYER, ModelConfig
from zoo.interop.families import hybrid, llama
from zoo.interop.families.mamba2 import mixer_rules, read_limit, write_limit
from zoo.interop.family import Family, Field, Fields, Only, ratio
from zoo.interop.table import TRANSPOSED, Rule, linears, rule

BLOCK = "backbone.layers.{N}."
LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


def _rules(model: ModelConfig) -> list[Rule]:
    projections = {f"{name}_proj": name for name in "qkv"} | {"o_proj": "out"}
    return [
        rule("backbone.embeddings.weight", "embed.embedding"),
        rule("backbone.norm_f.weight", "norm.scale"),
        rule("lm_head.weight", "head.kernel", TRANSPOSED),
        *(rule(BLOCK + "norm.weight", "mixer_norm.scale", layer=layer) for layer in ("mamba2", "attention")),
        rule(BLOCK + "norm.weight", "mlp_norm.scale", layer=MLP_LAYER),
        *mixer_rules(model, BLOCK + "mixer.", "mamba2"),
        *linears(BLOCK + "mixer.", "mixer.", projections, "attention"),
        *linears(BLOCK + "mixer.", "mlp.", {"up_proj": "up", "down_proj": "down"}, MLP_LAYER),
    ]


def _read(fields: Fields, found: dict[str, Any]) -> None:
    letters = fields.take("hybrid_override_pattern", "")
    layers = fields.take("layers_block_type", [LETTERS.get(letter, letter) for letter in letters])
    found["num_layers"] = fields.take("num_hidden_layers", len(layers))
    hybrid.read_layers(fields, found, "layers_block_type", layers, hybrid.LAYERS | {"mlp": MLP_LAYER})
    llama.read_heads(fields, found)
    inner = fields.take("mamba_num_heads", 128) * found["mamba2.head_dim"]
    found["mamba2.expand"] = ratio(inner, found["d_model"])
    if fields.take("use_bias", False):
        found["mamba2.biases"] = "in_xBC,in_z,in_dt,out"
    read_limit(fields, found)


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    names = {"Mamba2": "linear_attention", "Attention": "full_attention", "NoneType": "mlp"}
    layers = [names.get(type(mixer).__name__, "") for mixer in mixers]
    fields["layers_block_type"] = layers * (settings["num_layers"] // len(layers))
    hybrid.write_attention(settings, mixers, fields)
    if mamba := hybrid.of_layers(mixers, "mamba2"):
        fields["mamba_num_heads"], fields["mamba_head_dim"] = mamba.heads, mamba.head_dim
    fields["use_bias"] = bool(settings["mamba2.biases"])
    write_limit(settings, fields)


FAMILIES = [
    Family(
        name="nemotron_h",
        architecture="NemotronHForCausalLM",
        fields={
            "vocab_size": Field("vocab_size", 131072),
            "hidden_size": Field("d_model", 4096),
            "intermediate_size": Field("d_ff", 21504),
            "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
            "tie_word_embeddings": Field("tie_embeddings", False),
            "mlp_bias": Field("mlp_bias", False),
            "num_attention_heads": Field("attention.num_heads", 32),
            "num_key_value_heads": Field("attention.num_kv_heads", 8),
            "head_dim": Field("attention.head_dim", 128),
            "sliding_window": Only(None),
            "attention_bias": Only(False),
            "mamba_head_dim": Field("mamba2.head_dim", 64),
            "ssm_state_size": Field("mamba2.state_dim", 128),
            "n_groups": Field("mamba2.groups", 8),
            "conv_kernel": Field("mamba2.conv_width", 4),
            "mamba_proj_bias": Only(False),
            "use_conv_bias": Only(True),
            "mamba_hidden_act": Only("silu"),
            "mlp_hidden_act": Only("relu2"),
            "num_nextn_predict_layers": Only(0),
        },
        settings={"mlp": "none", "mlp_layer": "squared_relu", "positions": "none"},
        rules=_rules,
        read=_read,
        write=_write,
        harmless=(
            "expand", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
            "mamba_ssm_cache_dtype", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "n_routed_experts",
            "output_router_logits", "n_shared_experts", "moe_intermediate_size", "moe_latent_size",
            "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "num_experts_per_tok",
            "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "layer_types", "hidden_act",
        ),  # of initial values, and of experts that no layer has
        hybrid=("mamba2", "attention", MLP_LAYER),
    )
]  # fmt: skip
