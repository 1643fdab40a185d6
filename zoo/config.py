"""The whole config, typed: every setting, its unit, its default and its check.

`configs/<name>.py` fill it, flags (`--config.model.mixer=retnet`) override it, `validate` checks it as a whole before
anything is allocated, and `to_json` saves it beside the checkpoints. The section of each family comes from the mixer
registry, and every section is always there, so that any config can swap to any mixer by a flag.
"""

import dataclasses
import difflib
import json
import math
import re
import typing
from typing import Any

from zoo.errors import UsageError
from zoo.layers import MLPS
from zoo.mixers import MIXERS
from zoo.sharding import MeshConfig

MLP_LAYER = "mlp"  # in a pattern: an MLP as a layer of its own
REMAT = ("none", "minimal", "full", "family")
POSITIONS = ("rope", "learned", "none")
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclasses.dataclass
class _ModelFields:
    mixer: str = "gla"  # families, comma-separated: a pattern tiled over the depth; `mlp` is a layer of its own
    num_layers: int = 6  # a multiple of the pattern's length
    d_model: int = 128
    d_ff: int = 0  # the MLP's inner width; 0: what brings each layer to about 12 d_model^2 parameters
    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 64
    mlp: str = "swiglu"  # swiglu, gelu (no gate), channel_mixing (RWKV's), or none (no MLP in a block)
    positions: str = "rope"  # rope (in softmax attention), learned (added to the embedding), none
    max_positions: int = 0  # tokens; the table's length where positions are learned
    tie_embeddings: bool = True  # the head is the embedding, transposed
    norm_epsilon: float = 1e-5
    dropout: float = 0.0  # probability, on the embedding and on what each mixer and MLP adds
    logit_softcap: float = 0.0  # c: logits become c tanh(logits / c); 0: off
    remat: str = "none"  # what the backward pass recomputes: none, minimal, full, family
    dtype: str = "float32"  # of the computation: float32 or bfloat16; parameters are float32


ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [
        (name, mixer.config_class, dataclasses.field(default_factory=mixer.config_class))
        for name, mixer in MIXERS.items()
    ],
    bases=(_ModelFields,),
    namespace={"__doc__": "The model; one section a family, of which those in `mixer` count.", "__module__": __name__},
)


@dataclasses.dataclass
class DataConfig:
    source: str = (
        "stdlib"  # `stdlib`; paths and globs of txt, jsonl, parquet (.gz, .zst); or a task of zoo.data.synthetic
    )
    weights: str = ""  # one number a source, comma-separated; empty: by their number of tokens
    tokenizer: str = "bytes"  # `bytes`, or the path of a tokenizer.json
    text_field: str = "text"  # the field of jsonl, the column of parquet
    validation_source: str = ""  # a path or glob; empty: a part of `source`
    validation_fraction: float = 0.05  # of the documents of a source that brings no validation split
    cache_dir: str = ""  # of tokenized text; empty: the user's cache directory
    read_threads: int = 1


@dataclasses.dataclass
class TrainConfig:
    steps: int = 1000
    batch_size: int = 16  # sequences a step, over all devices and microbatches
    context_length: int = 256  # tokens a sequence
    seed: int = 0
    accumulate_steps: int = 1  # microbatches a step
    log_every: int = 10  # steps


@dataclasses.dataclass
class OptimizerConfig:
    name: str = "adamw"  # adamw, or muon (matrices by Muon, all else by AdamW)
    learning_rate: float = 3e-3
    schedule: str = "cosine"  # cosine, linear, wsd (warm-up, stable, decay), constant
    warmup_steps: int = 50
    decay_steps: int = 0  # of wsd's last phase; 0: a fifth of train.steps
    final_fraction: float = 0.1  # of the learning rate, at the last step
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # Muon's
    clip_norm: float = 1.0  # of the whole gradient; 0: off
    learning_rate_factors: str = ""  # "regex=factor,..." over parameter paths


@dataclasses.dataclass
class CheckpointConfig:
    every: int = 200  # steps
    keep_last: int = 2
    keep_best: int = 1  # by validation loss


@dataclasses.dataclass
class EvalConfig:
    every: int = 200  # steps; 0: only at the end
    batches: int = 0  # of the validation split; 0: all of it
    batch_size: int = 0  # sequences; 0: train.batch_size


@dataclasses.dataclass
class MetricsConfig:
    tensorboard: bool = True
    wandb: bool = False


def _section(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass
class Config:
    model: ModelConfig = _section(ModelConfig)
    data: DataConfig = _section(DataConfig)
    train: TrainConfig = _section(TrainConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig)
    mesh: MeshConfig = _section(MeshConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    eval: EvalConfig = _section(EvalConfig)
    metrics: MetricsConfig = _section(MetricsConfig)


# --- Sizes ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    num_layers: int
    d_model: int
    batch_size: int  # sequences
    context_length: int  # tokens
    optimizer: str
    learning_rate: float
    steps: int
    warmup_steps: int
    dtype: str
    remat: str


# Depths divide by 3 (and from 125m on by 2 and 4), for patterns of so many layers. tiny: wide rather than deep, since
# a CPU multiplies wide matrices at twice the rate of narrow ones; steps for two to three minutes on 2 cores, by Muon,
# which needs about half of AdamW's. 125m to 1.3b: shapes and learning rates of GPT-3's table (Brown et al. 2020,
# arXiv:2005.14165), a batch of half a million tokens, steps for about 20 tokens a parameter.
SIZES = {
    "tiny": Size(3, 256, 8, 256, "muon", 1e-2, 180, 10, "float32", "none"),
    "125m": Size(12, 768, 256, 2048, "adamw", 6e-4, 5_000, 500, "bfloat16", "none"),
    "340m": Size(24, 1024, 256, 2048, "adamw", 4e-4, 15_000, 1_000, "bfloat16", "minimal"),
    "1.3b": Size(24, 2048, 256, 2048, "adamw", 2e-4, 50_000, 1_000, "bfloat16", "full"),
}


def preset(size: str) -> Config:
    """The config of a size with the default mixer; `configs/*.py` choose the mixer.

    Raises:
      UsageError: an unknown size.
    """
    if size not in SIZES:
        raise UsageError(f"unknown size {size!r}; expected one of {', '.join(SIZES)} (as in --config=gla:tiny)")
    s = SIZES[size]
    config = Config()
    config.model.num_layers, config.model.d_model, config.model.dtype = s.num_layers, s.d_model, s.dtype
    config.model.remat = s.remat
    config.train.batch_size, config.train.context_length, config.train.steps = s.batch_size, s.context_length, s.steps
    config.optimizer.name, config.optimizer.learning_rate = s.optimizer, s.learning_rate
    config.optimizer.warmup_steps = s.warmup_steps
    if size == "tiny":
        config.checkpoint.every = config.eval.every = 100
        config.eval.batches = 32
    else:
        config.checkpoint.every = config.eval.every = 1000
    return config


# --- The pattern and the widths ---------------------------------------------------------------------------------------


def pattern(model: ModelConfig) -> list[str]:
    """The families of the repeating unit."""
    return [name.strip() for name in model.mixer.split(",")]


def mlp_width(model: ModelConfig, layer: str) -> int:
    """The inner width of a layer's MLP; 0 if it has none.

    With `d_ff` 0 it is what brings the layer (mixer and MLP) to 12 d_model^2 parameters, so that families whose
    mixers differ in size compare at equal size; rounded to a multiple of 8, of 64 from d_model 512 on.
    """
    if layer != MLP_LAYER and model.mlp == "none":
        return 0
    if model.d_ff:
        return model.d_ff
    mixer = 0 if layer == MLP_LAYER else MIXERS[layer].num_parameters(getattr(model, layer), model.d_model)
    mlp = MLPS["swiglu" if model.mlp == "none" else model.mlp]
    multiple = 64 if model.d_model >= 512 else 8
    return round(mlp.width(model.d_model, 12 * model.d_model**2 - mixer) / multiple) * multiple


# --- Checks -----------------------------------------------------------------------------------------------------------


def nearest(name: str, known: list[str]) -> str:
    """`known`, those spelt most like `name` first."""
    return ", ".join(sorted(known, key=lambda k: -difflib.SequenceMatcher(None, name, k).ratio()))


def _check_model(model: ModelConfig) -> list[str]:
    problems = []
    layers = pattern(model)
    for name in dict.fromkeys(layers):
        if name not in MIXERS and name != MLP_LAYER:
            known = nearest(name, [*MIXERS, MLP_LAYER])
            problems.append(f"model.mixer: unknown mixer {name!r}; known, nearest first: {known}")
    if model.num_layers < 1 or model.num_layers % len(layers):
        near = max(1, round(model.num_layers / len(layers))) * len(layers)
        problems.append(
            f"model.num_layers: {model.num_layers} layers are no multiple of the {len(layers)} layers of the pattern "
            f"{model.mixer!r}; use {near}, or another pattern"
        )
    if model.d_model < 1:
        problems.append(f"model.d_model: got {model.d_model}, expected at least 1")
    for field, options in (("mlp", (*MLPS, "none")), ("positions", POSITIONS), ("remat", REMAT), ("dtype", DTYPES)):
        value = getattr(model, field)
        if value not in options:
            problems.append(f"model.{field}: got {value!r}, expected one of {', '.join(options)}")
    if problems:
        return problems  # what follows needs a pattern and a width
    for name in dict.fromkeys(layers):
        if name == MLP_LAYER:
            continue
        settings = getattr(model, name)
        family = [f"model.{name}.{problem}" for problem in MIXERS[name].check(settings, model.d_model)]
        problems += family
        if not family and mlp_width(model, name) < 1 and model.mlp != "none":
            size = MIXERS[name].num_parameters(settings, model.d_model) / model.d_model**2
            problems.append(
                f"model.d_ff: {name}'s own parameters ({size:.1f} d_model^2) leave none of a layer's 12 d_model^2 for "
                f"the MLP; set model.d_ff, or model.mlp=none"
            )
    if model.d_ff < 0:
        problems.append(f"model.d_ff: got {model.d_ff}, expected a width, or 0 for the default")
    if model.vocab_size < 0:
        problems.append(f"model.vocab_size: got {model.vocab_size}, expected a size, or 0 for the tokenizer's")
    if not 0 <= model.dropout < 1:
        problems.append(f"model.dropout: got {model.dropout}, expected a probability in [0, 1)")
    if model.norm_epsilon <= 0:
        problems.append(f"model.norm_epsilon: got {model.norm_epsilon}, expected more than 0")
    if model.logit_softcap < 0:
        problems.append(f"model.logit_softcap: got {model.logit_softcap}, expected a cap, or 0 for none")
    if model.positions == "learned" and model.max_positions < 1:
        problems.append("model.max_positions: learned positions need a table; set it to at least train.context_length")
    return problems


def _check_training(config: Config) -> list[str]:
    train, optimizer, problems = config.train, config.optimizer, []
    at_least = {
        "train.steps": (train.steps, 1, "step"),
        "train.batch_size": (train.batch_size, 1, "sequence"),
        "train.context_length": (train.context_length, 1, "token"),
        "train.accumulate_steps": (train.accumulate_steps, 1, "microbatch"),
        "train.log_every": (train.log_every, 1, "step"),
        "train.seed": (train.seed, 0, ""),
        "optimizer.warmup_steps": (optimizer.warmup_steps, 0, "step"),
        "optimizer.decay_steps": (optimizer.decay_steps, 0, "step"),
        "checkpoint.every": (config.checkpoint.every, 1, "step"),
        "checkpoint.keep_last": (config.checkpoint.keep_last, 1, "checkpoint"),
        "checkpoint.keep_best": (config.checkpoint.keep_best, 0, "checkpoint"),
        "eval.every": (config.eval.every, 0, "step"),
        "eval.batches": (config.eval.batches, 0, "batch"),
        "eval.batch_size": (config.eval.batch_size, 0, "sequence"),
        "data.read_threads": (config.data.read_threads, 0, "thread"),
    }
    for field, (value, least, unit) in at_least.items():
        if value < least:
            problems.append(f"{field}: got {value}, expected at least {least} {unit}".rstrip())
    if train.accumulate_steps > 0 and train.batch_size % train.accumulate_steps:
        problems.append(
            f"train.accumulate_steps: {train.batch_size} sequences do not split into {train.accumulate_steps} "
            "microbatches; choose a divisor of train.batch_size"
        )
    if config.model.positions == "learned" and 0 < config.model.max_positions < train.context_length:
        problems.append(
            f"model.max_positions: a table of {config.model.max_positions} is shorter than train.context_length = "
            f"{train.context_length}; make it at least that"
        )
    if optimizer.name not in OPTIMIZERS:
        problems.append(f"optimizer.name: got {optimizer.name!r}, expected one of {', '.join(OPTIMIZERS)}")
    if optimizer.schedule not in SCHEDULES:
        problems.append(f"optimizer.schedule: got {optimizer.schedule!r}, expected one of {', '.join(SCHEDULES)}")
    if optimizer.warmup_steps > train.steps:
        problems.append(
            f"optimizer.warmup_steps: a warm-up of {optimizer.warmup_steps} steps is longer than train.steps = "
            f"{train.steps}; shorten it"
        )
    for field, low, high in (
        ("learning_rate", 0, math.inf), ("weight_decay", 0, math.inf), ("clip_norm", 0, math.inf), ("eps", 0, math.inf),
        ("final_fraction", 0, 1), ("b1", 0, 1), ("b2", 0, 1), ("momentum", 0, 1),
    ):  # fmt: skip
        value = getattr(optimizer, field)
        if not low <= value <= high or not math.isfinite(value):
            problems.append(f"optimizer.{field}: got {value}, expected a number from {low} to {high}")
    for entry in filter(None, optimizer.learning_rate_factors.split(",")):
        regex, _, factor = entry.rpartition("=")
        try:
            re.compile(regex)
            if not regex or float(factor) < 0:
                raise ValueError
        except (re.error, ValueError):
            problems.append(f"optimizer.learning_rate_factors: got {entry!r}, expected regex=factor, as in embed=0.1")
    if not 0 < config.data.validation_fraction < 1:
        problems.append(f"data.validation_fraction: got {config.data.validation_fraction}, expected a share in (0, 1)")
    return problems


def validate(config: Config) -> None:
    """Check everything that needs neither files nor devices.

    Raises:
      UsageError: with every problem found, one a line.
    """
    _refuse(_check_model(config.model) + _check_training(config))


def validate_model(model: ModelConfig) -> None:
    """`validate` of the model alone."""
    _refuse(_check_model(model))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UsageError("\n       ".join(problems))


# --- JSON and differences ---------------------------------------------------------------------------------------------


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    found = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found.update(leaves(value, name + ".") if dataclasses.is_dataclass(value) else {name: value})
    return found


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config of `to_json`. Settings that the text lacks keep their defaults.

    Raises:
      UsageError: not JSON, an unknown setting, or a value of another type.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"config: not valid JSON ({error})") from error
    return _fill(Config(), values, "")


def _fill(section: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UsageError(f"config: {prefix.rstrip('.') or 'the whole'} is {values!r}, expected an object of settings")
    types = typing.get_type_hints(type(section))
    for name, value in values.items():
        if name not in types:
            raise UsageError(
                f"config: unknown setting {prefix + name!r}; known, nearest first: {nearest(name, [*types])}"
            )
        current = getattr(section, name)
        if dataclasses.is_dataclass(current):
            _fill(current, value, f"{prefix}{name}.")
            continue
        if types[name] is float and type(value) is int:
            value = float(value)
        if type(value) is not types[name]:
            raise UsageError(f"config: {prefix}{name} is {value!r}, expected {types[name].__name__}")
        setattr(section, name, value)
    return section


def difference(old: Config, new: Config) -> list[str]:
    """The settings that differ, each as "model.d_model: 128 -> 256"."""
    before, after = leaves(old), leaves(new)
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
