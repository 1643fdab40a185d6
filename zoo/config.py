"""The whole config, typed: every setting, its unit, its default and its check.

`configs/<name>.py` fill it, flags (`--config.model.mixer=retnet`) override it, `validate` checks it as a whole before
anything is allocated, and `to_json` saves it beside the checkpoints. The section of each family comes from the mixer
registry, and every section is always there, so that any config can swap to any mixer by a flag.
"""

import copy
import dataclasses
import functools
import json
import pathlib
from typing import Any

from zoo import files, lists
from zoo.errors import UsageError
from zoo.layers import MLPS
from zoo.mixers import BIDIRECTIONAL, CAUSAL, MIXERS, passes
from zoo.settings import INT_MAX, declarations, nearest, problems, section, setting, shown
from zoo.sharding import MeshConfig

MLP_LAYER = "mlp"  # in a pattern: an MLP as a layer of its own
MAX_PATTERN = 256  # layers, each of which is compiled
MAX_PROBLEMS = 20  # lines of one error
MAX_JSON = 1 << 20  # bytes of a config.json
REMAT = {
    "none": "", "minimal": "elementwise work", "full": "all", "family": "all but what the family's file names",
}  # fmt: skip
POSITIONS = {"rope": "rotary, in softmax attention", "learned": "added to the embedding", "none": ""}
MLP_CHOICES = {
    "swiglu": "", "geglu": "", "gelu": "no gate", "squared_relu": "no gate",
    "channel_mixing": "RWKV-6's", "channel_mixing_ungated": "RWKV-7's",
    "none": "no MLP in a block",
}  # fmt: skip
DIRECTION_CHOICES = {CAUSAL: "those before it", BIDIRECTIONAL: "all of its document"}
HEAD_CHOICES = {
    "tokens": "the next one, or masked ones", "classes": "the label of a row", "values": "the next steps of a series",
}  # fmt: skip
POOLS = {"mean": "of its positions", "last": "position"}
OBJECTIVES = {"next_token": "by causal models", "masked_tokens": "by bidirectional ones"}
NORM_CHOICES = {"rms_norm": "root mean square, and a scale", "layer_norm": "mean and variance, a scale and a bias"}
NORM_POSITIONS = {"before": "x + f(norm(x))", "after": "x + norm(f(x))", "both": "x + norm(f(norm(x)))"}
DTYPES = ("float32", "bfloat16")
DISTILL_STAGES = {
    "mixers": "each mixer's output, of the teacher's input to its layer", "logits": "the next token's distribution",
}  # fmt: skip
OPTIMIZERS = {"adamw": "", "muon": "matrices by Muon, all else by AdamW"}
SCHEDULES = {"cosine": "", "linear": "", "wsd": "warm-up, stable, decay", "constant": ""}


@dataclasses.dataclass
class _ModelFields:
    mixer: str = setting(
        "gla", "families, comma-separated: a pattern tiled over the depth; `mlp` is a layer too, and a place may have "
        "settings of its own: attention@window=512,attention", parse=lists.places,
    )  # fmt: skip
    direction: str = setting(CAUSAL, "the tokens that a token sees", choices=DIRECTION_CHOICES)
    direction_shared: bool = setting(
        False, "bidirectional mixers that run twice, forward and in reversed time, do so by the same parameters"
    )
    num_layers: int = setting(
        6, "layers, a multiple of the pattern's length", unit="layer", at_most=10_000, also=("depth",)
    )
    d_model: int = setting(128, "the model's width", at_most=2**20, also=("width", "hidden_size", "dim", "n_embd"))
    d_ff: int = setting(
        0, "the MLP's inner width", zero="what brings each layer to about 12 d_model^2 parameters",
        also=("intermediate_size", "hidden_dim"),
    )  # fmt: skip
    head: str = setting("tokens", "what is predicted (zoo/heads)", choices=HEAD_CHOICES, also=("task",))
    head_pool: str = setting("mean", "what the head of classes reads of a row", choices=POOLS, also=("pooling",))
    classes: int = setting(
        0, "labels that a row may have", at_least=2, zero="those of data.source", also=("num_classes", "num_labels")
    )
    channels: int = setting(0, "numbers of a step, where inputs are numbers", zero="those of data.source, or none")
    patch: int = setting(1, "steps of numbers that are one position", unit="step", also=("patch_size", "patch_len"))
    horizon: int = setting(24, "steps that the head of values predicts", unit="step", also=("pred_len",))
    vocab_size: int = setting(
        0, "entries of the vocabulary", zero="the tokenizer's, rounded up to a multiple of 64", also=("n_vocab",)
    )
    mlp: str = setting("swiglu", "what follows the mixer in a block", choices=MLP_CHOICES)
    mlp_layer: str = setting(
        "swiglu", "what layers named `mlp` are, where blocks have none (mlp=none)",
        choices={name: "" for name in MLPS},
    )  # fmt: skip
    mlp_bias: bool = setting(False, "a bias on each projection of the MLP")
    positions: str = setting("rope", "what tells tokens their positions", choices=POSITIONS)
    max_positions: int = setting(0, "the table's length, where positions are learned", unit="token", zero="no table")
    tie_embeddings: bool = setting(True, "the head of tokens is the embedding, transposed")
    norm: str = setting("rms_norm", "of blocks, and before the head", choices=NORM_CHOICES)
    norm_epsilon: float = setting(1e-5, "added to the mean square in norms", at_least=1e-12, at_most=1)
    norm_position: str = setting("before", "where a mixer or MLP f has its norm", choices=NORM_POSITIONS)
    embedding_norm: bool = setting(False, "a norm on the embedding too (RWKV's)")
    dropout: float = setting(
        0.0, "probability, on the embedding and on what each mixer and MLP adds", at_least=0, below=1
    )
    logit_softcap: float = setting(0.0, "c: logits become c tanh(logits / c)", zero="off", at_least=1e-3, at_most=1e6)
    remat: str = setting("none", "what the backward pass recomputes", choices=REMAT)
    dtype: str = setting("float32", "of the computation; parameters are float32", choices=DTYPES, also=("precision",))


ModelConfig = dataclasses.make_dataclass(
    "ModelConfig",
    [(name, mixer.config_class, section(mixer.config_class)) for name, mixer in MIXERS.items()],
    bases=(_ModelFields,),
    namespace={"__doc__": "The model; one section a family, of which those in `mixer` count.", "__module__": __name__},
)


@dataclasses.dataclass
class DataConfig:
    source: str = setting(
        "stdlib", "`stdlib`; paths and globs of txt, jsonl, parquet (.gz, .zst); hf:NAME; a task of docs/data.md",
        also=("dataset", "train_file", "files"),
    )  # fmt: skip
    weights: str = setting(
        "", "one number a source, comma-separated; empty: by their number of tokens", parse=lists.weights
    )
    tokenizer: str = setting("bytes", "`bytes`, or the path of a tokenizer.json")
    text_field: str = setting("text", "the field of jsonl, the column of parquet")
    validation_source: str = setting("", "a path or glob; empty: a part of `source`")
    validation_fraction: float = setting(
        0.05, "share of the documents that validates, of a source without a validation split", above=0, below=1
    )
    max_lost_text: float = setting(
        0.01, "share of a source's bytes that the tokenizer may have no tokens for", at_least=0, at_most=1
    )
    cache_dir: str = setting("", "of tokenized text; empty: the user's cache directory")
    season: int = setting(
        0, "steps of a series' season, for the baseline that repeats it", unit="step", zero="none", also=("period",)
    )
    read_threads: int = setting(
        1, "threads that read ahead", unit="thread", zero="none", at_most=1024, also=("num_workers",)
    )


@dataclasses.dataclass
class MaskConfig:
    """Of the objective masked_tokens: zoo/data/masking.py."""

    share: float = setting(0.15, "of a row's tokens, those to predict", above=0, at_most=1)
    span_length: int = setting(1, "tokens that are chosen together", unit="token", at_most=1024)
    masked: float = setting(0.8, "of those, the share that the mask token replaces", at_least=0, at_most=1)
    random: float = setting(0.1, "and the share that another token replaces; the rest stays", at_least=0, at_most=1)


@dataclasses.dataclass
class DistillConfig:
    """Of zoo/linearize/distill.py."""

    teacher: str = setting(
        "", "workdir of the run to learn from, too; empty: from the text alone", also=("from", "teacher_model")
    )
    stage: str = setting("logits", "what of the teacher is learnt", choices=DISTILL_STAGES)
    temperature: float = setting(1.0, "logits are divided by it; of stage logits", at_least=1e-2, at_most=100)
    tokens_weight: float = setting(
        0.0, "share of the tokens' own loss; of stage logits", at_least=0, at_most=1, also=("alpha", "ce_weight")
    )
    teacher_dtype: str = setting(
        "run",
        "of the teacher's computation",
        choices={"run": "that of its run", "float32": "", "bfloat16": "its matrices, too"},
    )


@dataclasses.dataclass
class TrainConfig:
    objective: str = setting("next_token", "which tokens the head of tokens predicts", choices=OBJECTIVES)
    steps: int = setting(1000, "steps of the run", unit="step", also=("iterations", "max_iters", "num_updates"))
    batch_size: int = setting(
        16, "sequences a step, over all devices and microbatches", unit="sequence", also=("bs", "bsz")
    )
    context_length: int = setting(
        256, "tokens a sequence", unit="token", also=("sequence_length", "seq_len", "block_size", "max_length")
    )
    seed: int = setting(0, "of initial weights, order and dropout", at_least=0, at_most=2**32 - 1)
    accumulate_steps: int = setting(1, "microbatches a step", unit="microbatch", also=("grad_accum",))
    log_every: int = setting(10, "steps between rows of metrics", unit="step")
    mask: MaskConfig = section(MaskConfig)
    distill: DistillConfig = section(DistillConfig)


@dataclasses.dataclass
class OptimizerConfig:
    name: str = setting("adamw", "which rule", choices=OPTIMIZERS)
    learning_rate: float = setting(3e-3, "the largest of the schedule", at_least=0, at_most=10_000, also=("lr",))
    schedule: str = setting("cosine", "how the learning rate falls", choices=SCHEDULES)
    warmup_steps: int = setting(50, "steps of its linear rise", unit="step", at_least=0)
    decay_steps: int = setting(0, "of wsd's last phase", unit="step", zero="a fifth of train.steps")
    final_fraction: float = setting(0.1, "of the learning rate, at the last step", at_least=0, at_most=1)
    weight_decay: float = setting(0.1, "of matrices, times the learning rate", at_least=0, at_most=10_000, also=("wd",))
    b1: float = setting(0.9, "Adam's mean of gradients forgets at 1 - b1", at_least=0, below=1, also=("beta1",))
    b2: float = setting(0.95, "of their squares at 1 - b2", at_least=0, below=1, also=("beta2",))
    eps: float = setting(1e-8, "Adam's, beside the root", above=0, at_most=1e6, also=("epsilon",))
    momentum: float = setting(0.95, "Muon's", at_least=0, below=1)
    clip_norm: float = setting(1.0, "of the whole gradient", zero="off", above=0, also=("grad_clip", "max_grad_norm"))
    learning_rate_factors: str = setting(
        "", '"regex=factor,..." over parameter paths', parse=lists.learning_rate_factors
    )
    trainable: str = setting(
        "", "a regex over parameter paths: those without a match stay as they are; empty: all train, and in "
        "train.distill.stage=mixers those mixers", parse=lists.regex, also=("freeze", "trainable_parameters"),
    )  # fmt: skip


@dataclasses.dataclass
class CheckpointConfig:
    every: int = setting(200, "steps between checkpoints", unit="step")
    keep_last: int = setting(2, "newest checkpoints kept", unit="checkpoint")
    keep_best: int = setting(1, "best checkpoints kept, by validation loss", unit="checkpoint", at_least=0)


@dataclasses.dataclass
class EvalConfig:
    every: int = setting(200, "steps between evaluations", unit="step", zero="only at the end")
    batches: int = setting(0, "of the validation split", unit="batch", zero="all of it")
    final_batches: int = setting(0, "of the validation split, at the last step", unit="batch", zero="all of it")
    batch_size: int = setting(0, "sequences a batch", unit="sequence", zero="train.batch_size")


@dataclasses.dataclass
class MetricsConfig:
    tensorboard: bool = setting(True, "write TensorBoard events")
    wandb: bool = setting(False, "write to Weights & Biases")


@dataclasses.dataclass
class Config:
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    mesh: MeshConfig = section(MeshConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    eval: EvalConfig = section(EvalConfig)
    metrics: MetricsConfig = section(MetricsConfig)


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
    evaluate_every: int = 1000  # steps; a checkpoint too
    evaluate_batches: int = 0  # before the last evaluation, which is of all


# Depths divide by 3 (and from 125m on by 2 and 4), for patterns of so many layers. tiny: wide rather than deep, since
# a CPU multiplies wide matrices at twice the rate of narrow ones; steps for two to three minutes on 2 cores, by Muon,
# which needs about half of AdamW's. 10m: an afternoon on a laptop, one and a half times the embedded corpus.
# 125m to 1.3b: shapes and learning rates of GPT-3's table (Brown et al. 2020, arXiv:2005.14165), a batch of half a
# million tokens, steps for about 20 tokens a parameter.
SIZES = {
    "tiny": Size(3, 256, 8, 256, "muon", 1e-2, 180, 10, "float32", "none", 100, 32),
    "10m": Size(6, 384, 16, 512, "muon", 5e-3, 2_000, 50, "float32", "none", 200, 16),
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
    config.checkpoint.every = config.eval.every = s.evaluate_every
    config.eval.batches = s.evaluate_batches
    return config


# --- The pattern and the widths ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer of the repeating unit."""

    name: str  # as the pattern has it: "attention@window=512"
    family: str  # or MLP_LAYER
    settings: Any  # the family's section of the config, with what the place sets; None of MLP_LAYER
    passes: int = 1  # of the mixer over the time
    copies: int = 1  # of the mixer's parameters, one a pass unless they are shared

    @property
    def longest(self) -> int | None:
        """Of the mixer, as `Mixer.longest`."""
        return None if self.family == MLP_LAYER else MIXERS[self.family].longest(self.settings)

    def num_parameters(self, d_model: int) -> int:
        """Of the mixer."""
        if self.family == MLP_LAYER:
            return 0
        return self.copies * MIXERS[self.family].num_parameters(self.settings, d_model)

    def flops_per_token(self, d_model: int, context_length: int) -> float:
        """Of the mixer, as `Mixer.flops_per_token`."""
        if self.family == MLP_LAYER:
            return 0.0
        return self.passes * MIXERS[self.family].flops_per_token(self.settings, d_model, context_length)


def pattern(model: ModelConfig) -> list[str]:
    """The families of the repeating unit."""
    return [family for family, _ in lists.places(model.mixer)]


def places(model: ModelConfig) -> list[Place]:
    """The layers of the repeating unit, of known families.

    Raises:
      UsageError: a setting of a place that its family lacks, or a value that it cannot have.
    """
    return [_place(model, family, own) for family, own in lists.places(model.mixer)]


def _place(model: ModelConfig, family: str, own: tuple[tuple[str, str], ...]) -> Place:
    name = "@".join([family, *(f"{setting}={value}" for setting, value in own)])
    if family == MLP_LAYER:
        if own:
            raise UsageError(
                f"model.mixer: {shown(name)}: an MLP has no settings of its own place; set model.mlp, model.d_ff"
            )
        return Place(name, family, None)
    settings = copy.deepcopy(getattr(model, family))
    known = dict(declarations(type(settings)))
    for setting_name, text in own:
        if setting_name not in known:
            near = nearest(setting_name, known, 5)
            raise UsageError(
                f"model.mixer: {shown(name)}: {family} has no setting {shown(setting_name)}; nearest: {near}"
            )
        try:
            value = known[setting_name].read(text)
            problem = known[setting_name].problem(value)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UsageError(f"model.mixer: {shown(name)}: {setting_name}: {problem}")
        *sections, last = setting_name.split(".")
        setattr(functools.reduce(getattr, sections, settings), last, value)
    runs = passes(MIXERS[family], model.direction)
    return Place(name, family, settings, runs, 1 if model.direction_shared else runs)


def mlp_width(model: ModelConfig, place: Place) -> int:
    """The inner width of a layer's MLP; 0 if it has none.

    With `d_ff` 0 it is what brings the layer (mixer and MLP) to 12 d_model^2 parameters, so that families whose
    mixers differ in size compare at equal size; rounded to a multiple of 8, of 64 from d_model 512 on.
    """
    if place.family != MLP_LAYER and model.mlp == "none":
        return 0
    if model.d_ff:
        return model.d_ff
    mixer, mlp = place.num_parameters(model.d_model), mlp_class(model)
    multiple = 64 if model.d_model >= 512 else 8
    return round(mlp.width(model.d_model, 12 * model.d_model**2 - mixer) / multiple) * multiple


def positions(model: ModelConfig, length: int) -> int:
    """Of an input of `length` tokens or steps."""
    return length // model.patch


def mlp_class(model: ModelConfig) -> type:
    """Of the blocks, and of MLPs that are layers of their own."""
    return MLPS[model.mlp_layer if model.mlp == "none" else model.mlp]


# --- Checks -----------------------------------------------------------------------------------------------------------


def _model_problems(model: ModelConfig) -> list[str]:
    found = []
    layers = pattern(model)
    unknown = [name for name in dict.fromkeys(layers) if name not in MIXERS and name != MLP_LAYER]
    for name in unknown[:3]:
        known = nearest(name, [*MIXERS, MLP_LAYER])
        found.append(f"model.mixer: unknown mixer {shown(name)}; known, nearest first: {known}")
    if len(layers) > MAX_PATTERN:
        found.append(
            f"model.mixer: a pattern of {len(layers)} layers; expected at most {MAX_PATTERN}, tiled over the depth"
        )
    elif model.num_layers % len(layers):
        near = max(1, round(model.num_layers / len(layers))) * len(layers)
        found.append(
            f"model.num_layers: {model.num_layers} layers are no multiple of the {len(layers)} layers of the pattern "
            f"{shown(model.mixer)}; use {near}, or another pattern"
        )
    if found:
        return found  # what follows needs a pattern
    for family in dict.fromkeys(layers):
        if family != MLP_LAYER and model.direction not in MIXERS[family].directions:
            found.append(
                f"model.direction: {family} is {MIXERS[family].directions[0]} by its nature, and model.direction is "
                f"{model.direction}; set model.direction={MIXERS[family].directions[0]}, or another mixer"
            )
    if found:
        return found
    try:
        different = {place.name: place for place in places(model) if place.family != MLP_LAYER}
    except UsageError as error:
        return [str(error)]
    for name, place in different.items():
        where = f"model.{name}." if name == place.family else f"model.mixer: {shown(name)}: "
        mixer = MIXERS[place.family]
        wrong = mixer.check(place.settings, model.d_model) + mixer.check_direction(place.settings, model.direction)
        family = [f"{where}{problem}" for problem in wrong]
        found += family
        if not family and mlp_width(model, place) < 1 and model.mlp != "none":
            size = place.num_parameters(model.d_model) / model.d_model**2
            found.append(
                f"model.d_ff: {place.family}'s own parameters ({size:.1f} d_model^2) leave none of a layer's 12 "
                f"d_model^2 for the MLP; set model.d_ff, or model.mlp=none"
                + ", or, as they are those of both ways, model.direction_shared=true"
                * (place.copies > 1)
            )
    if model.head == "tokens" and (model.channels or model.patch > 1):
        name, value = ("channels", model.channels) if model.channels else ("patch", model.patch)
        found.append(f"model.{name}: got {value}, of numbers, and model.head=tokens reads tokens; leave it as it is")
    if model.positions == "learned" and model.max_positions == 0:
        found.append("model.max_positions: learned positions need a table; set it to at least train.context_length")
    return found


def _training_problems(config: Config, layers: list[Place]) -> list[str]:
    train, found = config.train, []
    if train.batch_size % train.accumulate_steps:
        found.append(
            f"train.accumulate_steps: {train.batch_size} sequences do not split into {train.accumulate_steps} "
            "microbatches; choose a divisor of train.batch_size"
        )
    length, context = positions(config.model, train.context_length), f"train.context_length = {train.context_length}"
    context += f" in patches of {config.model.patch}" if config.model.patch > 1 else ""
    if config.model.positions == "learned" and 0 < config.model.max_positions < length:
        found.append(
            f"model.max_positions: a table of {config.model.max_positions} is shorter than {context}; make it at least "
            "that"
        )
    for place in layers:
        if place.longest is not None and place.longest < length:
            found.append(
                f"model.{place.family}.length: {place.longest} is shorter than {context}; make it at least that"
            )
    causal, next_token = config.model.direction == CAUSAL, train.objective == "next_token"
    of_tokens = config.model.head == "tokens"
    if not (of_tokens or next_token):
        found.append(
            f"train.objective: model.head={config.model.head} predicts no tokens, masked or not; leave it at "
            "next_token, or set model.head=tokens"
        )
    if config.model.patch > 1 and train.context_length % config.model.patch:
        near = max(1, round(train.context_length / config.model.patch)) * config.model.patch
        found.append(
            f"train.context_length: {train.context_length} steps are no multiple of model.patch = "
            f"{config.model.patch}; use {near}, or another patch"
        )
    if of_tokens and next_token and not causal:
        found.append(
            "train.objective: a bidirectional model reads the next token, which it would predict; set "
            "train.objective=masked_tokens, or model.direction=causal"
        )
    if of_tokens and causal and not next_token:
        found.append(
            "train.objective: a causal model predicts a masked token from its left alone, as next_token lets it do of "
            "every token; set model.direction=bidirectional, or train.objective=next_token"
        )
    if not next_token and train.mask.masked + train.mask.random > 1:
        found.append(
            f"train.mask.random: {train.mask.random:g} and train.mask.masked = {train.mask.masked:g} are more than all "
            f"tokens to predict; use at most {1 - train.mask.masked:.4g}"
        )
    for name, rows in (("train.batch_size", train.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if rows * train.context_length > INT_MAX:
            found.append(
                f"{name}: {rows} sequences of train.context_length = {train.context_length} are more than {INT_MAX} "
                "tokens in one batch; use fewer"
            )
    axes = [name for name, size in dataclasses.asdict(config.mesh).items() if size == -1]
    if len(axes) > 1:
        default = "; mesh.data is -1 unless it is set" if "data" in axes else ""
        found.append(f"mesh: {' and '.join(axes)} are -1; at most one axis takes what the others leave{default}")
    return found


def unsettled(model: ModelConfig) -> list[str]:
    """Problems of a model whose sizes no data has settled."""
    found = []
    if model.head == "classes" and model.classes == 0:
        found.append("model.classes: got 0, expected the number of labels")
    if model.head == "values" and model.channels == 0:
        found.append("model.channels: got 0, expected the numbers of a step of the series")
    if model.head == "classes" and model.patch > 1 and model.channels == 0:
        found.append(f"model.patch: got {model.patch}, of numbers, and the model reads tokens; set it to 1")
    if model.head != "values" and model.vocab_size == model.channels == 0:
        found.append("model.vocab_size: got 0, expected the number of token ids, such as tokenizer.vocab_size")
    return found


def validate(config: Config) -> None:
    """Check everything that needs neither files nor devices: each setting by itself, then what relates them.

    Raises:
      UsageError: with every problem found, one a line.
    """
    refuse(problems(config))
    of_model = _model_problems(config.model)
    refuse(of_model + _training_problems(config, [] if of_model else places(config.model)))


def validate_model(model: ModelConfig) -> None:
    """`validate` of the model alone."""
    refuse(problems(model, "model.") or _model_problems(model))


def refuse(found: list[str]) -> None:
    """UsageError with the problems found, one a line; none is fine."""
    if found:
        raise UsageError("\n       ".join(found[:MAX_PROBLEMS]))


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


def read_json(path: pathlib.Path) -> Config:
    """`from_json` of a file.

    Raises:
      OSError: as `files.read_bytes`, of more than MAX_JSON bytes too.
      UsageError: as `from_json`, naming the file.
    """
    content = files.read_bytes(path, MAX_JSON)
    try:
        return from_json(content.decode())
    except (UsageError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no config of a run: {error}") from error


def from_json(text: str) -> Config:
    """The config of `to_json`. Settings that the text lacks keep their defaults; `validate` is left to the caller.

    Raises:
      UsageError: not JSON, an unknown setting, or a value of another type.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise UsageError("not valid JSON (brackets without end)") from error
    except ValueError as error:  # and a number of thousands of digits
        raise UsageError(f"not valid JSON ({error})") from error
    config = Config()
    _fill(config, values, "")
    return config


def _fill(config: Any, values: Any, prefix: str) -> None:
    if not isinstance(values, dict):
        raise UsageError(f"{prefix.rstrip('.') or 'the whole'} is {shown(values)}, expected an object of settings")
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name, value in values.items():
        if name not in fields:
            known = nearest(name, fields, 5)
            raise UsageError(f"unknown setting {shown(prefix + name)}; known, nearest first: {known}")
        declared = fields[name].metadata.get("setting")
        if declared is None:
            _fill(getattr(config, name), value, f"{prefix}{name}.")
            continue
        value = declared.convert(value)
        if type(value) is not declared.kind:
            raise UsageError(f"{prefix}{name}: {declared.problem(value)}")
        setattr(config, name, value)


def difference(old: Config, new: Config) -> list[str]:
    """The settings that differ, each as "model.d_model: 128 -> 256"."""
    before, after = leaves(old), leaves(new)
    return [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
