"""The items of a checkpoint, which Orbax writes and reads, and what it says when it cannot."""

import pathlib
import re
from typing import Any

import orbax.checkpoint as ocp

ITEMS = ("params", "opt", "meta")


def orbax_checkpointer() -> ocp.AsyncCheckpointer:
    """What writes and reads them. It has threads: close it."""
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*ITEMS))


def read_description(orbax: ocp.AsyncCheckpointer, path: pathlib.Path) -> dict[str, Any]:
    """The item `meta` of the checkpoint at `path`: {"parameters": shapes by name, "meta": what `save` was given}."""
    return orbax.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def reason_of(error: BaseException) -> str:
    """What an error says, on one short line."""
    text = f"{error}".strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r": ([^:]*) \[os_error_code", text):  # the end of TensorStore's long ones
        return system[1]
    first = text.splitlines()[0]
    return first if len(first) <= 160 else first[:157] + "..."
