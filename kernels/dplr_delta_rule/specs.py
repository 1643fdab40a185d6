"""Which form of the general delta rule a device runs."""

from kernels.dispatch import Device


def order(device: Device) -> list[str]:
    """Implementations by preference."""
    return ["recurrent", "chunked"] if device.platform == "cpu" else ["chunked"]
