"""Mamba's two synthetic tasks (arXiv:2312.00752), in reduced forms for a CPU."""

from collections.abc import Iterator

from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.data.synthetic import make


def copying_setups() -> Iterator[Setup]:
    """From a 32nd of the published length: S4D starts from 32 times its usual dt, so that its longest memory,
    2 / dt_min tokens, is half of the length, as published. What Mamba forgets, tokens decide: its dt starts as usual.

    As many tokens as published, in as wide a model, and half of both: what S4D copies, it copies by having room.
    """
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=200, final_fraction=0.0)
    in_proportion = {"state_dim": 16, "dt_min": 32e-3, "dt_max": 3.2}  # of as large a state as Mamba's
    for copies, width, steps, label in ((8, 32, 4000, "copying_8"), (16, 64, 6000, "")):
        task = make("selective_copying", vocab_size=16, length=128, copies=copies)
        for mixer, published, settings in (("mamba", "99.8", {}), ("s4d", "18.3", in_proportion)):
            yield Setup(task, mixer, published, steps, 32, optimizer, d_model=width, settings=settings, label=label)


def induction_setups() -> Iterator[Setup]:
    """To hold on to a token 64 times as long as ever asked to, a short run needs channels that are slow from the start
    and a b2 of 0.999: with 0.95 what it learns it loses again once the loss is near 0 (docs/benchmarks.md).
    """
    task = make("induction_heads", vocab_size=18, length=64)  # 16 regular tokens
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=400, final_fraction=0.0, weight_decay=0.0, b2=0.999)
    lengths = tuple(2**i for i in range(7, 13))
    settings = {"dt_min": 1e-4}
    yield Setup(task, "mamba", "100", 12_000, 8, optimizer, d_model=64, test_lengths=lengths, settings=settings)
