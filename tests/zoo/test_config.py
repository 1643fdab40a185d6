"""Configs: sizes, checks with their messages, JSON, and the four-places rule for a family."""

import importlib
import pathlib

import pytest

from zoo.config import (
    SIZES,
    Config,
    difference,
    from_json,
    leaves,
    mlp_width,
    pattern,
    places,
    preset,
    to_json,
    validate,
)
from zoo.errors import UsageError
from zoo.flops import num_parameters
from zoo.mixers import CAUSAL_MIXERS, MIXERS
from zoo.mixers.base import check_heads, heads_at_most

ROOT = pathlib.Path(__file__).parents[2]
CONFIG_FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def config_of(name: str, size: str) -> Config:
    return importlib.import_module(f"configs.{name}").get_config(size)


@pytest.mark.parametrize("size", SIZES)
def test_every_architecture_has_the_size_within_5_percent_of_one_another(size):
    counts = {}
    for name in CONFIG_FILES:
        config = config_of(name, size)
        validate(config)
        config.model.vocab_size = 320 if size in ("tiny", "10m") else 32_000
        counts[name] = num_parameters(config.model)
    assert max(counts.values()) <= 1.05 * min(counts.values()), counts


@pytest.mark.parametrize("size, about", [("10m", 10.7e6), ("125m", 125e6), ("340m", 340e6), ("1.3b", 1.3e9)])
def test_sizes_are_what_their_names_say(size, about):
    config = preset(size)
    config.model.vocab_size = 320 if size == "10m" else 50_304  # bytes, for a laptop
    assert num_parameters(config.model) == pytest.approx(about, rel=0.06)


@pytest.mark.parametrize("mixer", [*MIXERS, "gla,gla,attention", "gla,mlp,attention"])
@pytest.mark.parametrize("size", SIZES)
def test_swapping_the_mixer_by_the_flag_keeps_the_size(mixer, size):
    config = config_of("gla", size)
    config.model.vocab_size = 32_000
    before = num_parameters(config.model)
    config.model.mixer = mixer
    if mixer in MIXERS and mixer not in CAUSAL_MIXERS:
        config.model.direction, config.train.objective = "bidirectional", "masked_tokens"
    validate(config)
    assert num_parameters(config.model) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("family", MIXERS)
def test_a_family_has_its_four_places(family):
    assert len(list((ROOT / "zoo" / "mixers").glob(f"*/{family}.py"))) == 1
    assert (ROOT / "configs" / f"{'transformer' if family == 'attention' else family}.py").is_file()
    assert f"[`{family}`]" in (ROOT / "docs" / "zoo.md").read_text(), "docs/zoo.md has no row for it"
    assert hasattr(Config().model, family)


def test_the_mixers_section_is_always_there_and_named_as_the_registry_names_it():
    model = Config().model
    expected = {f"model.{family}.{field}" for family in MIXERS for field in leaves(getattr(model, family))}
    assert expected <= set(leaves(Config()))


def test_mlp_layers_and_models_without_mlps():
    model = preset("tiny").model
    model.mixer, model.mlp = "gla,mlp", "none"
    assert pattern(model) == ["gla", "mlp"]
    assert [mlp_width(model, place) for place in places(model)] == [0, 4 * model.d_model]


def test_a_place_of_the_pattern_has_settings_of_its_own():
    model = preset("tiny").model
    model.mixer, model.num_layers, model.attention.num_kv_heads = (
        "attention@window=8@rope_scaling.factor=2.0@biases=q+k,attention,mlp",
        3,
        2,
    )
    first, second, mlp = places(model)
    assert (first.family, first.settings.window, first.settings.rope_scaling.factor) == ("attention", 8, 2.0)
    assert (second.settings.window, second.settings.rope_scaling.factor, mlp.settings) == (0, 1.0, None)
    assert first.settings.num_kv_heads == second.settings.num_kv_heads == 2
    assert pattern(model) == ["attention", "attention", "mlp"]


def test_the_fewest_heads_of_a_width_at_most():
    assert [heads_at_most(0, width, 128) for width in (256, 1536, 1500)] == [4, 12, 12]
    assert heads_at_most(7, 1536, 128) == 7
    width = 2 * 997  # only 2 and 997 heads cut it: check_heads is to name the fewest
    assert heads_at_most(0, width, 128) == 16 and check_heads({"num_heads": 16}, "width", width)


BAD = {
    "unknown mixer": ({"model.mixer": "glas"}, "unknown mixer 'glas'; known, nearest first: gla, "),
    "mixer of an unknown part": ({"model.mixer": "gla,atention,gla"}, "nearest first: attention,"),
    "empty mixer": ({"model.mixer": ""}, "unknown mixer ''"),
    "setting of a place": (
        {"model.mixer": "gla,attention@windw=8,mlp"},
        "model.mixer: 'attention@windw=8': attention has no setting 'windw'; nearest: window,",
    ),
    "value of a place": ({"model.mixer": "attention@window=-1"}, "window: got -1, expected at least 1 token, or 0"),
    "kind of a place's value": ({"model.mixer": "attention@window=x"}, "window: got 'x', expected a whole number"),
    "place without a value": ({"model.mixer": "attention@local"}, "expected a family, or family@setting=value"),
    "place that sets twice": ({"model.mixer": "attention@window=1@window=2"}, "which sets the same twice"),
    "place of an MLP": ({"model.mixer": "gla,mlp@d_ff=8,gla"}, "an MLP has no settings of its own"),
    "check of a place": (
        {"model.mixer": "attention,attention@num_heads=5,attention"},
        "model.mixer: 'attention@num_heads=5': num_heads: 5 heads do not divide",
    ),
    "bias of nothing": (
        {"model.mixer": "attention", "model.attention.biases": "q,o"},
        "model.attention.biases: got 'o', expected some of",
    ),
    "biases twice": ({"model.gla.biases": "q,q"}, "expected different names"),
    "scaling without a kind": (
        {"model.mixer": "attention", "model.attention.rope_scaling.factor": 2.0},
        "model.attention.rope_scaling.factor: 2 does nothing with kind=none",
    ),
    "scaling of an unknown context": (
        {"model.mixer": "attention", "model.attention.rope_scaling.kind": "yarn"},
        "rope_scaling.original_context: yarn needs the number of tokens",
    ),
    "odd part of a head": (
        {"model.mixer": "attention", "model.attention.rotary_fraction": 0.02},
        "model.attention.rotary_fraction: 0.02 turns 1 of head_dim = 64 channels",
    ),
    "whole norm alone": (
        {"model.mixer": "attention", "model.attention.qk_norm_whole": True},
        "does nothing without a norm on q and k",
    ),
    "limits of dt": (
        {"model.mixer": "mamba2", "model.mamba2.dt_limit_min": 1.0, "model.mamba2.dt_limit_max": 0.5},
        "model.mamba2.dt_limit_max: got 0.5, expected at least dt_limit_min = 1, or 0",
    ),
    "pattern does not divide": ({"model.mixer": "gla,gla,gla,attention"}, "3 layers are no multiple of the 4"),
    "no layers": ({"model.num_layers": 0}, "model.num_layers: got 0, expected at least 1"),
    "heads do not divide": ({"model.gla.num_heads": 7}, "model.gla.num_heads: 7 heads do not divide"),
    "heads below one": ({"model.gla.num_heads": -1}, "model.gla.num_heads: got -1, expected at least 1"),
    "kv heads": (
        {"model.mixer": "attention", "model.attention.num_kv_heads": 3},
        "model.attention.num_kv_heads: 3 heads do not divide num_heads = 4",
    ),
    "attention's heads": ({"model.mixer": "attention", "model.attention.num_heads": 5}, "5 heads do not divide"),
    "odd rotary width": ({"model.mixer": "retnet", "model.retnet.num_heads": 256}, "rotary needs an even one"),
    "feature map": ({"model.mixer": "linear_attention", "model.linear_attention.feature_map": "cos"}, "got 'cos'"),
    "gate's temperature": (
        {"model.mixer": "gated_retention", "model.gated_retention.gate_temperature": 0.0},
        "model.gated_retention.gate_temperature: got 0.0, expected at least 0.001",
    ),
    "mix rank": ({"model.mixer": "rwkv6", "model.rwkv6.mix_rank": 0}, "model.rwkv6.mix_rank: got 0"),
    "groups of heads": (
        {"model.mixer": "gated_delta_net", "model.gated_delta_net.num_v_heads": 6},
        "model.gated_delta_net.num_heads: 4 heads do not divide the number of heads of v = 6; use one of 2, 3, 6",
    ),
    "beta's bound": (
        {"model.mixer": "kda", "model.kda.beta_max": 2.5},
        "model.kda.beta_max: got 2.5, expected more than 0 and at most 2",
    ),
    "gate's cap": ({"model.mixer": "mlstm", "model.mlstm.gate_soft_cap": -1.0}, "gate_soft_cap: got -1.0"),
    "sequence length 0": ({"train.context_length": 0}, "train.context_length: got 0, expected at least 1 token"),
    "batch 0": ({"train.batch_size": 0}, "train.batch_size: got 0, expected at least 1 sequence"),
    "microbatches": ({"train.accumulate_steps": 3}, "8 sequences do not split into 3 microbatches"),
    "steps": ({"train.steps": 0}, "train.steps: got 0"),
    "dtype": ({"model.dtype": "float16"}, "model.dtype: got 'float16', expected one of float32, bfloat16"),
    "remat": ({"model.remat": "some"}, "model.remat: got 'some', expected one of none, minimal, full, family"),
    "mlp": ({"model.mlp": "relu"}, "model.mlp: got 'relu'"),
    "positions": ({"model.positions": "learned"}, "model.max_positions: learned positions need a table"),
    "short table": ({"model.positions": "learned", "model.max_positions": 8}, "shorter than train.context_length"),
    "dropout": ({"model.dropout": 1.0}, "model.dropout: got 1.0"),
    "optimizer": ({"optimizer.name": "adam"}, "optimizer.name: got 'adam', expected one of adamw, muon"),
    "schedule": ({"optimizer.schedule": "step"}, "optimizer.schedule: got 'step'"),
    "learning rate": ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate: got nan"),
    "factors": ({"optimizer.learning_rate_factors": "embed"}, "got 'embed', expected regex=factor"),
    "factor's regex": ({"optimizer.learning_rate_factors": "(?au)x=1"}, "got '(?au)x=1', expected regex=factor"),
    "overrides": ({"mesh.overrides": "embed"}, "mesh.overrides: got 'embed', expected regex=AXES"),
    "override's axis": ({"mesh.overrides": "embed=none|fspd"}, "got 'fspd' in 'embed=none|fspd', expected none or d"),
    "override's axis twice": ({"mesh.overrides": "x=fsdp|data+fsdp"}, "spreads two dimensions over fsdp"),
    "override's regex": ({"mesh.overrides": "(=fsdp"}, "got '(=fsdp', expected regex=AXES"),
    "override that repeats": ({"mesh.overrides": "(a+)+b=fsdp"}, "may match for ever"),
    "validation share": ({"data.validation_fraction": 1.0}, "data.validation_fraction: got 1.0"),
    "no room for an MLP": ({"model.mixer": "retnet", "model.retnet.expand_v": 4.0}, "set model.d_ff, or model"),
}


def _set(config: Config, name: str, value) -> None:
    *path, field = name.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, field, value)


@pytest.mark.parametrize("settings, message", BAD.values(), ids=BAD)
def test_bad_settings_are_named_with_what_was_expected(settings, message):
    config = preset("tiny")
    for name, value in settings.items():
        _set(config, name, value)
    with pytest.raises(UsageError) as error:
        validate(config)
    assert message in str(error.value)


def test_all_problems_are_reported_at_once():
    config = preset("tiny")
    config.train.steps = config.train.batch_size = 0
    with pytest.raises(UsageError, match="(?s)train.steps.*train.batch_size"):
        validate(config)


def test_unknown_size_lists_the_sizes():
    with pytest.raises(UsageError, match="tiny, 10m, 125m, 340m, 1.3b"):
        preset("small")


def test_json_round_trip_and_differences():
    config = config_of("gla_hybrid", "125m")
    config.model.gla.gate_rank = 8
    assert from_json(to_json(config)) == config
    assert difference(config_of("gla_hybrid", "125m"), config) == ["model.gla.gate_rank: 16 -> 8"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[]", "the whole is"),
        ('{"model": {"d_modle": 3}}', "unknown setting 'model.d_modle'; known, nearest first: d_model"),
        ('{"train": {"steps": "10"}}', "train.steps: got '10', expected a whole number, at least 1 step"),
        ('{"train": {"steps": true}}', "train.steps: got True, expected a whole number"),
    ],
)
def test_bad_json_is_named(text, message):
    with pytest.raises(UsageError) as error:
        from_json(text)
    assert message in str(error.value)


def test_json_without_a_section_keeps_its_defaults():
    assert from_json('{"optimizer": {"learning_rate": 1}}').optimizer.learning_rate == 1.0
