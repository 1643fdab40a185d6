"""Tasks that follow a state: parity (arXiv:2411.12537), word problems (arXiv:2502.10297); reduced for a CPU."""

import dataclasses
from collections.abc import Iterator

from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.data.synthetic import make
from zoo.mixers import CAUSAL_MIXERS

EXCHANGES = "S5 exchanges"  # products of exchanges of two, which one reflection a token follows (2411.12537)


def setups() -> Iterator[Setup]:
    """What a transition can follow: decays and corrections of b up to 1 forget, of b up to 2 they reflect, and n
    reflections a token make what moves n dimensions.

    Published, where the papers have the row: whether it was solved at lengths beyond the training's (parity), or at the
    training's (word problems; n steps of which DeltaProduct).
    """
    model = {"num_layers": 1, "positions": "none"}
    rotary = model | {"positions": "rope"}  # learned positions end where training did
    sizes = {"d_model": 64, "d_ff": 128}
    task, lengths = make("parity", length=32), (128,)
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.0)
    bounded = {name: {"num_heads": 4} for name in ("delta_net", "gated_delta_net", "kda", "gated_delta_product")}
    bounded["gated_delta_product"]["forget_gate"] = False
    published = {name: "not solved" for name in ("attention", "mlstm", "mamba", "delta_net")}
    runs = [("parity", mixer, published.get(mixer, "-"), {}) for mixer in CAUSAL_MIXERS if mixer not in bounded]
    for bound in (1.0, 2.0):
        for mixer, settings in bounded.items():
            found = {1.0: "not solved", 2.0: "solved"}[bound] if mixer in ("delta_net", "gated_delta_product") else "-"
            runs.append((f"parity b<={bound:.0f}", mixer, found, settings | {"beta_max": bound}))
    for label, mixer, found, settings in runs:
        setup = Setup(task, mixer, found, 1000, 32, optimizer, test_lengths=lengths, settings=settings, **sizes)
        yield dataclasses.replace(setup, label=label, model=rotary if mixer == "attention" else model)

    optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
    groups = {"S3": (2, 0), "A5": (2, 0), "S5": (4, 0), EXCHANGES: (1, 2)}
    for group, (needed, moved) in groups.items():  # steps a token that solve it; points that a token moves, at most
        task, lengths = make(f"word_problem:{group[:2]}", length=16, moved=moved), (64,)
        product = bounded["gated_delta_product"]
        runs = [(group, "attention", "-", {})]
        if group == EXCHANGES:
            settings = product | {"num_householder": 1, "beta_max": 1.0}
            runs.append((f"{group} n=1 b<=1", "gated_delta_product", "not solved", settings))
        for steps in (1, 2, 4) if group != EXCHANGES else (1, 2):
            found = "solved" if steps >= needed else "not solved"
            runs.append((f"{group} n={steps}", "gated_delta_product", found, product | {"num_householder": steps}))
        for label, mixer, found, settings in runs:
            setup = Setup(task, mixer, found, 6000, 64, optimizer, test_lengths=lengths, settings=settings, **sizes)
            yield dataclasses.replace(setup, label=label, model=rotary if mixer == "attention" else model)
