"""Linear attention on Hopper GPUs: Pallas kernels, forward and backward."""

from kernels import dispatch


def mosaic_gpu(q, k, v, log_decay, **options):
    """`op.mosaic_gpu`, which says what it takes; it is not imported before a call, nor for other devices.

    Raises:
      NotImplementedError: another device than a Hopper GPU, or what `op.mosaic_gpu` refuses.
    """
    device = dispatch.device()
    if not (device.is_hopper or device.platform == "cpu"):
        raise NotImplementedError(f"it is a kernel for Hopper GPUs, not for {device.kind}")
    from kernels.linear_attention.mosaic_gpu import op

    return op.mosaic_gpu(q, k, v, log_decay, **options)
