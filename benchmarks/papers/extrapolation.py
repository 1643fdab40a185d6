"""Longer than in training, as Mamba's paper asks (arXiv:2312.00752): induction heads, every family.

Published: trained at 256 tokens, tested up to 2^20. Reduced: trained at 64, tested up to 4096, as `mamba_induction`,
where Mamba's channels are slow from the start; here every family starts as it is, softmax attention with rotary
positions and without any, because learned ones end where training did.
"""

import dataclasses
from collections.abc import Iterator

from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.data.synthetic import make
from zoo.mixers import CAUSAL_MIXERS

# Accuracy at the training's length, 2, 4 and 16 times of it.
_PUBLISHED = {"attention": "100 84 31 9", "h3": "100 81 40 15", "mamba": "100 each"}


def setups() -> Iterator[Setup]:
    return _setups(length=64, up_to=12, steps=4000, batch_size=32)


def full_setups() -> Iterator[Setup]:
    return _setups(length=256, up_to=20, steps=204_800, batch_size=8)


def _setups(length: int, up_to: int, **sizes: int) -> Iterator[Setup]:
    task = make("induction_heads", vocab_size=18, length=length)  # 16 regular tokens
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=400, final_fraction=0.0, weight_decay=0.0, b2=0.999)
    lengths = tuple(2**i for i in range(length.bit_length(), up_to + 1))
    for mixer in CAUSAL_MIXERS:
        setup = Setup(
            task, mixer, _PUBLISHED.get(mixer, "-"), optimizer=optimizer, d_model=64, test_lengths=lengths, **sizes
        )
        if mixer == "attention":
            setup = dataclasses.replace(setup, model={"positions": "rope"})
            yield dataclasses.replace(setup, label="no positions", published="-", model={"positions": "none"})
        yield setup
