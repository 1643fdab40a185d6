"""Synthetic tasks that tell families apart: rows of tokens, made from a seed and an index.

`task`: what a task is. `recall`, `needle`, `copying`, `states`, `mad`: the tasks, what their rows look like, and where
they are from. `source`: a task as data.source, and its validation rows. docs/data.md has them in one table.
"""

from zoo.data.synthetic import copying, mad, needle, recall, states  # noqa: F401, which make their tasks known
from zoo.data.synthetic.source import (
    ValidationRows,
    find,
    is_task,
    labels,
    of_spec,
    options_of,
    training_batch,
    validation_rows,
)
from zoo.data.synthetic.task import POSITION, TASKS, Batch, Rows, Task, make

__all__ = [
    "POSITION",
    "TASKS",
    "Batch",
    "Rows",
    "Task",
    "ValidationRows",
    "find",
    "is_task",
    "labels",
    "make",
    "of_spec",
    "options_of",
    "training_batch",
    "validation_rows",
]
