"""The general delta rule on Hopper GPUs: Pallas kernels, forward and backward."""

from typing import Any

from kernels import dispatch
from kernels.array_typing import Array, Float


def mosaic_gpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    **options: Any,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`op.mosaic_gpu`, which says what it takes; it is not imported before a call, nor for other devices.

    It has run on no GPU, so it is taken by name only, and is in no device's default order.

    Raises:
      NotImplementedError: another device than a Hopper GPU, or what `op.mosaic_gpu` refuses.
    """
    device = dispatch.device()
    if not (device.is_hopper or device.platform == "cpu"):
        raise NotImplementedError(f"it is a kernel for Hopper GPUs, not for {device.kind}")
    from kernels.dplr_delta_rule.mosaic_gpu import op

    return op.mosaic_gpu(q, k, v, a, b, log_decay, **options)
