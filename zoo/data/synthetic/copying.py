"""Tasks that ask for tokens of the row again, in their order."""

import numpy as np

from zoo.data.synthetic.task import Task, only_asked, task
from zoo.settings import setting


@task("selective_copying")
class SelectiveCopying(Task):
    """Tokens at random places among blanks, asked for by marks (Gu & Dao 2023, arXiv:2312.00752).

        . a . . b . c . | | |    : a b c

    Ids: 0 is the blank, 1 ... V - 2 are to copy, V - 1 is the mark that asks.
    """

    vocab_size: int = setting(16, "token ids", at_least=3)
    copies: int = setting(16, "tokens to copy", unit="token")

    @classmethod
    def question(cls, sizes):
        return sizes.get("copies", cls.copies)

    @property
    def asked(self):
        return self.copies

    def problem(self):
        if self.length < self.copies:
            return f"got a length of {self.length} before the marks, expected at least {self.copies} tokens to copy"
        return None

    def rows(self, rng, count, *, training=False):
        shape = (count, self.context_length)
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        copied = rng.integers(1, self.vocab_size - 1, (count, self.copies))
        places = np.sort(np.argsort(rng.random((count, self.length)), axis=1)[:, : self.copies], axis=1)
        tokens[np.arange(count)[:, None], places] = copied
        tokens[:, self.length :] = self.vocab_size - 1
        targets[:, self.length :] = copied
        return only_asked(tokens, targets, np.broadcast_to(np.arange(shape[1]) >= self.length, shape))
