"""Every setting: its unit, its default and its check, declared once."""

import dataclasses

from zoo import lists
from zoo.layers import MLPS
from zoo.mixers import BIDIRECTIONAL, CAUSAL, MIXERS
from zoo.settings import section, setting
from zoo.sharding import MeshConfig

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
    unrolled: int = setting(
        4, "so many layers alike, or fewer, are no loop, with remat=none: longer to compile, faster to train",
        unit="layer",
    )  # fmt: skip
    dtype: str = setting("float32", "of the computation; parameters are float32", choices=DTYPES, also=("precision",))


# Settings of the model that say how it is computed, and nothing of what.
HOW = ("remat", "unrolled")

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
    rank: int = setting(
        0, "of the updates of matrices that are kept from the teacher; of stage logits", at_most=65_536,
        zero="they train whole", also=("lora_rank",),
    )  # fmt: skip
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
