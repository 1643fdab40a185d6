"""What models of flash-linear-attention share: names around the mixer, the MLP's width, options that they all have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.config import ModelConfig
from zoo.interop.family import Family, Field, Fields, Only
from zoo.interop.table import CONVOLUTION, TRANSPOSED, Rule, linears, rule, same

BLOCK, MIXER = "model.layers.{N}.", "model.layers.{N}.attn."
AROUND = [
    rule("model.embeddings.weight", "embed.embedding"),
    rule("model.norm.weight", "norm.scale"),
    rule("lm_head.weight", "head.kernel", TRANSPOSED),
    *same(BLOCK, "", {"attn_norm.weight": "mixer_norm.scale", "mlp_norm.weight": "mlp_norm.scale"}),
    *linears(BLOCK + "mlp.", "mlp.", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
]
QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
CONVOLUTIONS = [rule(f"{MIXER}{name}_conv1d.weight", f"mixer.qkv.{name}_conv.weight", CONVOLUTION) for name in "qkv"]
SIZES = {
    "vocab_size": Field("vocab_size", 32000),
    "hidden_size": Field("d_model", 2048),
    "num_hidden_layers": Field("num_layers", 24),
    "norm_eps": Field("norm_epsilon", 1e-6),
    "tie_word_embeddings": Field("tie_embeddings", False),
    "hidden_act": Only("swish"),
    "attn": Only(None),
    "attnres_block_size": Only(None),
}


def layer_norm(theirs: str, ours: str) -> list[Rule]:
    """With scale and bias."""
    return same(theirs, ours, {"weight": "scale", "bias": "bias"})


def mlp_width(d_model: int, ratio: float | None) -> int:
    """Where a config says none: two thirds of hidden_ratio * d_model, rounded up to a multiple of 256."""
    return -(-int(d_model * (4 if ratio is None else ratio) * 2 / 3) // 256) * 256


def family(
    name: str,
    architecture: str,
    mixer: str,
    fields: Mapping[str, Field | Only],
    rules: Sequence[Rule] | Callable[[ModelConfig], Sequence[Rule]],
    settings: Mapping[str, Any],
    read: Callable[[Fields, dict[str, Any]], None] = lambda fields, found: None,
    write: Callable[[dict[str, Any], Any, dict[str, Any]], None] = lambda settings, mixer, fields: None,
    width: Callable[[int, float | None], int] = mlp_width,
    harmless: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> Family:
    """`read` and `write` are of the mixer alone; `width`: of the MLP, of d_model and hidden_ratio."""

    def read_all(given: Fields, found: dict[str, Any]) -> None:
        inner, asked = given.take("intermediate_size", 0), given.take("hidden_ratio", None, float)
        found["d_ff"] = inner or width(found["d_model"], asked)
        read(given, found)

    def write_all(ours: dict[str, Any], mixers: list[Any], made: dict[str, Any]) -> None:
        made["intermediate_size"] = ours["d_ff"]
        write(ours, mixers[0], made)

    return Family(
        name=name,
        architecture=architecture,
        fields=SIZES | fields,
        settings={"mixer": mixer, "mlp": "swiglu", "positions": "none"} | settings,
        rules=rules,
        read=read_all,
        write=write_all,
        harmless=(*harmless, "conv_size", "share_conv_kernel"),
        renamed=renamed or {},
    )


def same_heads(fields: Fields, heads: int) -> None:
    """Heads of keys and values have to be as many as heads of queries."""
    if fields.take("num_kv_heads", heads) != heads:
        fields.refuse("num_kv_heads", f"{fields.values['num_kv_heads']} of {heads} heads cannot be expressed")
