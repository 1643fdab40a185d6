"""The registry of what `python -m zoo.evaluate --tasks=...` can measure, one file a task.

A synthetic task of `zoo.data.synthetic` is a task too, by the same spec as data.source: `mqar?pairs=8`.
"""

from zoo.data import synthetic
from zoo.errors import UsageError
from zoo.evaluate.task import Task
from zoo.evaluate.tasks.classes import Classes
from zoo.evaluate.tasks.decode import Decode
from zoo.evaluate.tasks.extrapolation import Extrapolation
from zoo.evaluate.tasks.perplexity import Perplexity
from zoo.evaluate.tasks.recall import Recall
from zoo.evaluate.tasks.rows import Rows
from zoo.evaluate.tasks.values import Values
from zoo.settings import nearest, shown

DEFAULT = "default"
_ALL = (Perplexity(), Extrapolation(), Recall(), Decode(), Classes(), Values())
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
KNOWN = [*TASKS, *synthetic.TASKS, DEFAULT]


def find(names: str) -> dict[str, Task]:
    """The tasks of "perplexity,mqar?pairs=8", by those names, each once; `default`: all that are no synthetic task.

    A run's head decides which of them it can be asked for.

    Raises:
      UsageError: an unknown task, or none.
    """
    chosen: dict[str, Task] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name == DEFAULT:
            chosen |= TASKS
        elif name in TASKS:
            chosen[name] = TASKS[name]
        elif synthetic.is_task(name):
            chosen[name] = Rows(name)
        else:
            near = nearest(name.partition("?")[0], KNOWN)
            raise UsageError(f"--tasks: unknown task {shown(name)}; known, nearest first: {near}")
    if not chosen:
        raise UsageError(f"--tasks: got none; known: {', '.join(KNOWN)}")
    return chosen


def of_record(name: str) -> Task | None:
    """The task that a record of a file names; None: it is not known here."""
    return TASKS.get(name) or (Rows(name) if synthetic.is_task(name) else None)
