"""Synthetic tasks that tell families apart: rows of tokens, made from a seed and an index.

`task`: what a task is. `recall`, `copying`, `states`: the tasks, each with what a row looks like and where it is from.
`source`: a task as data.source, and its validation rows. docs/data.md has them in one table.
"""

from zoo.data.synthetic import copying, recall, states  # noqa: F401, which make their tasks known
from zoo.data.synthetic.source import ValidationRows, find, is_task, training_batch, validation_rows
from zoo.data.synthetic.task import TASKS, Batch, Rows, Task, make

__all__ = [
    "TASKS",
    "Batch",
    "Rows",
    "Task",
    "ValidationRows",
    "find",
    "is_task",
    "make",
    "training_batch",
    "validation_rows",
]
