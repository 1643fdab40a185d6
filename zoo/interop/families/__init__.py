"""The families by their `model_type`."""

import difflib
from collections.abc import Mapping
from typing import Any

from zoo.errors import UsageError
from zoo.interop.families import (
    bamba,
    delta_net,
    gated_deltanet,
    gla,
    granite,
    hgrn2,
    kda,
    linear_attn,
    llama,
    mamba,
    mamba2,
    nemotron_h,
    qwen,
    qwen3_next,
    retnet,
    rwkv6,
    rwkv7,
    xlstm,
)
from zoo.interop.family import Family
from zoo.settings import shown

_FILES = (
    llama, qwen, mamba, mamba2, bamba, granite, nemotron_h, xlstm, qwen3_next,
    linear_attn, retnet, gla, hgrn2, rwkv6, delta_net, gated_deltanet, kda, rwkv7,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.name: family for file in _FILES for family in file.FAMILIES}
# What there is no way to express, by name, and why.
REFUSED = {
    "mixtral": "experts", "qwen2_moe": "experts", "qwen3_moe": "experts", "deepseek_v2": "experts, latent attention",
    "deepseek_v3": "experts, latent attention", "minimax": "experts", "gpt_oss": "experts, attention sinks",
    "kimi_linear": "experts, latent attention", "jamba": "experts", "zamba": "shared blocks", "zamba2": "shared blocks",
    "dbrx": "experts", "olmoe": "experts", "granitemoe": "experts", "granitemoeshared": "experts", "phimoe": "experts",
    "lfm2": "gated short convolutions", "recurrent_gemma": "real-gated linear recurrent units",
    "qwen3_5": "images; its text is qwen3_5_text",
    "mllama": "images", "t5": "an encoder", "bert": "an encoder",
}  # fmt: skip


def of_config(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
      UsageError: one that cannot be expressed, or that is not known.
    """
    name = values.get("model_type")
    if name is None and "ssm_cfg" in values:  # the state-spaces authors' own
        section = values["ssm_cfg"] if isinstance(values["ssm_cfg"], dict) else {}
        name = "state-spaces mamba2" if section.get("layer") == "Mamba2" else "state-spaces mamba"
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if isinstance(name, str) and name in REFUSED:
        raise UsageError(f"{where}: model_type {name} cannot be expressed here: {REFUSED[name]}")
    near = difflib.get_close_matches(str(name)[:100], FAMILIES, 1, 0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"{where}: model_type {shown(name)} is not one of {', '.join(FAMILIES)}{hint}")


def exported() -> list[str]:
    """The names of those that an export can be of."""
    return [name for name, family in FAMILIES.items() if family.exports]
