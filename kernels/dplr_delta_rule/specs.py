"""Which form of the general delta rule a device runs, and the sizes of its kernels for TPUs."""

import jax.numpy as jnp

from kernels.delta_rule.specs import STEP_LANES, TILE
from kernels.dispatch import Device
from kernels.divisors import largest_divisor
from kernels.linear_attention.specs import ONE_CORE, STEP_TOKENS, Slots, Tiles


def order(device: Device) -> list[str]:
    """Implementations by preference."""
    if device.platform == "tpu":
        return ["mosaic_tpu", "chunked"]
    return ["recurrent", "chunked"] if device.platform == "cpu" else ["chunked"]


def tiles(device: Device, time: int, slots: Slots, dtype: jnp.dtype) -> Tiles:
    """Tiles of the TPU kernels. The scores of a chunk, of all heads of a slot, are TILE lanes wide."""
    chunk = TILE // slots.pack
    block = chunk * min(STEP_TOKENS // chunk, -(-time // chunk))
    at_once = max(1, STEP_LANES // max(slots.key_dim, slots.value_dim))
    if not any(name in device.kind for name in ONE_CORE):  # heads are left for the other core
        at_once = min(at_once, max(1, slots.heads // 2))
    unroll = block // chunk if dtype == jnp.bfloat16 else 1
    return Tiles(chunk, block, largest_divisor(slots.heads, at_once), unroll, 1)
