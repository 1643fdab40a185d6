"""Fields of a config.json, one by one: what they mean, and what is said of one that cannot be meant. No weights."""

import contextlib

import pytest

from tests.interop import tiny
from zoo.errors import UsageError
from zoo.interop import families, family

NOT_READ = r"partial_rotary_factor: got 0\.5, which the package does not read"
NAN, INFINITY = float("nan"), {"__float__": "Infinity"}
WINDOWS = ["full_attention", "sliding_attention"]
FIELDS = [
    ("llama", {"partial_rotary_factor": 0.5}, NOT_READ),
    ("llama", {"a\n\x1b" + "b" * 500: 1}, r"^a\\n\\x1bb{70,80}\.\.\.: 1 is not known here; --ignore=a.{70,110}$"),
    ("llama", {"rope_scaling": {"rope_type": "b" * 500}, "rope_parameters": None}, r"rope_type: 'b{50,60}\.\.\.,"),
    ("llama", {"hidden_act": "relu", "zz": 1, "rope_parameters": {"rope_type": "dynamic"}},
     r"(?s)hidden_act: 'relu'.*rope_type: 'dynamic'.*zz: 1 is not known"),
    ("qwen3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, NOT_READ),
    *(("granite", {"embedding_multiplier": x}, r"embedding_multiplier: got .*, expected from 1e-6 to 1e6")
      for x in (NAN, float("inf"), 1e39, 1e-320, 0.0, -1.0)),
    ("mistral", {"layer_types": WINDOWS}, r"layer_types: got .* sliding_window says sliding_attention of all"),
    ("qwen3", {"layer_types": WINDOWS}, r"layer_types: sliding_attention, and no window"),
    ("qwen2", {"layer_types": ["full_attention"]}, r"layer_types: 1 layers for 2"),
    ("granite", {"layer_types": ["linear_attention", "mlp"]}, r"layer_types: 2 layers for 2, \['mlp'\] unknown"),
    ("gla", {"attn": {"layers": [2], "num_heads": 2}}, r"attn.layers: \[2\] are not numbers of 2 layers, from 0"),
    ("gla", {"attn": {"layers": [1], "num_heads": 3}}, r"attn.num_heads: 3 heads do not divide hidden_size = 16"),
    ("gla", {"attn": {"layers": [1]}}, r"attn.num_heads: 0 heads do not divide hidden_size = 16"),
    ("kda", {"attn": {"layers": [1], "num_heads": 2, "qk_norm": True}}, r"attn.qk_norm: True is not known here"),
    ("rwkv7", {"attn": {"layers": [1], "num_heads": 2}}, r"attn: \{.*, of which only None can be expressed"),
    *(("mamba2", {"time_step_limit": limit}, r"time_step_limit: got .*, expected two numbers")
      for limit in ([0, 0], [1, 0], [NAN, 1], [0, NAN], [True, False], [False, True], [INFINITY] * 2, ["0", "1"])),
]  # fmt: skip


@pytest.mark.parametrize("golden, fields, message", FIELDS)
def test_a_field_of_another_range(golden, fields, message):
    about, _ = tiny.golden(golden)
    values = about["config"] | fields
    with pytest.raises(UsageError, match=message):
        family.to_model(families.of_config(values, "config.json"), values)


def test_what_ignore_names_is_there_to_be_ignored():
    about, _ = tiny.golden("llama")
    values = about["config"] | {"zz": 1}
    _, ignored = family.to_model(families.FAMILIES["llama"], values, ["zz"])
    assert ignored == ["zz"]
    with pytest.raises(UsageError, match=r"(?s)hidden_act: is read, and cannot.*nosuch: there is no such field; leave"):
        family.to_model(families.FAMILIES["llama"], values, ["zz", "nosuch", "hidden_act"])


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "windows, mixer",
    [
        ({"max_window_layers": 1}, "attention,attention@window=5"),
        ({"max_window_layers": 0}, "attention@window=5"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "attention@window=5,attention"),
        ({"layer_types": ["full_attention"] * 2}, "attention"),
        ({"layer_types": ..., "use_sliding_window": False}, "attention"),
    ],
)
def test_layers_with_a_window_and_without(name, windows, mixer):
    values = tiny.golden(name)[0]["config"] | {"use_sliding_window": True, "sliding_window": 5, "layer_types": ...}
    values = {key: value for key, value in (values | windows).items() if value is not ...}
    model, _ = family.to_model(families.FAMILIES[name], values)
    assert model.mixer == mixer and not family.unsaid(families.FAMILIES[name], model)


def test_a_multiplier_that_is_null_is_one():
    about, _ = tiny.golden("granite")
    values = about["config"] | {"embedding_multiplier": None, "attention_multiplier": None}
    of_model = families.of_config(values, "config.json")
    model, _ = family.to_model(of_model, values)
    assert of_model.factors(values, model)["embed.embedding"] == 1.0


@pytest.mark.parametrize("golden", ["yarn_rope", "bamba", "rwkv7", "gla_hybrid"])
def test_any_field_may_hold_anything(golden):
    """It is another model, or a UsageError."""
    about, _ = tiny.golden(golden)
    junk = (None, "x", -1, 10**30, float("nan"), [[{}]], {"a": 1})
    for name in about["config"]:
        for value in junk:
            fields = about["config"] | {name: value}
            with contextlib.suppress(UsageError):
                family.to_model(families.of_config(fields, "config.json"), fields)
