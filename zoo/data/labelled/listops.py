"""ListOps, as Long Range Arena has it (Tay et al. 2020, arXiv:2011.04006; Nangia & Bowman 2018, arXiv:1804.06028).

    [MAX 2 9 [MIN 4 7 ] 0 ]   : 9

A node is a digit with probability 3/4 (always at the greatest depth), else an operator with 2 to 10 arguments, each
number as likely: MIN, MAX, MED (the median, rounded down) or SM (the sum modulo 10). A row is such an expression with
more than `min_length` and fewer than train.context_length tokens; its class is its value. Published: depth 10, 10
arguments, 500 to 2,000 tokens.

Ids: 0 padding, 1 to 10 the digits, 11 to 14 the operators, each with its bracket, 15 the closing bracket.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator

import numpy as np

from zoo.data.rows import RowSource
from zoo.data.stored import source
from zoo.data.streams import content_hash
from zoo.errors import UsageError
from zoo.settings import setting

VALIDATION_ROWS = 512
DIGIT = 0.75  # probability that a node is one
OPERATORS = ("MIN", "MAX", "MED", "SM")
ZERO, OPERATOR, END = 1, 11, 15  # ids: digits from ZERO on, operators from OPERATOR on
_MOST_DRAWN = 20_000  # expressions to find a first row; of published sizes one in twelve has a right length


@dataclasses.dataclass
class Options:
    min_length: int = setting(
        0, "rows have more tokens than this", unit="token", zero="a quarter of train.context_length"
    )
    max_depth: int = setting(10, "nodes in one another, the digit among them", at_least=2, at_most=100)
    max_arguments: int = setting(10, "of an operator", at_least=2, at_most=100)


@source("listops", Options)
def listops(config, options):
    length = config.train.context_length
    return ListOps(length, options.min_length or length // 4, options.max_depth, options.max_arguments)


class ListOps(RowSource):
    """Expressions of `min_length` < tokens < `length`, drawn anew for ever; 512 others validate, whatever the seed is.

    Raises:
      UsageError: expressions of such lengths do not come up.
    """

    head, name, num_classes, vocab_size = "classes", "listops", 10, END + 1
    validation_rows = VALIDATION_ROWS

    def __init__(self, length: int, min_length: int, max_depth: int = 10, max_arguments: int = 10):
        self.length, self.min_length = length, min_length
        self.max_depth, self.max_arguments = max_depth, max_arguments
        self.fingerprint = content_hash("listops", length, min_length, max_depth, max_arguments)
        if not any(itertools.islice(self._drawn("whether there are any"), _MOST_DRAWN)):
            raise UsageError(
                f"data.source: of {_MOST_DRAWN:,} expressions of listops none has more than {min_length} and "
                f"fewer than {length} tokens (train.context_length) at max_depth={max_depth} and "
                f"max_arguments={max_arguments}; use other lengths, or another depth"
            )

    def train_batch(self, seed, step, batch_size):
        return self._batch([f"training {seed} {step} {row}" for row in range(batch_size)])

    def validation_batch(self, start, stop):
        return self._batch([f"validation {row}" for row in range(start, stop)])

    def _batch(self, seeds):
        rows = [self.row(seed) for seed in seeds]
        tokens = np.zeros((len(rows), self.length), np.int32)
        for i, (row, _) in enumerate(rows):
            tokens[i, : len(row)] = row
        lengths, values = ([len(row) for row, _ in rows], [value for _, value in rows])
        return {"tokens": tokens, "lengths": np.array(lengths, np.int32), "label": np.array(values, np.int32)}

    def row(self, seed: str) -> tuple[list[int], int]:
        """The tokens of an expression, and its value."""
        return next(found for found in self._drawn(seed) if found)

    def _drawn(self, seed: str) -> Iterator[tuple[list[int], int] | None]:
        """One expression after another; None for those of other lengths."""
        draw = random.Random(seed).random  # of which Python promises that it stays as it is
        while True:
            tokens = []
            value = self._node(draw, tokens, 1)
            yield (tokens, value) if value is not None and len(tokens) > self.min_length else None

    def _node(self, draw, tokens, depth):
        """Adds an expression to `tokens`. Its value; None: there is no room for it."""
        if depth == self.max_depth or draw() < DIGIT:
            digit = int(10 * draw())
            tokens.append(ZERO + digit)
            return digit if len(tokens) < self.length else None
        operator = int(len(OPERATORS) * draw())
        tokens.append(OPERATOR + operator)
        values = []
        for _ in range(2 + int((self.max_arguments - 1) * draw())):
            value = self._node(draw, tokens, depth + 1)
            if value is None:
                return None
            values.append(value)
        tokens.append(END)
        return apply(OPERATORS[operator], values) if len(tokens) < self.length else None


def apply(operator: str, values: list[int]) -> int:
    """The value of an operator's arguments."""
    if operator == "MED":
        middle = sorted(values)
        return (middle[(len(values) - 1) // 2] + middle[len(values) // 2]) // 2
    return {"MIN": min, "MAX": max, "SM": lambda v: sum(v) % 10}[operator](values)
