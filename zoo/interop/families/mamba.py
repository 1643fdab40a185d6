"""Mamba: transformers' `mamba` and `falcon_mamba`, and the folder of its authors' package (state-spaces/mamba-*).

    backbone.layers.N.norm, .mixer.{in_proj (x, z), conv1d, x_proj (dt, B, C), dt_proj, A_log, D, out_proj}

The head is tied. Falcon Mamba norms dt, B and C, without a weight and with an epsilon of its own. The authors'
config.json has no model_type; its weights are a pickle, to be converted first, and its vocabulary is padded.
Refused: other activations, a convolution without bias, hybrids with attention layers.
"""

import dataclasses
import math
from typing import Any

from zoo.config import ModelConfig
from zoo.interop.family import Family, Field, Fields, Only
from zoo.interop.table import CONVOLUTION, TRANSPOSED, linears, rule, same, split

MIXER = "backbone.layers.{N}.mixer."
NORMS = [
    rule("backbone.layers.{N}.norm.weight", "mixer_norm.scale"),
    rule("backbone.norm_f.weight", "norm.scale"),
    rule("lm_head.weight", "head.kernel", TRANSPOSED),
]


def channels(model: ModelConfig) -> int:
    return int(model.mamba.expand * model.d_model)


def _rules(model: ModelConfig) -> list:
    halves = split(channels(model), channels(model))
    return [
        rule("backbone.embeddings.weight", "embed.embedding"),
        *NORMS,
        rule(MIXER + "in_proj.weight", ("mixer.in_x.kernel", "mixer.in_z.kernel"), halves),
        rule(
            MIXER + "in_proj.bias",
            ("mixer.in_x.bias", "mixer.in_z.bias"),
            split(*[channels(model)] * 2, transposed=False),
        ),
        rule(MIXER + "conv1d.weight", "mixer.conv.weight", CONVOLUTION),
        rule(MIXER + "dt_proj.weight", "mixer.dt_up", TRANSPOSED),
        *same(MIXER, "mixer.", {"conv1d.bias": "conv.bias", "dt_proj.bias": "dt_bias", "A_log": "A_log", "D": "D"}),
        *linears(MIXER, "mixer.", {"x_proj": "select", "out_proj": "out"}),
    ]


def _read(fields: Fields, found: dict[str, Any]) -> None:
    if "time_step_rank" in fields.values and fields.values["time_step_rank"] != "auto":
        found["mamba.dt_rank"] = fields.take("time_step_rank", 0, int)
    fields.take("time_step_rank", "", (str, int))
    if fields.take("use_bias", False):
        found["mamba.biases"] = "in_x,in_z,out"
    if (inner := fields.values.get("intermediate_size")) is not None:
        made = found["mamba.expand"] * found["d_model"]
        if fields.take("intermediate_size", 0) != int(made):
            fields.refuse("intermediate_size", f"{inner}, and expand * hidden_size is {made:g}")


def _write(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    fields["time_step_rank"] = mixers[0].rank
    fields["intermediate_size"] = mixers[0].channels
    fields["use_bias"] = bool(settings.get("mamba.biases"))
    if float(fields["expand"]).is_integer():  # theirs is whole
        fields["expand"] = int(fields["expand"])


MAMBA = Family(
    name="mamba",
    architecture="MambaForCausalLM",
    fields={
        "vocab_size": Field("vocab_size", 50280),
        "hidden_size": Field("d_model", 768),
        "num_hidden_layers": Field("num_layers", 32),
        "state_size": Field("mamba.state_dim", 16),
        "expand": Field("mamba.expand", 2.0),
        "conv_kernel": Field("mamba.conv_width", 4),
        "layer_norm_epsilon": Field("norm_epsilon", 1e-5),
        "tie_word_embeddings": Field("tie_embeddings", True),
        "use_conv_bias": Only(True),
        "hidden_act": Only("silu", "swish"),
    },
    settings={"mixer": "mamba", "mlp": "none", "positions": "none"},
    rules=_rules,
    read=_read,
    write=_write,
    harmless=(
        "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor", "layer_types",
        "rescale_prenorm_residual", "d_inner", "d_model", "n_layer", "ssm_cfg", "pad_vocab_size_multiple",
        "use_falcon_mambapy",
    ),  # of initial values, and copies of other fields
)  # fmt: skip


def _read_falcon(fields: Fields, found: dict[str, Any]) -> None:
    _read(fields, found)
    found["mamba.inner_norm"] = "rms_norm_without_scale"
    found["mamba.norm_epsilon"] = fields.take("mixer_rms_eps", 1e-6)


def _write_falcon(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    _write(settings, mixers, fields)
    fields["mixer_rms_eps"] = settings.get("mamba.norm_epsilon") or settings["norm_epsilon"]


FALCON_MAMBA = dataclasses.replace(
    MAMBA, name="falcon_mamba", architecture="FalconMambaForCausalLM", read=_read_falcon, write=_write_falcon
)


# --- The authors' own folder ------------------------------------------------------------------------------------------


def read_authors(fields: Fields, found: dict[str, Any], layer: str, multiple: int = 8) -> Fields:
    """Sizes and the padded vocabulary; the section of the layer's own settings."""
    multiple = fields.take("pad_vocab_size_multiple", multiple)
    if multiple < 1:
        fields.refuse("pad_vocab_size_multiple", f"got {multiple}, expected at least 1")
    found["vocab_size"] = -(-found["vocab_size"] // max(1, multiple)) * max(1, multiple)
    for name in ("attn_layer_idx", "attn_cfg"):
        if fields.take(name, None, (list, dict)):
            fields.refuse(name, "layers of attention in the authors' folder cannot be expressed")
    section = fields.section("ssm_cfg")
    section.only("layer", layer)
    return section


def _read_originals(fields: Fields, found: dict[str, Any]) -> None:
    section = read_authors(fields, found, "Mamba1")
    found["mamba.state_dim"] = section.take("d_state", 16)
    found["mamba.conv_width"] = section.take("d_conv", 4)
    found["mamba.expand"] = section.take("expand", 2.0)
    rank = section.take("dt_rank", 0 if section.values.get("dt_rank") in (None, "auto") else 1, (int, str))
    found["mamba.dt_rank"] = rank if isinstance(rank, int) else math.ceil(found["d_model"] / 16)
    for left in section.rest():
        section.refuse(left, "cannot be expressed")


ORIGINALS = Family(
    name="state-spaces mamba",
    architecture="MambaLMHeadModel",
    fields={
        "vocab_size": Field("vocab_size", 50277),
        "d_model": Field("d_model", 2560),
        "n_layer": Field("num_layers", 64),
        "tie_embeddings": Field("tie_embeddings", True),
        "d_intermediate": Only(0),
        "rms_norm": Only(True),
    },
    settings={"mixer": "mamba", "mlp": "none", "positions": "none", "norm_epsilon": 1e-5},
    rules=_rules,
    read=_read_originals,
    renamed={r"^backbone\.embedding\.": "backbone.embeddings."},
    exports=False,
)
FAMILIES = [MAMBA, FALCON_MAMBA, ORIGINALS]
