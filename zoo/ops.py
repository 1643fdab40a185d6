"""The kernels as mixers see them: the same calls, put on the mesh in use.

On a mesh of one device, and for the XLA implementations that the compiler partitions by itself, there is nothing
to add. Kernels that need their operands local to a device (Pallas), and states passed along the sequence axis, are
wrapped here, with `zoo.sharding`; mixers never import `kernels`.
"""

from kernels import (
    attention,
    cross_entropy,
    diagonal_ssm,
    linear_attention,
    linear_scan,
    selective_scan,
    short_conv,
)

__all__ = [
    "attention",
    "cross_entropy",
    "diagonal_ssm",
    "linear_attention",
    "linear_scan",
    "selective_scan",
    "short_conv",
]
