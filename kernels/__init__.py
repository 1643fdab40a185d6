"""Sequence-mixing ops: arrays in, arrays out. Knows nothing of Flax, configs or meshes.

Each op's docstring, in its `api.py`, is its definition. Letters in shapes: `kernels.array_typing`.
"""

from kernels.attention import attention, attention_step
from kernels.cross_entropy import cross_entropy
from kernels.delta_rule import delta_rule, delta_rule_step
from kernels.diagonal_ssm import diagonal_ssm, diagonal_ssm_step
from kernels.dplr_delta_rule import dplr_delta_rule, dplr_delta_rule_step
from kernels.fast_weights import fast_weights, fast_weights_step
from kernels.linear_attention import linear_attention, linear_attention_step
from kernels.linear_scan import linear_scan, linear_scan_step
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.short_conv import short_conv, short_conv_step

# Another package on PyPI imports as `kernels` too, and libraries compare its version with what they need (>= 0.18).
# Staying below tells them that it is not installed.
__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_step",
    "cross_entropy",
    "delta_rule",
    "delta_rule_step",
    "diagonal_ssm",
    "diagonal_ssm_step",
    "dplr_delta_rule",
    "dplr_delta_rule_step",
    "fast_weights",
    "fast_weights_step",
    "linear_attention",
    "linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "selective_scan",
    "selective_scan_step",
    "short_conv",
    "short_conv_step",
]
