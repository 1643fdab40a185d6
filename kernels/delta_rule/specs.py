"""Which form of the delta rule a device runs, and the sizes it runs in."""

import dataclasses

import jax.numpy as jnp

from kernels.dispatch import Device
from kernels.divisors import largest_divisor
from kernels.linear_attention.specs import ONE_CORE, Slots


def order(device: Device) -> list[str]:
    """Implementations by preference."""
    if device.platform == "tpu":
        return ["mosaic_tpu", "chunked"]
    return ["recurrent", "chunked"] if device.platform == "cpu" else ["chunked"]


def chunk_size(time: int, wanted: int | None) -> int:
    """Tokens a chunk of the chunked form, a power of two: 64 unless asked, no more than `time` needs."""
    return 1 << (min(wanted or 64, time) - 1).bit_length()


TILE = 128  # tokens whose scores the TPU kernels compute at once, of all heads of a slot of lanes
WIDEST_HEAD = 256  # K and V of the TPU kernels
STEP_LANES = 1024  # of v, or of k if they are wider, that a step computes
STEP_TILES = 4096, 2048  # lanes of the heads of a step's tiles, all at once; where decays are per key
MOST_TILES = 8  # of a step


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of the TPU kernels: tokens of a chunk (64 or 128; 32 where four heads share lanes) and of a grid step, slots of
    heads of v of a step, tiles at once."""

    chunk: int
    block: int
    heads: int
    unroll: int  # forward
    unroll_backward: int


def tiles(
    device: Device, time: int, slots: Slots, dtype: jnp.dtype, per_key: bool, wanted: int | None = None
) -> Tiles:
    """Tiles of the TPU kernels. By `python -m benchmarks.tpu_static --sweep`.

    A step has work for several heads, which hides the latency of one behind the others; where a chip has two cores,
    heads are left for the other. What needs no state is computed for all tiles of a step at once, for the same reason.
    Of heads that share lanes a tile is one chunk of each, TILE lanes of scores beside one another.
    """
    size, lanes = TILE // slots.pack, max(slots.key_dim, slots.value_dim)
    chunk = min(size, 128 if wanted and wanted > 64 else 64)
    at_once = max(1, STEP_LANES // lanes)
    shared = slots.heads // slots.groups
    if shared == 1 and not any(name in device.kind for name in ONE_CORE):
        at_once = min(at_once, max(1, slots.heads // 2))
    step_heads = largest_divisor(shared if shared > 1 else slots.heads, at_once)
    most = min(MOST_TILES, max(1, STEP_TILES[per_key] // (step_heads * lanes))) if dtype == jnp.bfloat16 else 2
    count = -(-time // size)
    count = -(-count // -(-count // most))  # as even as they come
    return Tiles(chunk, size * count, step_heads, count if dtype == jnp.bfloat16 else 1, 1)
