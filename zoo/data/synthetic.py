"""Synthetic tasks that tell families apart: rows of tokens, made from a seed and an index.

    induction_heads     ... => a ... =>         : a           (Fu et al. 2022, arXiv:2212.14052; Olsson et al. 2022)
    associative_recall  k v k' v' ... => k'     : v'          (the same)
    selective_copying   . a . . b . c . | | |   : a b c       (Gu & Dao 2023, arXiv:2312.00752)
    parity              0 1 1 0 ...             : 0 1 0 0 ... (Grazzi et al. 2024, arXiv:2411.12537)
    modular_addition    3 4 0 2 ...             : 3 2 2 4 ... (modulo the vocabulary, 5; the same)
    word_problem:S3     a b c ...               : a ba cba ... (Merrill et al. 2024, arXiv:2404.08819; A5, S5 as well)

Ids: of a vocabulary of V, induction_heads has V - 2 regular tokens, "=>" is V - 2 (V - 1, an end mark, stays unused as
in the paper's code); associative_recall has (V - 2) / 2 keys, then as many values, and the same "=>";
selective_copying has 0 as the blank, 1 ... V - 2 to copy, and V - 1 as the mark that asks.

The last three follow a state: the vocabulary is a group, and the target at each token is the product of all so far, the
newest on the left. Of permutations token 0 is the identity, the others are in lexicographic order. A model trains on
every token's state; what is asked for is the one after the last.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

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
        if self.name not in TASKS:
            raise UsageError(f"unknown synthetic task {self.name!r}; expected one of {', '.join(TASKS)}")
        kind = TASKS[self.name]
        least = self.copies if self.name == "selective_copying" else kind.least
        if self.length < least:
            raise UsageError(f"{self.name}: got a length of {self.length}, expected at least {least} tokens")
        if self.name == "associative_recall" and (self.length % 2 or self.vocab_size % 2 or self.vocab_size < 4):
            raise UsageError(
                f"associative_recall: got length {self.length} and vocabulary {self.vocab_size}, expected even "
                "numbers, the vocabulary at least 4 (keys, values, two marks)"
            )
        if kind.fixed and self.vocab_size != kind.vocab_size:
            raise UsageError(f"{self.name}: got a vocabulary of {self.vocab_size}, expected {kind.vocab_size}")
        smallest = 2 if kind.follows else 3
        if self.vocab_size < smallest:
            raise UsageError(f"{self.name}: got a vocabulary of {self.vocab_size}, expected at least {smallest}")

    @property
    def follows_a_state(self) -> bool:
        """Whether every token has a target."""
        return TASKS[self.name].follows

    @property
    def asked(self) -> int:
        """Targets of a row that are asked for, at its end."""
        return self.copies if self.name == "selective_copying" else 1

    @property
    def context_length(self) -> int:
        """Tokens of a row of inputs."""
        return self.length + (self.copies if self.name == "selective_copying" else TASKS[self.name].question)

    def rows(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Rows with their answers, int32 [count, X]: inputs and answer, or inputs and the tokens to copy or states."""
        return TASKS[self.name].rows(self, rng, count)

    def batch(self, rows: np.ndarray, *, answers_only: bool) -> Batch:
        """tokens, targets, segment_ids int32 [b, T], weights float32 [b, T]: 1 where the answers are, or everywhere."""
        if self.follows_a_state:
            tokens, targets = np.split(rows, 2, axis=1)
        elif self.name == "selective_copying":
            tokens, copied = rows[:, : self.context_length], rows[:, self.context_length :]
            targets = np.concatenate([np.zeros((len(rows), self.length), np.int32), copied], axis=1)
            answers_only = True  # nothing else is predictable
        else:
            tokens, targets = rows[:, :-1], rows[:, 1:]
        weights = np.ones(tokens.shape, np.float32)
        if answers_only:
            weights[:, : tokens.shape[1] - self.asked] = 0
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


def _states(task, rng, count):
    """Elements of the task's group, and the products of those so far."""
    tokens = rng.integers(0, task.vocab_size, (count, task.length))
    product = group(task)
    states = np.array(list(itertools.accumulate(tokens.T, lambda state, token: product[token, state]))).T
    return np.concatenate([tokens, states], axis=1).astype(np.int32)


def group(task: Task) -> np.ndarray:
    """product[a, b] of the elements of the task's group: a after b, [V, V]."""
    if not TASKS[task.name].fixed or task.name == "parity":
        return np.add.outer(*(np.arange(task.vocab_size),) * 2) % task.vocab_size
    return _permutations(task.name.rpartition(":")[2])


@functools.cache
def _permutations(name: str) -> np.ndarray:
    """Of S<n>, all of them, or of A<n>, the even ones, in lexicographic order."""
    size = int(name[1:])
    every = list(itertools.permutations(range(size)))
    inversions = [sum(a > b for a, b in itertools.combinations(each, 2)) for each in every]
    chosen = [each for each, count in zip(every, inversions, strict=True) if name[0] == "S" or count % 2 == 0]
    place = {each: index for index, each in enumerate(chosen)}
    return np.array([[place[tuple(a[i] for i in b)] for b in chosen] for a in chosen])


class Kind(NamedTuple):
    """A task at any size.

    Attributes:
      rows: see `Task.rows`.
      vocab_size: as data.source.
      least: the shortest length.
      question: tokens of a row after them.
      follows: whether it has a target at every token, of which the last is asked for.
      fixed: whether it has no other vocabulary.
    """

    rows: Callable[[Task, np.random.Generator, int], np.ndarray]
    vocab_size: int
    least: int = 1
    question: int = 0
    follows: bool = False
    fixed: bool = False


TASKS = {
    "induction_heads": Kind(_induction_heads, 20, least=3, question=1),
    "associative_recall": Kind(_associative_recall, 10, least=2, question=2),
    "selective_copying": Kind(_selective_copying, 16),
    "parity": Kind(_states, 2, follows=True, fixed=True),
    "modular_addition": Kind(_states, 5, follows=True),
    "word_problem:S3": Kind(_states, 6, follows=True, fixed=True),
    "word_problem:A5": Kind(_states, 60, follows=True, fixed=True),
    "word_problem:S5": Kind(_states, 120, follows=True, fixed=True),
}


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
        if spec.partition(":")[0] in {name.partition(":")[0] for name in TASKS}:
            raise UsageError(f"data.source: unknown synthetic task {spec!r}; expected one of {', '.join(TASKS)}")
        return None
    context = config.train.context_length if context_length is None else context_length
    vocab_size = TASKS[spec].vocab_size
    asked = Task(spec, vocab_size, length=1 << 20).context_length - (1 << 20)
    length = context - asked
    if spec == "associative_recall" and length % 2:
        raise UsageError(f"train.context_length: {spec} has pairs and a question of 2; got {context}, expected even")
    if 0 < config.model.vocab_size < vocab_size:
        raise UsageError(f"model.vocab_size: got {config.model.vocab_size}, {spec} needs at least {vocab_size}")
    return Task(spec, vocab_size, length)


def training_batch(task: Task, config: "Config", step: int) -> Batch:
    """The global batch of a step: a function of the seed and the step."""
    seed = _seed(config, _TRAINING)
    return task.fresh(seed, int(step), config.train.batch_size, answers_only=not task.follows_a_state)


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
        return VALIDATION_ROWS * self.task.asked

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
