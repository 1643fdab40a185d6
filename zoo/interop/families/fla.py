"""What models of flash-linear-attention share: names around the mixer, the MLP's width, options that they all have, and
`attn`, which makes some layers of most of them softmax attention.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.config import ModelConfig
from zoo.errors import UsageError
from zoo.interop.family import Family, Field, Fields, Only, shortest_pattern
from zoo.interop.table import CONVOLUTION, TRANSPOSED, Rule, linears, rule, same
from zoo.mixers.softmax.attention import Attention
from zoo.settings import shown

BLOCK, MIXER = "model.layers.{N}.", "model.layers.{N}.attn."
AROUND = [
    rule("model.embeddings.weight", "embed.embedding"),
    rule("model.norm.weight", "norm.scale"),
    rule("lm_head.weight", "head.kernel", TRANSPOSED),
    *same(BLOCK, "", {"attn_norm.weight": "mixer_norm.scale", "mlp_norm.weight": "mlp_norm.scale"}),
    *linears(BLOCK + "mlp.", "mlp.", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
]
QKV = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
ATTENTION = linears(MIXER, "mixer.", QKV, "attention")
CONVOLUTIONS = [rule(f"{MIXER}{name}_conv1d.weight", f"mixer.qkv.{name}_conv.weight", CONVOLUTION) for name in "qkv"]
SIZES = {
    "vocab_size": Field("vocab_size", 32000),
    "hidden_size": Field("d_model", 2048),
    "num_hidden_layers": Field("num_layers", 24),
    "norm_eps": Field("norm_epsilon", 1e-6),
    "tie_word_embeddings": Field("tie_embeddings", False),
    "hidden_act": Only("swish"),
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
    has_attention: bool = True,
) -> Family:
    """`read` and `write` are of the mixer alone; `width`: of the MLP, of d_model and hidden_ratio; `has_attention`:
    whether layers of softmax attention are read among those of the mixer."""

    def read_all(given: Fields, found: dict[str, Any]) -> None:
        inner, asked = given.take("intermediate_size", 0), given.take("hidden_ratio", None, float)
        found["d_ff"] = inner or width(found["d_model"], asked)
        if has_attention:
            _read_attention(given, found)
        read(given, found)

    def write_all(ours: dict[str, Any], mixers: list[Any], made: dict[str, Any]) -> None:
        made["intermediate_size"] = ours["d_ff"]
        its_own = [mixer for mixer in mixers if not isinstance(mixer, Attention)]
        if not its_own:
            raise UsageError(f"all layers are softmax attention, and none is {mixer}")
        if has_attention:
            made["attn"] = _attention_fields(ours, mixers)
        write(ours, its_own[0], made)

    return Family(
        name=name,
        architecture=architecture,
        fields=SIZES | fields | ({} if has_attention else {"attn": Only(None)}),
        settings={"mixer": mixer, "mlp": "swiglu", "positions": "none"} | settings,
        rules=[*_of_layers(rules, mixer), *ATTENTION] if has_attention else rules,
        read=read_all,
        write=write_all,
        harmless=(*harmless, "conv_size", "share_conv_kernel"),
        renamed=renamed or {},
        hybrid=(mixer, "attention") if has_attention else (),
    )


def _of_layers(rules: Sequence[Rule], mixer: str) -> list[Rule]:
    """Those of the mixer for its own layers alone."""
    return [dataclasses.replace(one, layer=mixer) if one.ours[0].startswith("mixer.") else one for one in rules]


def _read_attention(fields: Fields, found: dict[str, Any]) -> None:
    if fields.take("attn", None, dict) is None:
        return
    given, layers = fields.section("attn"), found["num_layers"]
    places, heads = given.take("layers", []), given.take("num_heads", 0)
    if any(type(place) is not int or not 0 <= place < layers for place in places):
        given.refuse("layers", f"{shown(places)} are not numbers of {layers} layers, from 0")
        return
    if heads < 1 or found["d_model"] % heads:
        given.refuse("num_heads", f"{heads} heads do not divide hidden_size = {found['d_model']}")
        return
    found |= {
        "mixer": shortest_pattern(["attention" if i in places else found["mixer"] for i in range(layers)]),
        "attention.num_heads": heads,
        "attention.num_kv_heads": given.take("num_kv_heads", heads),
        "attention.biases": "q,k,v" if given.take("qkv_bias", False) else "",
        "attention.window": given.take("window_size", 0),
        "attention.positions": "rope",
        "attention.rope_base": given.take("rope_theta", 10_000.0),
    }
    for name in given.rest():
        given.refuse(name, f"{shown(given.values[name])} is not known here")


def _attention_fields(settings: dict[str, Any], mixers: Sequence[Any]) -> dict[str, Any] | None:
    """`attn`, of the layers that are softmax attention."""
    unit = [isinstance(mixer, Attention) for mixer in mixers]
    if not any(unit):
        return None
    attention = mixers[unit.index(True)]
    return {
        "layers": [i for i in range(settings["num_layers"]) if unit[i % len(unit)]],
        "num_heads": attention.heads,
        "num_kv_heads": attention.kv_heads,
        "qkv_bias": bool(settings["attention.biases"]),
        "window_size": settings["attention.window"] or None,
        "rope_theta": settings["attention.rope_base"],
    }


def same_heads(fields: Fields, heads: int) -> None:
    """Heads of keys and values have to be as many as heads of queries."""
    if fields.take("num_kv_heads", heads) != heads:
        fields.refuse("num_kv_heads", f"{fields.values['num_kv_heads']} of {heads} heads cannot be expressed")
