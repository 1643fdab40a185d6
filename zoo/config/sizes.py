"""The sizes that `--config=gla:tiny` names, of every family."""

import dataclasses

from zoo.config.sections import Config
from zoo.errors import UsageError


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
