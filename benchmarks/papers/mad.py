"""The six tasks of the MAD suite (arXiv:2403.17844), every family.

Published: width 128, two layers each with a gated MLP, 12,800 rows (256 to memorize) in batches of 128, 200 epochs,
the best of three learning rates and two weight decays, 128 tokens to recall from and 256 to copy from. Reduced: width
64, fresh data, half of the tokens, two learning rates. `compression` is another task than the suite's: see there.
"""

import dataclasses
from collections.abc import Iterator

from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.data.synthetic import Task, make
from zoo.mixers import CAUSAL_MIXERS

_LENGTHS = {
    "in_context_recall": 128, "fuzzy_recall": 128, "noisy_recall": 128, "memorization": 32, "compression": 62,
    "mad_selective_copying": 256,
}  # fmt: skip


def setups() -> Iterator[Setup]:
    optimizer = OptimizerConfig(weight_decay=0.0, warmup_steps=50, final_fraction=0.0)
    shorter = {"memorization": 32, "compression": 30}
    for mixer in CAUSAL_MIXERS:
        for name, length in _LENGTHS.items():
            task = make(name, shorter.get(name, length // 2))
            for rate in (2e-3, 5e-3):
                yield _setup(task, mixer, rate, optimizer, width=64, steps=800, batch_size=32)


def full_setups() -> Iterator[Setup]:
    batch_size, epochs = 128, 200
    for mixer in CAUSAL_MIXERS:
        for name, length in _LENGTHS.items():
            rows = 256 if name == "memorization" else 12_800
            for rate in (1e-4, 5e-4, 1e-3):
                for decay in (0.0, 0.1):
                    optimizer = OptimizerConfig(weight_decay=decay, warmup_steps=0, final_fraction=0.0, b2=0.999)
                    yield _setup(
                        make(name, length), mixer, rate, optimizer,
                        width=128, steps=epochs * (rows // batch_size), batch_size=batch_size, rows=rows,
                    )  # fmt: skip


def _setup(task: Task, mixer: str, rate: float, optimizer: OptimizerConfig, width: int, **sizes) -> Setup:
    return Setup(
        task,
        mixer,
        "-",
        optimizer=dataclasses.replace(optimizer, learning_rate=rate),
        d_model=width,
        model={"mlp": "swiglu", "d_ff": 2 * width},
        is_tuned=True,
        **sizes,
    )
