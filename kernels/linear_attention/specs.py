"""Which form of linear attention a device runs, and the sizes it runs in."""

import dataclasses

import jax.numpy as jnp
from jax import ShapeDtypeStruct

from kernels.array_typing import Array
from kernels.dispatch import Device
from kernels.divisors import largest_divisor


def order(
    device: Device, q: Array | ShapeDtypeStruct, v: Array | ShapeDtypeStruct, log_decay: Array | ShapeDtypeStruct | None
) -> list[str]:
    """Implementations by preference.

    On two CPU cores the chunked form takes 1.1 to 3.6 times as long forward as the recurrent one, and 0.7 to 1.7 times
    forward and backward, at the three shapes of benchmarks/results/kernels.cpu.json, in 1.1 to 1.7 times the memory: a
    decay per key costs it log2(chunk) passes over q and k on top of its matmuls, and short rows suit it. Heads of v
    that share q and k do so in the chunked form only, and with more cores it has the matmuls to use them; of a single
    token, whose products have one row, all take the recurrent form. On an H200
    `mosaic_gpu` is 4.6 to 7.6 times as fast as the chunked form, forward and backward (docs/benchmarks.md).
    """
    if device.platform == "tpu":
        return ["mosaic_tpu", "chunked"]
    if device.is_hopper:
        return ["mosaic_gpu", "chunked"]
    per_key = log_decay is not None and log_decay.ndim == 4
    recurrent = per_key or q.shape[-2] == v.shape[-2] or q.shape[-3] == 1
    return ["recurrent", "chunked"] if device.platform == "cpu" and recurrent else ["chunked"]


def chunk_size(device: Device, time: int, wanted: int | None) -> int:
    """Tokens a chunk of the chunked form, a power of two: 64 unless asked (128 on TPUs), no more than `time` needs."""
    default = 128 if device.platform == "tpu" else 64
    return 1 << (min(wanted or default, time) - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of the TPU kernels: tokens of a chunk and of a grid step, heads of v of a step (those that share lanes are one),
    chunks of a turn of its loops."""

    chunk: int
    block: int
    heads: int
    unroll: int  # forward
    unroll_backward: int


WIDEST_HEAD = 512  # K and V of the TPU kernels
STEP_LANES = 1024  # of v, or of k if they are wider, that a step computes
SHARED_STEP_LANES = 1536  # of heads that share lanes
STEP_TOKENS = 256  # of a step: the states between steps are kept for the backward pass
ONE_CORE = ("lite", "v5e", "v6")  # in the kinds of chips whose steps all run one after the other


@dataclasses.dataclass(frozen=True)
class Slots:
    """Heads as the TPU kernels have them: side by side in slots of a multiple of 128 lanes.

    Attributes:
      groups, heads: slots of q and k, and of v.
      key_dim, value_dim: lanes of a slot.
      pack: heads of v in a slot.
      key_pack: heads of q and k in a slot: `pack`, or 1 where the heads of a slot share them.
    """

    groups: int
    heads: int
    key_dim: int
    value_dim: int
    pack: int
    key_pack: int


def slots(heads: int, groups: int, key_dim: int, value_dim: int, per_key: bool) -> Slots:
    """Heads of up to 64 lanes share 128, those of q and k too unless heads of v share them; others are padded.

    Heads whose decays per key act on shared q and k are padded: each needs a copy of q and k of its own.
    """
    own = heads == groups
    width, count = (max(key_dim, value_dim), heads) if own else (value_dim, heads // groups)
    packs = (pack for pack in (4, 2) if pack * width <= 128 and count % pack == 0)
    pack = next(packs, 1) if own or not per_key else 1
    key_pack = pack if own else 1
    lanes = [packed * dim + -packed * dim % 128 for dim, packed in ((key_dim, key_pack), (value_dim, pack))]
    return Slots(groups // key_pack, heads // pack, *lanes, pack, key_pack)


def tiles(device: Device, time: int, slots: Slots, dtype: jnp.dtype, wanted: int | None = None) -> Tiles:
    """Tiles of the TPU kernels. By `python -m benchmarks.tpu_static --sweep`.

    A chunk is as wide as the chip's matrix unit: 256 on v6e, 128 elsewhere, and for float32, whose matmuls are the
    cost; heads that share lanes have their columns of a chunk side by side, and fill it with fewer tokens. A step has
    work for several heads, which hides the latency of one behind the others; where a chip has two cores, heads are left
    for the other. All chunks of 256 tokens go at once, backward two where every head has q and k of its own.
    """
    unit = 128 // slots.pack
    native = (256 if "v6" in device.kind and dtype == jnp.bfloat16 else 128) // slots.pack
    chunk = unit
    while chunk < min(wanted or native, time, STEP_TOKENS):
        chunk *= 2
    block = max(chunk, min(STEP_TOKENS, unit * -(-time // unit)) // chunk * chunk)
    lanes = STEP_LANES if slots.pack == 1 else SHARED_STEP_LANES
    at_once = max(1, lanes // max(slots.key_dim, slots.value_dim))
    shared = slots.heads // slots.groups
    if shared == 1 and not any(name in device.kind for name in ONE_CORE):
        at_once = min(at_once, max(1, slots.heads // 2))
    step_heads = largest_divisor(shared if shared > 1 else slots.heads, at_once)
    unroll = max(1, STEP_TOKENS // chunk)
    return Tiles(chunk, block, step_heads, unroll, unroll if shared > 1 else min(2, unroll))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The heads of a layer: G of q and k, H of v, widths K and V; `decay` is "none", "fixed", "scalar" or "vector"."""

    groups: int
    heads: int
    key_dim: int
    value_dim: int
    decay: str
    bonus: bool = False


SHAPES = {  # of published or preset models
    "square": Shape(8, 8, 128, 128, "scalar"),
    "square_per_key": Shape(8, 8, 128, 128, "vector"),
    "retnet_340m": Shape(4, 4, 256, 512, "fixed"),
    "gla_340m": Shape(4, 4, 128, 256, "vector"),
    "gla_1.3b": Shape(4, 4, 256, 512, "vector"),
    "mamba2_125m": Shape(1, 24, 128, 64, "scalar"),
    "mamba2_8b": Shape(8, 128, 128, 64, "scalar"),
    "rwkv6_1.3b": Shape(32, 32, 64, 64, "vector", bonus=True),
}


CALLS = {  # of published measurements and of presets, for a GPU: (sequences, tokens of each, heads)
    "tfla_scalar": (8, 8192, Shape(16, 16, 128, 256, "scalar")),  # arXiv:2503.14376: 65,536 tokens
    "tfla_per_key": (8, 8192, Shape(16, 16, 128, 256, "vector")),
    "ssd_4096": (8, 8192, Shape(1, 64, 128, 64, "scalar")),  # Mamba-2, inner width 4096
    **{
        f"fla_{heads}_heads_{decay}": (batch, time, Shape(heads, heads, 128, 128, decay))  # its own benchmark
        for batch, time, heads in ((4, 4096, 64), (1, 8192, 96), (2, 16384, 16))
        for decay in ("fixed", "vector")
    },
    "gla_1.3b": (16, 2048, Shape(4, 4, 256, 512, "vector")),
    "gla_340m": (16, 2048, Shape(4, 4, 128, 256, "vector")),
    "gla_125m": (16, 2048, Shape(4, 4, 96, 192, "vector")),
    "mamba2_1.3b": (16, 2048, Shape(1, 64, 128, 64, "scalar")),
    "mamba2_340m": (16, 2048, Shape(1, 32, 128, 64, "scalar")),
    "mamba2_125m": (16, 2048, Shape(1, 24, 128, 64, "scalar")),
    "retnet_1.3b": (16, 2048, Shape(8, 8, 256, 512, "fixed")),
    "retnet_340m": (16, 2048, Shape(4, 4, 256, 512, "fixed")),
    "retnet_125m": (16, 2048, Shape(3, 3, 256, 512, "fixed")),
    "rwkv6_1.3b": (16, 2048, Shape(32, 32, 64, 64, "vector", bonus=True)),
}
