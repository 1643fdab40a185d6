"""Computations that are written down in turns: the compiler keeps near the order of the program, so that what waits in
one is hidden behind another that stands beside it."""

from collections.abc import Generator, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def in_turns(computations: Sequence[Generator[None, None, Result]]) -> list[Result]:
    """The results of generators that yield where the next one may go on."""
    turns = rounds(computations)
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def rounds(computations: Sequence[Generator[None, None, Result]]) -> Generator[None, None, list[Result]]:
    """`in_turns`, a yield after each round."""
    results, left = {}, dict(enumerate(computations))
    while left:
        for index, computation in list(left.items()):
            try:
                next(computation)
            except StopIteration as end:
                results[index] = end.value
                del left[index]
        yield
    return [results[index] for index in range(len(computations))]
