"""A needle in a haystack of tokens."""

import numpy as np

from zoo.data.synthetic.task import Task, distinct, next_tokens, task
from zoo.settings import setting


@task("needle")
class Needle(Task):
    """What followed a mark and a key somewhere in a row of random tokens: the question repeats mark and key.

        . . . => k v v . . . . . => k v    : v v

    The form of needle-in-a-haystack tests, in tokens: of any length, with the needle at any depth. The haystack is
    uniform over all regular tokens, those of keys and values too, so that the mark alone tells where a needle is. With
    several needles their keys differ, and one is asked for; they never overlap.

    With F tokens of haystack and N needles, the needle that is asked for is item round(depth (F + N - 1)) of the F + N;
    the others, and it too without a given depth, take any places of those left. Depth 0 is the row's beginning, 1 right
    before the question.

    Ids: V - 1 regular tokens; "=>" is V - 1.
    """

    vocab_size: int = setting(64, "token ids", at_least=3)
    depth: float = setting(-1.0, "of the needle", at_least=0, at_most=1, special={-1: "any, uniformly"})
    needles: int = setting(1, "needles, of which one is asked for")
    tokens: int = setting(1, "tokens of a needle's value", unit="token")

    recalled_by = 2
    axis = ("depth", (0.0, 0.25, 0.5, 0.75, 1.0))

    @property
    def asked(self):
        return self.tokens

    def problem(self):
        if self.vocab_size <= self.needles:
            least = f"at least {self.needles + 1}: a key for each needle, and the mark"
            return f"got a vocabulary of {self.vocab_size}, expected {least}"
        least = self.needles * (2 + self.tokens) + 1 + self.tokens
        if self.length < least:
            return f"got {self.length} tokens a row, expected at least {least}: {self.needles} needles and the question"
        return None

    def rows(self, rng, count, *, training=False):
        size, every = 2 + self.tokens, np.arange(count)
        haystack = self.length - 1 - self.tokens
        items = haystack - self.needles * (size - 1)
        needles = np.full((count, self.needles, size), self.vocab_size - 1)
        needles[:, :, 1] = distinct(rng, count, self.vocab_size - 1, self.needles)
        needles[:, :, 2:] = rng.integers(0, self.vocab_size - 1, (count, self.needles, self.tokens))
        items_taken = distinct(rng, count, items, self.needles)  # the first needle is asked for
        if self.depth >= 0:
            place = round(self.depth * (items - 1))
            others = distinct(rng, count, items - 1, self.needles - 1)
            items_taken = np.column_stack([np.full(count, place), others + (others >= place)])
        before = (items_taken[:, None, :] < items_taken[:, :, None]).sum(2)  # needles before each
        starts = items_taken + before * (size - 1)
        sequence = rng.integers(0, self.vocab_size - 1, (count, self.length + 1), dtype=np.int32)
        sequence[every[:, None, None], starts[:, :, None] + np.arange(size)] = needles
        sequence[:, haystack:] = needles[:, 0]
        return next_tokens(sequence, asked=self.tokens)
