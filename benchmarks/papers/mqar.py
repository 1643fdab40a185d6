"""Multi-query associative recall (arXiv:2312.04927), every family, by the size of its state.

Published: 8,192 token ids, 100,000 rows, 64 epochs, 2 layers without MLPs, the best of four learning rates, widths of
64 to 512. Reduced: 256 ids, rows of 64 tokens with 8 pairs, fresh data, three learning rates, widths of 16 to 64.

A value stands behind its key, so that a layer has to see two tokens at once, and then tell 8 keys apart. Six families
without a convolution or shift, whose four heads have keys of 8 or 16 channels at width 64, stand a second time: one
head behind a layer of convolutions alone (`conv_linear` without its attention; arXiv:2402.18668 has such layers), three
times the steps, and lower learning rates.
"""

import dataclasses
from collections.abc import Iterator

from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.data.synthetic import make
from zoo.mixers import CAUSAL_MIXERS

# What the paper's figure 2 shows, where it has the family: the width from which rows of 512 tokens are solved.
_PUBLISHED = {"attention": "d >= 64", "h3": "no", "mamba": "d >= 512"}
_SETTINGS = {
    "attention": {"num_heads": 1}, "h3": {"head_dim": 2, "state_dim": 64},  # as there
    "mamba2": {"head_dim": 16},
}  # fmt: skip


# They see the token before this one in their state alone.
_WITHOUT_CONVOLUTION = ("linear_attention", "retnet", "lightning", "gated_retention", "gla", "hgrn2")


def setups() -> Iterator[Setup]:
    task = make("mqar", 64, vocab_size=256, pairs=8)
    optimizer = OptimizerConfig(weight_decay=0.1, warmup_steps=100, final_fraction=0.0)
    sizes, rates = {"steps": 1600, "batch_size": 32}, (2e-3, 5e-3, 1e-2)
    for mixer in CAUSAL_MIXERS:
        for width in (16, 32, 64):
            for rate in rates:
                yield _setup(task, mixer, width, rate, optimizer, **sizes)
    for mixer in _WITHOUT_CONVOLUTION:
        second = {
            "label": "64x8 d=64 second",
            "model": {"mixer": f"conv_linear@attention=false,{mixer}"},
            "settings": {"num_heads": 1},
            "steps": 4800,
        }
        for rate in (5e-4, 1e-3, 2e-3):
            yield _setup(task, mixer, 64, rate, optimizer, **sizes | second)


def full_setups() -> Iterator[Setup]:
    rows, epochs = 100_000, 64
    optimizer = OptimizerConfig(weight_decay=0.1, warmup_steps=0, final_fraction=0.0, b2=0.999)
    for mixer in CAUSAL_MIXERS:
        for length, pairs, batch_size in ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128)):
            task = make("mqar", length, vocab_size=8192, pairs=pairs)
            for width in (64, 128, 256, 512):
                for rate in (1e-4, 4.6e-4, 2.2e-3, 1e-2):
                    steps = epochs * (rows // batch_size)
                    yield _setup(task, mixer, width, rate, optimizer, steps=steps, batch_size=batch_size, rows=rows)


def _setup(task, mixer, width, rate, optimizer, **sizes):
    return Setup(
        task,
        mixer,
        _PUBLISHED.get(mixer, "-"),
        optimizer=dataclasses.replace(optimizer, learning_rate=rate),
        d_model=width,
        is_tuned=True,
        **{"settings": _SETTINGS.get(mixer, {}), "label": f"{task.length}x{task.pairs} d={width}"} | sizes,
    )
