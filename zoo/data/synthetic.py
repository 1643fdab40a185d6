"""Synthetic tasks that tell families apart: rows of tokens, made from a seed and an index.

    induction_heads     ... => a ... =>         : a           (Fu et al. 2022, arXiv:2212.14052; Olsson et al. 2022)
    associative_recall  k v k' v' ... => k'     : v'          (the same)
    selective_copying   . a . . b . c . | | |   : a b c       (Gu & Dao 2023, arXiv:2312.00752)

Ids: of a vocabulary of V, induction_heads has V - 2 regular tokens, "=>" is V - 2 (V - 1, an end mark, stays unused as
in the paper's code); associative_recall has (V - 2) / 2 keys, then as many values, and the same "=>";
selective_copying has 0 as the blank, 1 ... V - 2 to copy, and V - 1 as the mark that asks.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.config import Config

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task at one size. `length` counts the tokens before the question."""

    name: str
    vocab_size: int
    length: int
    copies: int = 16  # tokens that selective_copying asks for

    def __post_init__(self):
        least = {"induction_heads": 3, "associative_recall": 2, "selective_copying": self.copies}
        if self.name not in least:
            raise UsageError(f"unknown synthetic task {self.name!r}; expected one of {', '.join(TASKS)}")
        if self.length < least[self.name]:
            raise UsageError(f"{self.name}: got a length of {self.length}, expected at least {least[self.name]} tokens")
        if self.name == "associative_recall" and (self.length % 2 or self.vocab_size % 2 or self.vocab_size < 4):
            raise UsageError(
                f"associative_recall: got length {self.length} and vocabulary {self.vocab_size}, expected even "
                "numbers, the vocabulary at least 4 (keys, values, two marks)"
            )
        if self.vocab_size < 3:
            raise UsageError(f"{self.name}: got a vocabulary of {self.vocab_size}, expected at least 3")

    @property
    def context_length(self) -> int:
        """Tokens of a row of inputs."""
        asked = {"induction_heads": 1, "associative_recall": 2, "selective_copying": self.copies}
        return self.length + asked[self.name]

    def rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Rows with their answers, int32 [count, X]: inputs and answer, or (copying) inputs and the tokens to copy."""
        return _ROWS[self.name](self, rng, count)

    def batch(self, rows: np.ndarray, *, answers_only: bool) -> Batch:
        """tokens, targets, segment_ids int32 [b, T], weights float32 [b, T]: 1 where the answers are, or everywhere."""
        if self.name == "selective_copying":
            tokens, copied = rows[:, : self.context_length], rows[:, self.context_length :]
            targets = np.concatenate([np.zeros((len(rows), self.length), np.int32), copied], axis=1)
            asked = self.copies
            answers_only = True  # nothing else is predictable
        else:
            tokens, targets, asked = rows[:, :-1], rows[:, 1:], 1
        weights = np.ones(tokens.shape, np.float32)
        if answers_only:
            weights[:, : tokens.shape[1] - asked] = 0
        arrays = {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens)}
        return {name: np.ascontiguousarray(array, np.int32) for name, array in arrays.items()} | {"weights": weights}

    def fresh(self, seed: int, index: int, count: int, *, answers_only: bool = True) -> Batch:
        """Batch number `index` of an endless stream: a function of its arguments alone."""
        return self.batch(self.rows(np.random.default_rng([seed, index]), count), answers_only=answers_only)


def _induction_heads(task, rng, count):
    rows = rng.integers(0, task.vocab_size - 2, (count, task.length + 2))
    arrow = task.vocab_size - 2
    place = rng.integers(0, task.length - 2, count)
    every = np.arange(count)
    rows[every, place] = arrow
    rows[:, -2] = arrow
    rows[:, -1] = rows[every, place + 1]
    return rows.astype(np.int32)


def _associative_recall(task, rng, count):
    pairs, keys = task.length // 2, (task.vocab_size - 2) // 2
    value_of = rng.integers(keys, 2 * keys, (count, keys))  # of each row
    key = rng.integers(0, keys, (count, pairs))
    every = np.arange(count)
    asked = key[every, rng.integers(0, pairs, count)]
    rows = np.empty((count, task.length + 3), np.int32)
    rows[:, 0 : task.length : 2] = key
    rows[:, 1 : task.length : 2] = value_of[every[:, None], key]
    rows[:, -3] = task.vocab_size - 2
    rows[:, -2] = asked
    rows[:, -1] = value_of[every, asked]
    return rows


def _selective_copying(task, rng, count):
    rows = np.zeros((count, task.length + 2 * task.copies), np.int32)
    tokens = rng.integers(1, task.vocab_size - 1, (count, task.copies))
    places = np.sort(np.argsort(rng.random((count, task.length)), axis=1)[:, : task.copies], axis=1)
    rows[np.arange(count)[:, None], places] = tokens
    rows[:, task.length : task.context_length] = task.vocab_size - 1
    rows[:, task.context_length :] = tokens
    return rows


_ROWS = {
    "induction_heads": _induction_heads,
    "associative_recall": _associative_recall,
    "selective_copying": _selective_copying,
}
TASKS = tuple(_ROWS)


VOCABULARIES = {"induction_heads": 20, "associative_recall": 10, "selective_copying": 16}  # as data.source
VALIDATION_ROWS = 512
_TRAINING, _VALIDATION = 0, 1  # parts of the seed


def find(config: "Config", source: str | None = None, context_length: int | None = None) -> Task | None:
    """The task that data.source (or `source`) names, as long as rows of the context have room for; None: it is text.

    Raises:
      UsageError: a task beside other sources, a context too short for it, or a vocabulary too small.
    """
    spec = (config.data.source if source is None else source).strip()
    if spec not in TASKS:
        if any(part.strip() in TASKS for part in spec.split(",")):
            raise UsageError(f"data.source: got {spec!r}; a synthetic task cannot be mixed with other sources")
        return None
    context = config.train.context_length if context_length is None else context_length
    vocab_size = VOCABULARIES[spec]
    asked = Task(spec, vocab_size, length=1 << 20).context_length - (1 << 20)
    length = context - asked
    if spec == "associative_recall" and length % 2:
        raise UsageError(f"train.context_length: {spec} has pairs and a question of 2; got {context}, expected even")
    if 0 < config.model.vocab_size < vocab_size:
        raise UsageError(f"model.vocab_size: got {config.model.vocab_size}, {spec} needs at least {vocab_size}")
    return Task(spec, vocab_size, length)


def training_batch(task: Task, config: "Config", step: int) -> Batch:
    """The global batch of a step: a function of the seed and the step."""
    return task.fresh(_seed(config, _TRAINING), int(step), config.train.batch_size)


@dataclasses.dataclass(frozen=True)
class ValidationRows:
    """Held-out rows in fixed order, in the form of `zoo.data.ValidationBatches`; only the answers count."""

    task: Task
    seed: int
    batch_size: int
    max_batches: int  # 0: all
    rows: Sequence[int] | None = None  # of each batch, to have no others; None: all
    text_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        asked = self.task.copies if self.task.name == "selective_copying" else 1
        return VALIDATION_ROWS * asked

    @property
    def fingerprint(self) -> str:
        return f"{self.task}, seed {self.seed}"

    def only(self, rows: Sequence[int]) -> "ValidationRows":
        """The same batches, of each these rows alone."""
        return dataclasses.replace(self, rows=rows)

    def at_most(self, max_batches: int) -> "ValidationRows":
        """So many batches; 0: all."""
        return dataclasses.replace(self, max_batches=max_batches)

    def __len__(self) -> int:
        batches = -(-VALIDATION_ROWS // self.batch_size)
        return min(batches, self.max_batches) if self.max_batches else batches

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            batch = self.task.fresh(self.seed, index, self.batch_size)
            left = VALIDATION_ROWS - index * self.batch_size
            batch["weights"][left:] = 0
            batch["bytes"] = np.zeros_like(batch["weights"])
            yield batch if self.rows is None else {name: array[list(self.rows)] for name, array in batch.items()}


def validation_rows(task: Task, config: "Config", max_batches: int) -> ValidationRows:
    batch_size = config.eval.batch_size or config.train.batch_size
    return ValidationRows(task, _seed(config, _VALIDATION), batch_size, max_batches)


def _seed(config, part):
    return 2 * config.train.seed + part
