"""Several processes that train one run: the only place that knows jax.distributed.

    with processes.joined():        # flags, environment, Slurm, Open MPI, Kubernetes, Cloud TPU; alone without any
        ...                         # jax.devices() are those of all

A process that is alone pays nothing for any of it. docs/processes.md.
"""

from zoo.processes.start import ask_to_stop, done, joined, require_joined, stops_before
from zoo.processes.world import agree, barrier, broadcast, count, gather, index, is_first, shares_with_first

__all__ = [
    "agree",
    "ask_to_stop",
    "barrier",
    "broadcast",
    "count",
    "done",
    "gather",
    "index",
    "is_first",
    "joined",
    "require_joined",
    "shares_with_first",
    "stops_before",
]
