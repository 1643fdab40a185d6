"""The items of a checkpoint, which Orbax writes and reads, and what it says when it cannot."""

import pathlib
import re
from typing import Any

import orbax.checkpoint as ocp

from zoo import files

ITEMS = ("params", "opt", "meta")
LARGEST_META = 64 << 20  # bytes


def orbax_checkpointer(at_once: int = 0) -> ocp.AsyncCheckpointer:
    """What writes and reads them. It has threads: close it.

    `at_once`: bytes of parameters that it writes at a time, the largest among them; 0: no bound.
    """
    bounds = {"params": ocp.StandardCheckpointHandler(save_concurrent_gb=-(-at_once // 10**9))} if at_once else {}
    others = [item for item in ITEMS if item not in bounds]
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*others, **bounds))


def read_description(path: pathlib.Path) -> dict[str, Any]:
    """The item `meta` of the checkpoint at `path`: {"parameters": shapes by name, "meta": what `save` was given}.

    Without Orbax, whose reading is of all processes together.
    """
    return files.read_json(path / "meta" / "metadata", LARGEST_META)


def reason_of(error: BaseException) -> str:
    """What an error says, on one short line."""
    text = f"{error}".strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r": ([^:]*) \[os_error_code", text):  # the end of TensorStore's long ones
        return system[1]
    first = text.splitlines()[0]
    return first if len(first) <= 160 else first[:157] + "..."
