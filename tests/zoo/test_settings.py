"""Settings: what is declared is checked, on a command line and in a reopened config.json, shown and documented.

Bad values are derived from the declarations; each goes through the code that the commands use, and none may pass.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import time

import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from zoo import checkpoints, config, memory, settings
from zoo.config import Config, from_json, preset, to_json, validate
from zoo.errors import UsageError
from zoo.flops import num_parameters
from zoo.layers import MLPS
from zoo.mixers import CAUSAL_MIXERS, MIXERS
from zoo.model import LanguageModel
from zoo.settings import INT_MAX, Setting, declarations, setting
from zoo.sharding import MeshConfig, make_mesh
from zoo.training import command_line, train
from zoo.training.optimizer import make_optimizer

ROOT = pathlib.Path(__file__).parents[2]
DECLARED = dict(declarations(Config))
HUGE = (2**31, 2**63, 10**30, 10**400, -(10**400))


def outside(declared: Setting) -> list:
    """Values next to the range and far from it."""
    step = (lambda x, to: x + to) if declared.kind is int else (lambda x, to: float(np.nextafter(x, to * math.inf)))
    values = [10**6000] if declared.kind is int else [math.nan, math.inf, -math.inf, 1e300, -1e300]
    values += [bound for bound in (declared.above, declared.below) if bound is not None]
    values += [] if declared.at_least is None else [step(declared.at_least, -1)]
    values += [] if declared.at_most is None else [step(declared.at_most, 1)]
    values += [1e-320, 1e-45] if declared.above == 0 else []
    values += [0.99999999999] if declared.below == 1 else []
    values += [v for v in HUGE if not declared.at_least <= v <= declared.at_most] if declared.kind is int else []
    values += [-1, -1e10] if declared.at_least is not None and declared.at_least >= 0 else []
    return [value for value in values if value not in declared.special]


def bad_values(declared: Setting) -> list:
    """Outside of the range, and of other types."""
    types = [None, [], {}, [1], {"a": 1}]
    if declared.kind is str:
        return [*types, 0, 1.5, True, "\0", "a\nb", "\x1b[31m", "\ud800", "x" * 200_000] + (
            ["", "nonsense", next(iter(declared.choices)) + " "] if declared.choices else []
        )
    if declared.kind is bool:
        return [*types, 0, 1, "True", 1.0, math.nan]
    return [*types, "1", True] + ([1.5, math.nan, math.inf] if declared.kind is int else []) + outside(declared)


def good_values(declared: Setting) -> list:
    bounds = [bound for bound in (declared.at_least, declared.at_most) if bound is not None]
    return [declared.default, *bounds, *declared.special, *declared.choices]


def put(section, name: str, value) -> None:
    *path, field = name.split(".")
    for part in path:
        section = getattr(section, part)
    setattr(section, field, value)


def refused(check, *arguments) -> str:
    with pytest.raises(UsageError) as error:
        check(*arguments)
    return str(error.value)


# --- Declarations -----------------------------------------------------------------------------------------------------


def test_every_field_is_declared_with_its_type_and_a_sentence():
    def walk(cls):
        for field in dataclasses.fields(cls):
            if "setting" not in field.metadata:
                walk(field.type)  # a section, or this raises
                continue
            declared = field.metadata["setting"]
            assert declared.kind is field.type and declared.text, field.name
            assert declared.kind is not float or declared._bounds(), f"{field.name}: any number at all?"

    walk(Config)
    assert set(config.sections.MLP_CHOICES) == {*MLPS, "none"}
    assert len(DECLARED) == len(config.leaves(Config())) > 100


def test_no_value_outside_of_its_declaration_passes():
    broken, before = preset("tiny"), config.leaves(preset("tiny"))
    for name, declared in DECLARED.items():
        for value in bad_values(declared):
            put(broken, name, value)
            message = refused(validate, broken)
            assert message.startswith(f"{name}: got ") and ", expected " in message, (name, value)
            assert "\n" not in message and len(message) < 400, (name, value)
        put(broken, name, before[name])


def test_a_run_checks_its_settings_before_it_writes_or_compiles_anything(tmp_path):
    for name, value in {
        "model.attention.rope_base": 0.0, "model.norm_epsilon": math.nan, "optimizer.b1": 1.0, "train.seed": 2**63,
        "data.weights": "1e-300,1e300", "model.gla.expand_k": -1.0, "metrics.wandb": None,
    }.items():  # fmt: skip
        broken = preset("tiny")
        put(broken, name, value)
        assert refused(train, broken, tmp_path / "run").startswith(f"{name}: got ")
    assert not (tmp_path / "run").exists()


def test_values_at_the_ends_of_a_range_pass_by_themselves():
    for name, declared in DECLARED.items():
        for value in good_values(declared):
            assert declared.problem(value) is None, name


@dataclasses.dataclass
class Example:
    steps: int = setting(10, "steps", unit="step")
    batches: int = setting(0, "batches", unit="batch", zero="all")
    share: float = setting(0.5, "a share", above=0, below=1)
    kind: str = setting("red", "a colour", choices={"red": "warm", "blue": "cold"})
    on: bool = setting(True, "whether")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("steps", 0, "got 0, expected at least 1 step"),
        ("steps", 2**31, f"got {2**31}, expected at least 1 and at most {INT_MAX} steps"),
        ("steps", "1", "got '1', expected a whole number, at least 1 step"),
        ("steps", 10**6000, f"got int without end, expected at least 1 and at most {INT_MAX} steps"),
        ("batches", -1, "got -1, expected at least 1 batch, or 0: all"),
        ("share", math.nan, "got nan, expected a finite number, more than 0 and less than 1"),
        ("share", 1e-320, "got 1e-320, expected more than 0 and less than 1 (float32 takes it for 0)"),
        ("kind", "rad", "got 'rad', expected one of red, blue; did you mean red?"),
        ("on", 1, "got 1, expected True or False"),
    ],
    ids=lambda value: settings.shown(value),
)
def test_what_a_message_says(name, value, message):
    assert settings.problems(Example(**{name: value})) == [f"{name}: {message}"]


def test_a_message_shortens_and_quotes_what_it_was_given():
    assert len(settings.shown("x" * 10**6)) < 70 and len(settings.shown([0] * 10**5)) < 70
    assert "\x1b" not in settings.shown("\x1b[31mred")


@pytest.mark.parametrize(
    "changes",
    [
        {"model.d_model": 2**20, "model.gla.num_heads": INT_MAX},
        {"model.mixer": ",".join(f"unknown{i}" for i in range(9000))},
        {"model.mixer": "x" * 100_000},
        {"model.mixer": "gla," * 20_000},
        {"optimizer.learning_rate_factors": "[" * 50_000 + "=1"},
        {"optimizer.learning_rate_factors": "(" * 50_000 + "=1"},
        {"data.weights": "1e-300," * 14_000},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_checking_takes_no_time_whatever_is_checked(changes):
    broken = preset("tiny")
    for name, value in changes.items():
        put(broken, name, value)
    start = time.perf_counter()
    assert len(refused(validate, broken)) < 3000
    assert time.perf_counter() - start < 2  # a fraction of it; divisors of a width, tried one by one, took a minute


@pytest.mark.parametrize(
    "name, value",
    [
        ("optimizer.learning_rate_factors", "(a+)+b=1"),
        ("optimizer.learning_rate_factors", ".*a.*b.*c.*d.*e=1"),
        ("optimizer.learning_rate_factors", "(.|.)" * 30 + "~=1"),
        ("optimizer.learning_rate_factors", "e" * 1000 + "=1"),
        ("optimizer.learning_rate_factors", "embed=nan"),
        ("optimizer.learning_rate_factors", "embed=inf"),
        ("optimizer.learning_rate_factors", "embed=-1"),
        ("optimizer.learning_rate_factors", "=1"),
        ("optimizer.learning_rate_factors", "[=1"),
        ("data.weights", "1e-300,1e300"),
        ("data.weights", "nan"),
        ("data.weights", "1,,2"),
    ],
)
def test_lists_in_text_are_read_when_they_are_checked(name, value):
    broken = preset("tiny")
    put(broken, name, value)
    assert refused(validate, broken).startswith(f"{name}: got ")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.gla.expand_k": 1e-9}, "expand_k * d_model is 0"),
        ({"model.mixer": "retnet", "model.retnet.expand_v": 1e-9}, "expand_v * d_model is 0"),
        ({"model.mixer": "mamba", "model.mamba.expand": 1e-9}, "expected at least one channel"),
        ({"model.mixer": "mamba", "model.mamba.dt_min": 0.5}, "expected dt_min <= dt_max"),
        ({"train.batch_size": 2**30}, "tokens in one batch"),
        ({"eval.batch_size": 2**30}, "eval.batch_size: "),
        ({"mesh.tensor": -1}, "mesh: data and tensor are -1"),
        ({"model.mixer": "gla,,gla"}, "unknown mixer ''"),
        ({"model.mixer": ",".join(["gla"] * 257), "model.num_layers": 257}, "a pattern of 257 layers"),
        ({"model.mixer": "GLA"}, "nearest first: gla,"),
        (
            {
                "model.mixer": "linear_attention",
                "model.linear_attention.key_width": 65_536,
                "model.linear_attention.feature_map": "taylor2",
            },
            "features of it",
        ),
    ],
)
def test_settings_that_do_not_fit_one_another(changes, message):
    broken = preset("tiny")
    for name, value in changes.items():
        put(broken, name, value)
    assert message in refused(validate, broken)


# --- A config.json that is reopened -----------------------------------------------------------------------------------


@pytest.fixture
def reopen(tmp_path):
    """reopen(values): what evaluate, generate, compare and --init_from read of a run."""

    def read(values):
        text = values if isinstance(values, str) else json.dumps(values)
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        return checkpoints.read_config(tmp_path)

    return read


def test_a_reopened_config_with_a_value_replaced_is_refused(reopen):
    assert reopen(json.loads(to_json(preset("tiny")))) == preset("tiny")
    for name, declared in DECLARED.items():
        for value in bad_values(declared):
            if isinstance(value, int) and abs(value) > 10**4000:  # no JSON that Python writes
                continue
            values = value
            for part in reversed(name.split(".")):
                values = {part: values}
            message = refused(reopen, values)
            assert name in message and "config.json" in message and "\n" not in message, (name, value)


def test_a_reopened_config_with_a_section_replaced_is_refused(reopen):
    saved = json.loads(to_json(preset("tiny")))
    for section in saved:
        for value in (None, 3, [], "x", {"unknown": 1}):
            message = refused(reopen, saved | {section: value})
            assert section in message and "\n" not in message, value


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("[" * 200_000, "brackets without end"),
        ('{"train": {"steps": ' + "9" * 9999 + "}}", "not valid JSON"),
        ("\udcff\udcfe", "is no config of a run"),
        ("null", "expected an object"),
        ('{"train": {"steps": 1e400}}', "train.steps"),
        ('{"x": "' + "y" * (1 << 20) + '"}', "larger than 1,048,576 bytes"),
        ('{"' + "y" * 100_000 + '": 1}', "unknown setting"),
        ('{"model": {"num_layers": -3}}', "model.num_layers: got -3"),
        ('{"model": {"gla": {"num_heads": 7}}}', "7 heads do not divide"),
    ],
    ids=lambda text: settings.shown(text, 30),
)
def test_rubbish_in_place_of_a_config_is_one_line(text, message, reopen):
    found = refused(reopen, text)
    assert message in found and len(found) < 600


def test_whole_numbers_may_be_written_as_others_and_the_reverse():
    read = from_json('{"train": {"steps": 1000.0}, "optimizer": {"learning_rate": 1}}')
    assert (read.train.steps, read.optimizer.learning_rate) == (1000, 1.0)
    assert type(read.train.steps) is int and type(read.optimizer.learning_rate) is float


# --- A command line ---------------------------------------------------------------------------------------------------


def parse(*arguments):
    values = flags.FlagValues()
    command_line.define_and_parse(["train.py", *arguments, "--config=configs/gla.py:tiny"], values)
    return values["config"].value


def test_flags_read_numbers_as_people_write_them():
    read = parse(
        "--config.train.steps=1e3", "--config.train.batch_size", "16", "--config.eval.every=1_000",
        "--config.optimizer.learning_rate=1", "--noconfig.metrics.tensorboard", "--config.metrics.wandb=t",
        "--config.data.source=a=b",
    )  # fmt: skip
    assert (read.train.steps, read.train.batch_size, read.eval.every) == (1000, 16, 1000)
    assert (read.optimizer.learning_rate, read.metrics.tensorboard, read.metrics.wandb) == (1.0, False, True)
    assert read.data.source == "a=b"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.train.steps=1.5", "train.steps: got '1.5', expected a whole number, at least 1 step"),
        ("--config.train.steps=1e400", "expected a whole number"),
        ("--config.train.steps=" + "9" * 5000, "expected a whole number"),
        ("--config.train.steps=", "got '', expected a whole number"),
        ("--config.train.steps", "the value is missing; steps of the run; at least 1 step"),
        ("--noconfig.train.steps", "only a setting that is True or False"),
        ("--config.optimizer.learning_rate=fast", "got 'fast', expected a number"),
        ("--config.model.gla=3", "it is a section, of model.gla.biases"),
        ("--config.", "unknown config field ''"),
        ("--config." + "x" * 10**5 + "=1", "unknown config field"),
    ],
    ids=lambda text: settings.shown(text, 30),
)
def test_flags_that_cannot_be_read(argument, message):
    found = refused(parse, argument)
    assert message in found and len(found) < 400


@pytest.mark.parametrize(
    "asked, meant",
    [
        ("optimizer.lr", "optimizer.learning_rate"), ("lr", "optimizer.learning_rate"),
        ("train.bs", "train.batch_size"), ("batches", "eval.batches"), ("train.seq_len", "train.context_length"),
        ("model.layers", "model.num_layers"), ("model.n_layer", "model.num_layers"), ("model.dim", "model.d_model"),
        ("model.d_modle", "model.d_model"), ("optimizer.warmup", "optimizer.warmup_steps"), ("steps", "train.steps"),
        ("train.learning_rate", "optimizer.learning_rate"), ("optimizer.wd", "optimizer.weight_decay"),
        ("optimizer.beta1", "optimizer.b1"), ("Train.Steps", "train.steps"), ("data.src", "data.source"),
    ],
)  # fmt: skip
def test_an_unknown_setting_suggests_the_one_that_was_meant(asked, meant):
    assert settings.suggestions(asked, DECLARED)[0] == meant
    assert f"did you mean {meant}" in refused(parse, f"--config.{asked}=1")


def test_list_and_help_say_what_every_setting_is():
    for shown in (command_line.listing(), command_line.settings_listing()):
        rows = {line.split()[0]: line for line in shown.splitlines() if "." in line}
        for name, declared in DECLARED.items():
            assert declared.describe() in rows[name] and repr(declared.default) in rows[name]
    assert "at least 1 step" in DECLARED["train.steps"].describe()
    assert "or 0: off" in DECLARED["optimizer.clip_norm"].describe()
    assert "muon (matrices by Muon" in DECLARED["optimizer.name"].describe()


def test_list_of_a_config_shows_what_it_is_and_costs():
    chosen = parse("--config.model.mixer=gla,gla,attention", "--config.train.steps=7")
    shown = command_line.config_listing(chosen)
    rows = {line[2:].split()[0]: line for line in shown.splitlines() if "." in line}
    assert rows["train.steps"].startswith("* ") and rows["train.seed"].startswith("  ")
    assert "model.attention.num_heads" in rows and "model.mamba.expand" not in rows
    chosen.model.vocab_size = 320
    assert f"{num_parameters(chosen.model):,}" in shown and "FLOPs" in shown and "optimizer" in shown
    chosen.train.steps = 0
    assert "train.steps" in refused(command_line.config_listing, chosen)


def test_the_table_in_the_docs_is_what_the_declarations_say():
    spec = importlib.util.spec_from_file_location("docs_settings", ROOT / "docs" / "settings.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert (ROOT / "docs" / "settings.md").read_text() == page.render(), "run python docs/settings.py"


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimate_of_the_optimizers_memory_is_what_it_allocates(optimizer):
    chosen = preset("tiny")
    chosen.model.vocab_size, chosen.optimizer.name = 4096, optimizer
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(chosen.model, rngs=nnx.Rngs(0))), nnx.Param)
    state = jax.eval_shape(make_optimizer(chosen.optimizer, 10, params).init, params)
    allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert memory.training(chosen).optimizer == pytest.approx(allocated, rel=0.01)


def test_a_size_beyond_the_memory_is_refused_with_the_numbers(monkeypatch):
    chosen, mesh = preset("tiny"), make_mesh(MeshConfig(), jax.devices()[:1])
    chosen.model.vocab_size = 320
    needed = sum(memory.training(chosen))
    monkeypatch.setattr(memory, "host_memory", lambda: needed)
    memory.check_training(chosen, mesh)
    monkeypatch.setattr(memory, "host_memory", lambda: needed - 1)
    message = refused(memory.check_training, chosen, mesh)
    assert f"{num_parameters(chosen.model):,} parameters" in message and memory.amount(needed) in message
    chosen.train.batch_size *= 1000
    assert "lower train.batch_size" in refused(memory.check_training, chosen, mesh)
    chosen.train.batch_size, chosen.eval.batch_size = 1, 10_000
    assert "lower eval.batch_size" in refused(memory.check_training, chosen, mesh)
    monkeypatch.setattr(memory, "host_memory", lambda: 4 * num_parameters(chosen.model) - 1)
    assert "RUN: its " in refused(memory.check_parameters, chosen.model, "RUN")
    assert "lower --context_length" in refused(memory.check_forward, chosen, INT_MAX)
    model = nnx.eval_shape(lambda: LanguageModel(chosen.model, rngs=nnx.Rngs(0)))
    memory.check_state(model, 1, INT_MAX)  # a recurrence keeps as much at any length
    assert "lower max_tokens" in refused(memory.check_state, model, 10**6, 1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_largest_widths_are_refused_for_their_memory(mixer):
    """Without an answer that takes long, and without one that is no number."""
    chosen = preset("tiny")
    chosen.model.mixer, chosen.model.d_model, chosen.model.vocab_size = mixer, 2**20, INT_MAX
    if mixer not in CAUSAL_MIXERS:
        chosen.model.direction, chosen.train.objective = "bidirectional", "masked_tokens"
    validate(chosen)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert " TB of memory" in refused(memory.check_training, chosen, mesh)
