"""Tasks that follow a state: the vocabulary is a group, and the target at each token is the product of all so far."""

import functools
import itertools

import numpy as np

from zoo.data.synthetic.task import POSITION, Rows, Task, task
from zoo.settings import setting

_ORDERS = {"parity": 2, "word_problem:S3": 6, "word_problem:A5": 60, "word_problem:S5": 120}


@task("parity", "modular_addition")
class States(Task):
    """The newest token stands on the left of the product. Every token's state is a target, the last is asked for.

        parity              0 1 1 0 ...   : 0 1 0 0 ...      (Grazzi et al. 2024, arXiv:2411.12537)
        modular_addition    3 4 0 2 ...   : 3 2 2 4 ...      (modulo the vocabulary; the same)
    """

    vocab_size: int = setting(0, "elements of the group", at_least=2, zero="all of them; 5 of modular_addition")

    trains_on_all = True
    axis = (POSITION, ())
    kept_as = {"copies": 16}

    def chosen(self):
        return {"vocab_size": _ORDERS.get(self.name, 5)}

    def problem(self):
        order = _ORDERS.get(self.name, self.vocab_size)
        if self.vocab_size != order:
            return f"got a vocabulary of {self.vocab_size}, expected {order}"
        return None if self.length >= 1 else f"got {self.length} tokens a row, expected at least 1"

    def rows(self, rng, count, *, training=False):
        drawn = self.drawn()
        tokens = drawn[rng.integers(0, len(drawn), (count, self.length))]
        product = group(self)
        states = np.array(list(itertools.accumulate(tokens.T, lambda state, token: product[token, state]))).T
        last = np.broadcast_to(np.arange(self.length) == self.length - 1, tokens.shape)
        return Rows(tokens, states, np.ones(tokens.shape, bool), last)

    def drawn(self) -> np.ndarray:
        """The elements that tokens are drawn from, all alike."""
        return np.arange(self.vocab_size)


@task("word_problem:S3", "word_problem:A5", "word_problem:S5")
class WordProblem(States):
    """Permutations (Merrill et al. 2024, arXiv:2404.08819): a b c ... : a ba cba ...

    Token 0 is the identity, the others are in lexicographic order. A permutation that moves m points is a product of
    m - 1 exchanges of two or fewer, each of which is a reflection (arXiv:2411.12537, 2502.10297).
    """

    moved: int = setting(0, "points that a token moves, at most: 2, exchanges; 3, cycles of three too", zero="any")

    came_later = ("moved",)

    def problem(self):
        if self.moved and len(self.drawn()) < 2:
            return f"got moved = {self.moved}, by which no element but one is left; expected more"
        return super().problem()

    def drawn(self):
        elements = _elements(self.name.partition(":")[2])
        counts = np.sum(np.array(elements) != np.arange(len(elements[0])), axis=1)
        return np.flatnonzero(counts <= (self.moved or len(elements[0])))


def group(of: States) -> np.ndarray:
    """product[a, b] of the elements of the task's group: a after b, [V, V]."""
    _, colon, permuted = of.name.partition(":")
    if not colon:
        return np.add.outer(*(np.arange(of.vocab_size),) * 2) % of.vocab_size
    return _permutations(permuted)


@functools.cache
def _elements(name: str) -> list[tuple[int, ...]]:
    """Of S<n>, all permutations, or of A<n>, the even ones, in lexicographic order."""
    every = list(itertools.permutations(range(int(name[1:]))))
    inversions = [sum(a > b for a, b in itertools.combinations(each, 2)) for each in every]
    return [each for each, count in zip(every, inversions, strict=True) if name[0] == "S" or count % 2 == 0]


@functools.cache
def _permutations(name: str) -> np.ndarray:
    chosen = _elements(name)
    place = {each: index for index, each in enumerate(chosen)}
    return np.array([[place[tuple(a[i] for i in b)] for b in chosen] for a in chosen])
