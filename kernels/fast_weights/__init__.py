from kernels.fast_weights.api import fast_weights, fast_weights_step

__all__ = ["fast_weights", "fast_weights_step"]
