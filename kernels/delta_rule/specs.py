"""Which form of the delta rule a device runs, and the sizes it runs in."""

from kernels.dispatch import Device


def order(device: Device) -> list[str]:
    """Implementations by preference."""
    return ["recurrent", "chunked"] if device.platform == "cpu" else ["chunked"]


def chunk_size(time: int, wanted: int | None) -> int:
    """Tokens a chunk of the chunked form, a power of two: 64 unless asked, no more than `time` needs."""
    return 1 << (min(wanted or 64, time) - 1).bit_length()
