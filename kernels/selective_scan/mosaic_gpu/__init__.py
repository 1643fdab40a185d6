"""The selective scan as Pallas kernels for Hopper GPUs."""

from typing import Any

from kernels import dispatch
from kernels.array_typing import Array, Float


def mosaic_gpu(*arrays: Array | None, **options: Any) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """`op.mosaic_gpu`, which says what it takes; it is not imported before a call, nor for other devices.

    Raises:
      NotImplementedError: another device than a Hopper GPU, or what `op.mosaic_gpu` refuses.
    """
    device = dispatch.device()
    if not (device.is_hopper or device.platform == "cpu"):
        raise NotImplementedError(f"it is a kernel for Hopper GPUs, not for {device.kind}")
    from kernels.selective_scan.mosaic_gpu import op

    return op.mosaic_gpu(*arrays, **options)
