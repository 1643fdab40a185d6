"""Mamba-2: transformers' `mamba2`, and the folder of its authors' package (state-spaces/mamba2-*).

    backbone.layers.N.norm, .mixer.{in_proj (z, x B C, dt), conv1d over x B C, dt_bias, A_log, D, norm, out_proj}

The norm is over a group of heads. Refused: other activations, a convolution without bias, hybrids with attention.
"""

import dataclasses
import math
from typing import Any

from zoo.config import ModelConfig
from zoo.interop.families import mamba
from zoo.interop.families.mamba import NORMS, read_authors
from zoo.interop.family import Family, Field, Fields, Only
from zoo.interop.table import CONVOLUTION, Rule, linears, rule, same, split
from zoo.settings import shown

MIXER = "backbone.layers.{N}.mixer."


def mixer_rules(model: ModelConfig, theirs: str, layer: str = "") -> list[Rule]:
    """Of a Mamba-2 layer whose tensors' names begin with `theirs`."""
    config = model.mamba2
    channels = int(config.expand * model.d_model)
    sizes = channels, channels + 2 * config.groups * config.state_dim, channels // config.head_dim
    parts = ("mixer.in_z", "mixer.in_xBC", "mixer.in_dt")
    names = {"conv1d.bias": "conv.bias", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm.weight": "norm.scale"}
    return [
        rule(theirs + "in_proj.weight", [f"{part}.kernel" for part in parts], split(*sizes), layer),
        rule(theirs + "in_proj.bias", [f"{part}.bias" for part in parts], split(*sizes, transposed=False), layer),
        rule(theirs + "conv1d.weight", "mixer.conv.weight", CONVOLUTION, layer),
        *same(theirs, "mixer.", names, layer),
        *linears(theirs, "mixer.", {"out_proj": "out"}, layer),
    ]


def _rules(model: ModelConfig) -> list[Rule]:
    return [rule("backbone.embeddings.weight", "embed.embedding"), *NORMS, *mixer_rules(model, MIXER)]


def read_limit(fields: Fields, found: dict[str, Any]) -> None:
    """time_step_limit, [0, inf] for none; release 5 writes numbers that JSON lacks as {"__float__": "Infinity"}."""
    limit = fields.take("time_step_limit", [0.0, math.inf])
    numbers = [math.inf if n == {"__float__": "Infinity"} else n for n in limit]
    if [type(n) in (int, float) for n in numbers] != [True, True] or not (numbers[0] < numbers[1] > 0):
        fields.refuse("time_step_limit", f"got {shown(limit)}, expected two numbers, the second larger and above 0")
        return
    low, high = map(float, numbers)
    if low > 0:
        found["mamba2.dt_limit_min"] = low
    if high < math.inf:
        found["mamba2.dt_limit_max"] = high


def write_limit(settings: dict[str, Any], fields: dict[str, Any]) -> None:
    low, high = (settings.get(f"mamba2.dt_limit_{end}", 0.0) for end in ("min", "max"))
    fields["time_step_limit"] = [low, high or {"__float__": "Infinity"}]


def _read(fields: Fields, found: dict[str, Any]) -> None:
    read_limit(fields, found)
    if fields.take("use_bias", False):
        found["mamba2.biases"] = "in_xBC,in_z,in_dt,out"
    heads, inner = fields.take("num_heads", 128), found["mamba2.expand"] * found["d_model"]
    if heads * found["mamba2.head_dim"] != inner:
        fields.refuse(
            "num_heads", f"{heads} heads of {found['mamba2.head_dim']} are not expand * hidden_size = {inner:g}"
        )


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    write_limit(settings, fields)
    fields["num_heads"] = mixers[0].heads
    fields["use_bias"] = bool(settings.get("mamba2.biases"))
    if float(fields["expand"]).is_integer():  # theirs is whole
        fields["expand"] = int(fields["expand"])


MAMBA2 = Family(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    fields={
        "vocab_size": Field("vocab_size", 32768),
        "hidden_size": Field("d_model", 4096),
        "num_hidden_layers": Field("num_layers", 64),
        "head_dim": Field("mamba2.head_dim", 64),
        "state_size": Field("mamba2.state_dim", 128),
        "n_groups": Field("mamba2.groups", 8),
        "expand": Field("mamba2.expand", 2.0),
        "conv_kernel": Field("mamba2.conv_width", 4),
        "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
        "tie_word_embeddings": Field("tie_embeddings", False),
        "use_conv_bias": Only(True),
        "hidden_act": Only("silu", "swish"),
    },
    settings={"mixer": "mamba2", "mlp": "none", "positions": "none"},
    rules=_rules,
    read=_read,
    write=_write,
    harmless=(
        "time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual",
        "layer_types", "norm_before_gate", "intermediate_size",
    ),
)  # fmt: skip


def _read_originals(fields: Fields, found: dict[str, Any]) -> None:
    section = read_authors(fields, found, "Mamba2", 16)
    names = {
        "d_state": ("state_dim", 128),
        "d_conv": ("conv_width", 4),
        "headdim": ("head_dim", 64),
        "ngroups": ("groups", 1),
    }
    for theirs, (ours, default) in names.items():
        found[f"mamba2.{ours}"] = section.take(theirs, default)
    found["mamba2.expand"] = section.take("expand", 2.0)
    section.only("D_has_hdim", False), section.only("rmsnorm", True), section.only("norm_before_gate", False)
    section.take("chunk_size", 0)
    for left in section.rest():
        section.refuse(left, "cannot be expressed")


ORIGINALS = dataclasses.replace(
    mamba.ORIGINALS,
    name="state-spaces mamba2",
    settings=mamba.ORIGINALS.settings | {"mixer": "mamba2"},
    rules=_rules,
    read=_read_originals,
)
FAMILIES = [MAMBA2, ORIGINALS]
