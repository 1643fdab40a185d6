"""Tasks that ask for what followed a token before."""

import numpy as np

from zoo.data.synthetic.task import Task, distinct, next_tokens, only_asked, task
from zoo.settings import setting


@task("induction_heads")
class InductionHeads(Task):
    """The token after a mark, asked for by the mark (Fu et al. 2022, arXiv:2212.14052; Olsson et al. 2022).

        ... => a ... =>    : a

    Ids: V - 2 regular tokens; "=>" is V - 2 (V - 1, an end mark, stays unused as in the paper's code).
    """

    vocab_size: int = setting(20, "token ids", at_least=3)

    recalled_by = 1
    kept_as = {"copies": 16}

    @classmethod
    def question(cls, sizes):
        return 1

    def problem(self):
        return None if self.length >= 3 else f"got a length of {self.length}, expected at least 3 tokens"

    def rows(self, rng, count, *, training=False):
        rows = rng.integers(0, self.vocab_size - 2, (count, self.length + 2))
        arrow = self.vocab_size - 2
        place = rng.integers(0, self.length - 2, count)
        every = np.arange(count)
        rows[every, place] = arrow
        rows[:, -2] = arrow
        rows[:, -1] = rows[every, place + 1]
        return next_tokens(rows, asked=1)


@task("associative_recall")
class AssociativeRecall(Task):
    """The value of a key that occurred (Fu et al. 2022, arXiv:2212.14052).

        k v k' v' ... => k'    : v'

    Ids: (V - 2) / 2 keys, then as many values; "=>" is V - 2.
    """

    vocab_size: int = setting(10, "token ids, an even number", at_least=4)

    recalled_by = 1
    kept_as = {"copies": 16}

    @classmethod
    def question(cls, sizes):
        return 2

    def problem(self):
        if self.length < 2 or self.length % 2 or self.vocab_size % 2:
            return (
                f"got a length of {self.length} before the question of 2, and a vocabulary of {self.vocab_size}, "
                "expected even numbers, the length at least 2 (keys and values)"
            )
        return None

    def rows(self, rng, count, *, training=False):
        pairs, keys = self.length // 2, (self.vocab_size - 2) // 2
        value_of = rng.integers(keys, 2 * keys, (count, keys))  # of each row
        key = rng.integers(0, keys, (count, pairs))
        every = np.arange(count)
        asked = key[every, rng.integers(0, pairs, count)]
        rows = np.empty((count, self.length + 3), np.int32)
        rows[:, 0 : self.length : 2] = key
        rows[:, 1 : self.length : 2] = value_of[every[:, None], key]
        rows[:, -3] = self.vocab_size - 2
        rows[:, -2] = asked
        rows[:, -1] = value_of[every, asked]
        return next_tokens(rows, asked=1)


@task("mqar")
class MultiQueryAssociativeRecall(Task):
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927).

        k v k' v' ... | . . k' . . . k .    : at each k its v

    k of V / 2 - 1 keys and k of V / 2 values, different ones, stand in pairs. What is left of the row are
    (T - 2 k) // 2 slots of two tokens. Slot s = 0, 1, ... has the weight (s + 1)^(alpha - 1); k of them are drawn by
    weight, one after the other without replacement, the j-th for key j. It stands at the slot's first token, which has
    its value as target. All else is token 0.

    Ids: 0 fills, 1 ... V / 2 - 1 are keys, V / 2 ... V - 1 values.
    """

    vocab_size: int = setting(8192, "token ids, an even number", at_least=4)
    pairs: int = setting(0, "pairs of a key and a value", zero="a 16th of the row's tokens, an 8th from 512 on")
    alpha: float = setting(0.01, "how evenly questions spread; 1: evenly, near 0: soon after the pairs", above=0)
    random_filler: bool = setting(False, "any token, in place of 0, where nothing else stands")

    recalled_by = 1
    axis = ("pairs", (2, 4, 8, 16, 32, 64, 128))

    def chosen(self):
        return {"pairs": max(1, self.length // (8 if self.length >= 512 else 16))}

    @property
    def asked(self):
        return self.pairs

    def problem(self):
        if self.vocab_size % 2 or self.vocab_size // 2 <= self.pairs:
            least = (
                f"an even one of at least {2 * self.pairs + 2}: 0, and a key and a value for each of {self.pairs} pairs"
            )
            return f"got a vocabulary of {self.vocab_size}, expected {least}"
        if self.length < 4 * self.pairs:
            least = f"at least {4 * self.pairs}: 2 for each of {self.pairs} pairs, and 2 for its question"
            return f"got {self.length} tokens a row, expected {least}"
        return None

    def rows(self, rng, count, *, training=False):
        half, pairs, slots = self.vocab_size // 2, self.pairs, self.length // 2 - self.pairs
        keys = 1 + distinct(rng, count, half - 1, pairs)
        values = half + distinct(rng, count, half, pairs)
        # The order of the largest of log p + Gumbel noise is that of draws without replacement.
        scores = (self.alpha - 1) * np.log(np.arange(1, slots + 1)) + rng.gumbel(size=(count, slots))
        places = 2 * pairs + 2 * np.argsort(-scores, axis=1)[:, :pairs]
        every = np.arange(count)[:, None]
        tokens = np.zeros((count, self.length), np.int64)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        tokens[every, places] = keys
        if self.random_filler:
            tokens = np.where(tokens == 0, rng.integers(0, self.vocab_size, tokens.shape), tokens)
        targets, asked = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        targets[every, places], asked[every, places] = values, True
        return only_asked(tokens, targets, asked)
