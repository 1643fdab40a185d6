"""The kernels as mixers see them: the same calls, put on the mesh in use. Mixers never import `kernels`.

Each device runs an op on its own sequences and heads, or channels. Where the mesh spreads the time too, an op says here
what has to travel: a recurrence what a part of a sequence does to the state (`carry`, see `zoo.sharding.sequence`), a
convolution how far it looks back, and attention takes the keys that its queries see.
"""

from zoo.ops.loss import cross_entropy
from zoo.ops.recurrences import (
    delta_rule,
    diagonal_ssm,
    dplr_delta_rule,
    fast_weights,
    full_linear_attention,
    linear_attention,
    linear_scan,
    selective_scan,
)
from zoo.ops.segments import segment_max, segment_starts, segment_sum, tokens_since_start
from zoo.ops.softmax import attention, attention_step, decay_sums
from zoo.ops.time import associative_scan, earlier, previous, reversed_time, short_conv

__all__ = [
    "associative_scan",
    "attention",
    "attention_step",
    "cross_entropy",
    "decay_sums",
    "delta_rule",
    "diagonal_ssm",
    "dplr_delta_rule",
    "earlier",
    "fast_weights",
    "full_linear_attention",
    "linear_attention",
    "linear_scan",
    "previous",
    "reversed_time",
    "segment_max",
    "segment_starts",
    "segment_sum",
    "selective_scan",
    "short_conv",
    "tokens_since_start",
]
