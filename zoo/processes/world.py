"""The processes of a run: how many, which is this one, and how they wait for, tell and hold each other to something.

All of it goes through jax's coordination service, by TCP, and touches no device. Whoever is alone does nothing.
Who waits here waits for as long as it takes: `zoo.processes.watch` ends the wait when one of the others is gone.
"""

import contextlib
import itertools
import json
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from jax._src import distributed

from zoo.errors import UsageError

_FOR_EVER = 30 * 24 * 3600 * 1000  # ms
_calls = itertools.count()  # all processes call the same functions in the same order


def client() -> Any:
    """Of the coordination service; None: this process is alone."""
    return distributed.global_state.client


def count() -> int:
    return distributed.global_state.num_processes if client() is not None else 1


def index() -> int:
    return distributed.global_state.process_id if client() is not None else 0


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return index() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        client().wait_at_barrier(f"zoo/barrier/{next(_calls)}", _FOR_EVER)


def broadcast(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold, on all processes; those of the others are not looked at."""
    if count() == 1:
        return value
    key = f"zoo/broadcast/{next(_calls)}"
    if is_first():
        client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(client().blocking_key_value_get(key, _FOR_EVER))


def gather(value: Any) -> list[Any]:
    """On process 0 the `value`, which JSON can hold, of each process; nothing on the others."""
    if count() == 1:
        return [value]
    key = f"zoo/gather/{next(_calls)}"
    client().key_value_set(f"{key}/{index()}", json.dumps(value))
    if not is_first():
        return []
    return [json.loads(client().blocking_key_value_get(f"{key}/{process}", _FOR_EVER)) for process in range(count())]


def agree(what: str, values: Mapping[str, Any], advice: str) -> None:
    """Return when all processes have the same `values`.

    Args:
      what: these are, as "settings".
      advice: what to do where they differ.

    Raises:
      UsageError: on each process that differs from process 0, with what differs.
    """
    if count() == 1:
        return
    here = json.loads(json.dumps(values))
    there = broadcast(here)
    differ = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    if differ:
        shown = [f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differ[:6]]
        more = f"; and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise UsageError(f"the {what} differ from those of process 0: {'; '.join(shown)}{more}. {advice}")
    barrier()


def shares_with_first(folder: pathlib.Path) -> bool:
    """Whether `folder`, which is there, is the one that process 0 sees; all processes ask at a time."""
    if count() == 1:
        return True
    mark = folder / broadcast(f".{secrets.token_hex(8)}.shared")
    if is_first():
        with contextlib.suppress(OSError):  # who may not write there shares it with nobody
            mark.touch()
    barrier()
    seen = mark.exists()
    barrier()
    if is_first():
        with contextlib.suppress(OSError):
            mark.unlink()
    return seen
