"""What accelerators can do by their makers' data sheets: the one table that MFU, floors and estimates are held against.

Sources: cloud.google.com/tpu/docs (system architecture, one page a version) for peaks, memory and its rate;
jax-ml.github.io/scaling-book/tpus for the rate of a link; nvidia.com's H200, H100 and A100 data sheets (SXM, dense).
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One device of jax: a chip, a GPU, half a TPU7x.

    Attributes:
      kind: a part of jax's `device_kind`.
      peak: dense bfloat16 FLOP/s.
      memory: bytes of HBM that a program may have; on TPUs what libtpu leaves it.
      bandwidth: of HBM, bytes/s.
      link: bytes/s of one link in one direction. On a torus each neighbour is a link; a GPU has one, to the switch.
      sides: of the torus that chips are laid out in; 0: none, all reach all.
      wraps: sides that are a multiple of it are rings, others lines.
      clock: Hz, of TPUs: their compiler counts in cycles. 0: not known.
      measured: FLOP/s of a large square product and bytes/s of a copy, where they were (docs/benchmarks.md).
    """

    kind: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    sides: int
    wraps: int
    clock: float = 0.0
    measured: tuple[float, float] | None = None


# By the name that libtpu's topologies have. Where one kind is in another, the longer comes first.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 30.5 * 2**30, 1.2e12, 4.5e10, 3, 4, 1.05e9),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * 2**30, 0.82e12, 4.5e10, 2, 16, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 95.74 * 2**30, 2.765e12, 9e10, 3, 4, 1.75e9),
    "v6e": Chip("TPU v6", 918e12, 31.25 * 2**30, 1.64e12, 9e10, 2, 16, 1.75e9),
    "tpu7x": Chip("TPU7x", 1153.5e12, 94.75 * 2**30, 3.69e12, 9e10, 3, 4),
    "h200": Chip("H200", 989e12, 141e9, 4.8e12, 4.5e11, 0, 1, measured=(783e12, 4.2e12)),
    "h100": Chip("H100", 989e12, 80e9, 3.35e12, 4.5e11, 0, 1),
    "a100": Chip("A100", 312e12, 80e9, 2.04e12, 3e11, 0, 1),
}


def of(device_kind: str) -> Chip | None:
    """The chip that jax calls so; None for a CPU, and for what the table does not know."""
    kind = device_kind.replace("v5e", "v5 lite")
    return next((chip for chip in CHIPS.values() if chip.kind in kind), None)
