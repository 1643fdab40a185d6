"""What hybrids of Mamba-2 and attention share: which layer is which, and the fields of their Mamba-2 layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.interop.families import llama
from zoo.interop.families.mamba2 import read_limit, write_limit
from zoo.interop.family import Fields, shortest_pattern
from zoo.settings import shown

# What transformers calls a layer, now and before its release 5, and the family of ours.
LAYERS = {"linear_attention": "mamba2", "full_attention": "attention", "mamba": "mamba2", "attention": "attention"}


def read_layers(
    fields: Fields, found: dict[str, Any], name: str, layers: Sequence[Any], known: Mapping[str, str] = LAYERS
) -> None:
    """The pattern, of their names for all layers."""
    unknown = [layer for layer in layers if layer not in known]
    if unknown or len(layers) != found["num_layers"]:
        said = f", {shown(unknown)} unknown among them" if unknown else ""
        fields.refuse(name, f"{len(layers)} layers for {found['num_layers']}{said}")
        return
    found["mixer"] = shortest_pattern([known[layer] for layer in layers])


def read_mamba(fields: Fields, found: dict[str, Any]) -> None:
    """Fields that begin with mamba_, as Bamba and Granite have them."""
    heads, inner = fields.take("mamba_n_heads", 128), fields.take("mamba_expand", 2) * found["d_model"]
    width = fields.take("mamba_d_head", "auto", (int, str))
    width = inner // max(1, heads) if width == "auto" else width
    if heads * width != inner:
        fields.refuse("mamba_n_heads", f"{heads} heads of {width} are not mamba_expand * hidden_size = {inner}")
    found |= {"mamba2.expand": inner / found["d_model"], "mamba2.head_dim": width}
    if fields.take("mamba_proj_bias", False):
        found["mamba2.biases"] = "in_xBC,in_z,in_dt,out"
    read_limit(fields, found)


def write_mamba(settings: dict[str, Any], mixers: Sequence[Any], fields: dict[str, Any]) -> None:
    """Where no layer is one, a head as wide as all: numbers that fit the others."""
    mixer = of_layers(mixers, "mamba2")
    expand = fields["mamba_expand"] = int(settings["mamba2.expand"])
    width = mixer.head_dim if mixer else expand * settings["d_model"]
    fields["mamba_n_heads"], fields["mamba_d_head"] = mixer.heads if mixer else 1, width
    fields["mamba_proj_bias"] = bool(settings["mamba2.biases"])
    write_limit(settings, fields)


def write_attention(settings: dict[str, Any], mixers: Sequence[Any], fields: dict[str, Any]) -> None:
    """The same, of heads of attention."""
    if attention := of_layers(mixers, "attention"):
        llama.write_heads(attention, fields)
    else:
        fields |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": settings["d_model"]}


def of_layers(mixers: Sequence[Any], family: str) -> Any:
    """The first mixer of that family; None: it has none."""
    return next((mixer for mixer in mixers if type(mixer).__name__.lower() == family), None)
