"""The six tasks of the MAD suite (Poli et al. 2024, arXiv:2403.17844); defaults are the sizes of its baselines.

Their length there, train.context_length here, is 128 for the three recalls, 256 to copy, and 32 to memorize and to
compress (62 here, see there). Recalls train on every next token, as there; a test asks for the values of keys that
stood in the row before.
"""

import functools

import numpy as np

from zoo.data.synthetic.task import Task, distinct, next_tokens, only_asked, task
from zoo.settings import setting


@task("in_context_recall")
class InContextRecall(Task):
    """Pairs of a key and a value, the same value for a key all through the row; each key may come again.

        k v k' v' k v ...    : v, from the second time on

    Keys are uniform, values too, of each row anew, and two keys may share one. The last pair's key is one that stood
    before, each as likely. Of an odd number of tokens the last pair has its value as target alone.

    Ids: (V - noise) // 2 keys, then values, then noise.
    """

    vocab_size: int = setting(16, "token ids", at_least=2)

    recalled_by = 1
    trains_on_all = True
    asks_alike = False
    noise_vocab_size = 0
    noise = 0.0

    @property
    def asked(self):
        return (self.length - 1) // 2

    def problem(self):
        if self.vocab_size < self.noise_vocab_size + 2:
            least = f"at least {self.noise_vocab_size + 2}: {self.noise_vocab_size} of noise, a key and a value"
            return f"got a vocabulary of {self.vocab_size}, expected {least}"
        return None if self.length >= 3 else f"got {self.length} tokens a row, expected at least 3: two pairs"

    def rows(self, rng, count, *, training=False):
        every, pairs = np.arange(count), (self.length + 1) // 2
        noise_starts = self.vocab_size - self.noise_vocab_size
        keys = noise_starts // 2
        value_of = rng.integers(keys, noise_starts, (count, keys))
        key = rng.integers(0, keys, (count, pairs))
        is_noise = self._noise(rng, count, pairs)

        seen, again = np.zeros((count, keys), bool), np.zeros((count, pairs), bool)
        for i in range(pairs):
            if i == pairs - 1:
                key[:, i] = np.where(seen, rng.random(seen.shape), -1).argmax(1)
            again[:, i] = seen[every, key[:, i]] & ~is_noise[:, i]
            seen[every, key[:, i]] |= ~is_noise[:, i]

        tokens = np.stack([key, value_of[every[:, None], key]], axis=2)
        if self.noise_vocab_size:
            tokens = np.where(is_noise[:, :, None], rng.integers(noise_starts, self.vocab_size, tokens.shape), tokens)
        asked = np.stack([np.zeros_like(again), again], axis=2)
        tokens, asked = (np.pad(array.reshape(count, -1), ((0, 0), (0, 1))) for array in (tokens, asked))
        rows = next_tokens(tokens[:, : self.length + 1], asked[:, : self.length + 1])
        rows.known[:, -1] = rows.asked[:, -1]  # of an even number of tokens nothing follows the last
        return rows

    def _noise(self, rng, count, pairs):
        return np.zeros((count, pairs), bool)


@task("noisy_recall")
class NoisyRecall(InContextRecall):
    """In-context recall with two tokens of noise in place of some pairs.

        k v n n k' v' n n k v    : v

    Every pair but the last is noise with the probability `noise`; one, or by chance the last, is kept from it.
    """

    vocab_size: int = setting(32, "token ids", at_least=3)
    noise_vocab_size: int = setting(16, "of them noise", unit="token id")
    noise: float = setting(0.2, "the share of pairs that are noise", at_least=0, below=1)

    axis = ("noise", (0.0, 0.2, 0.4, 0.6, 0.8))

    def _noise(self, rng, count, pairs):
        found, every = rng.random((count, pairs)) < self.noise, np.arange(count)
        found[every, rng.integers(0, pairs, count)] = False
        found[:, -1] = False
        found[found[:, :-1].all(1), 0] = False  # the suite has no row for it: there would be no key to ask for
        return found


@task("fuzzy_recall")
class FuzzyRecall(Task):
    """In-context recall where keys and values are several tokens long.

        k1 k2 v1   k'1 v'1 v'2 v'3   k1 k2 v1 ...    : v1, each token of a value whose key stood before

    A length is uniform from 1 on; a key is as likely as any other of its length, with no token twice; values likewise.
    A test's keys have all their full length. One pair is drawn first, put at a uniform place, and once more at the
    end; where the row ended before that place, its end is not asked for. The row's beginning is filled with V - 1.

    Ids: (V - 1) // 2 tokens of keys, then those of values; V - 1 fills.
    """

    vocab_size: int = setting(16, "token ids", at_least=3, at_most=1 << 15)
    key_length: int = setting(3, "tokens of a key, at most", unit="token", at_most=4)
    value_length: int = setting(3, "tokens of a value, at most", unit="token", at_most=4)

    recalled_by = 3
    trains_on_all = True
    asks_alike = False

    @property
    def asked(self):
        return self.length * self.value_length // (self.key_length + self.value_length)

    def problem(self):
        keys = (self.vocab_size - 1) // 2
        if keys < self.key_length or self.vocab_size - 1 - keys < self.value_length:
            least = max(2 * self.key_length + 1, 2 * self.value_length)
            return (
                f"got a vocabulary of {self.vocab_size}, expected at least {least} for keys and values without a repeat"
            )
        least = 2 * (self.key_length + self.value_length) + 1
        return None if self.length >= least else f"got {self.length} tokens a row, expected at least {least}: two pairs"

    def rows(self, rng, count, *, training=False):
        every, width = np.arange(count), self.length + 1
        sequence, asked, ends = np.zeros((count, width), np.int64), np.zeros((count, width), bool), np.zeros(count, int)
        pairs = self._pairs(rng, count, 1 + width // 2, training)
        shown = np.zeros(pairs.shape[:2], bool)  # which of them stand in the row
        probe = pairs[:, 0]
        probe_length = (probe >= 0).sum(1)
        place = rng.integers(0, self.length - 2 * probe_length)

        def append(pair, to, asks):
            row, i = np.nonzero((pair >= 0) & to[:, None])
            at = (ends[:, None] + np.cumsum(pair >= 0, axis=1) - 1)[row, i]
            sequence[row, at], asked[row, at] = pair[row, i], asks[row] & (i >= self.key_length)
            ends[to] += (pair >= 0).sum(1)[to]

        key = (pairs[:, :, : self.key_length] + 1) @ self.vocab_size ** np.arange(self.key_length)  # as a number
        first = (key[:, :, None] == key[:, None, :]).argmax(2)  # of a key: it says the value
        for i in range(1, pairs.shape[1]):
            growing = ends < self.length - probe_length - self.key_length - self.value_length
            if not growing.any():
                break
            which = np.where((ends >= place) & ~shown[:, 0], 0, first[:, i])
            append(pairs[every, which], growing, shown[every, which])
            shown[every, which] |= growing
        append(probe, np.ones(count, bool), shown[:, 0])

        column = np.arange(width) - (width - ends[:, None])  # of what is filled, at the end
        taken = every[:, None], np.maximum(column, 0)
        return next_tokens(np.where(column < 0, self.vocab_size - 1, sequence[taken]), asked[taken] & (column >= 0))

    def _pairs(self, rng, count, pairs, training):
        """Keys with values, [count, pairs, key_length + value_length]; -1 where they are shorter."""
        keys, drawn = (self.vocab_size - 1) // 2, count * pairs
        key = distinct(rng, drawn, keys, self.key_length)
        value = keys + distinct(rng, drawn, self.vocab_size - 1 - keys, self.value_length)
        key_sizes = rng.integers(1 if training else self.key_length, self.key_length, (drawn, 1), endpoint=True)
        value_sizes = rng.integers(1, self.value_length, (drawn, 1), endpoint=True)
        key = np.where(np.arange(self.key_length) < key_sizes, key, -1)
        value = np.where(np.arange(self.value_length) < value_sizes, value, -1)
        return np.concatenate([key, value], axis=1).reshape(count, pairs, -1)


@task("memorization")
class Memorization(Task):
    """Facts: each key has a value, the same in all rows, in training and in tests.

        k ? k' ? k'' ?    : at each ? the value of the key before it

    Ids: (V - 1) // 2 keys, then values, no value of two keys; V - 1 asks. `seed` makes the facts; at the default they
    are those of the suite.
    """

    vocab_size: int = setting(256, "token ids", at_least=3)
    seed: int = setting(12345, "of the facts, whatever the run's", at_least=0)

    @property
    def asked(self):
        return self.length // 2

    def problem(self):
        return None if self.length >= 2 else f"got {self.length} tokens a row, expected at least 2: a key and its mark"

    def rows(self, rng, count, *, training=False):
        value_of = facts(self.vocab_size, self.seed)
        key = rng.integers(0, len(value_of), (count, (self.length + 1) // 2))
        tokens = np.stack([key, np.full_like(key, self.vocab_size - 1)], axis=2)
        targets = np.stack([np.zeros_like(key), value_of[key]], axis=2)
        asked = np.broadcast_to(np.arange(self.length) % 2 == 1, (count, self.length))
        return only_asked(*(array.reshape(count, -1)[:, : self.length] for array in (tokens, targets)), asked)


@functools.lru_cache(maxsize=8)
def facts(vocab_size: int, seed: int) -> np.ndarray:
    """The value of each key, of a vocabulary with a mark."""
    rng, middle = np.random.default_rng(seed), (vocab_size - 1) // 2
    keys, values = [*range(middle)], [*range(middle, vocab_size - 1)]
    rng.shuffle(keys)  # of lists, as the suite shuffles: arrays take other numbers from the generator
    rng.shuffle(values)
    return np.array(values)[np.argsort(keys)]


@task("mad_selective_copying")
class MadSelectiveCopying(Task):
    """Selective copying with blanks before each token, as many as chance puts there.

        . a . . b c | . . .    : at the blanks after the mark a b c

    Each of the blanks stands before one of the tokens to copy, whichever as likely. So the mark always follows the last
    of them, where `selective_copying` has any places.

    Ids: V - 2 tokens to copy; V - 2 is the blank, V - 1 the mark.
    """

    vocab_size: int = setting(16, "token ids", at_least=3)
    copies: int = setting(16, "tokens to copy", unit="token")

    @property
    def asked(self):
        return self.copies

    def problem(self):
        least = 2 * self.copies + 2
        if self.length < least:
            return (
                f"got {self.length} tokens a row, expected at least {least}: twice {self.copies}, a blank and the mark"
            )
        return None

    def rows(self, rng, count, *, training=False):
        blanks = self.length - 2 * self.copies - 1
        copied = rng.integers(0, self.vocab_size - 2, (count, self.copies))
        before = rng.integers(0, self.copies, (count, blanks))  # which token a blank stands before
        places = np.stack([i + (before <= i).sum(1) for i in range(self.copies)], axis=1)
        tokens = np.full((count, self.length), self.vocab_size - 2)
        tokens[np.arange(count)[:, None], places] = copied
        tokens[:, -self.copies - 1] = self.vocab_size - 1
        targets = np.zeros_like(tokens)
        targets[:, -self.copies :] = copied
        return only_asked(
            tokens, targets, np.broadcast_to(np.arange(self.length) >= self.length - self.copies, tokens.shape)
        )


@task("compression")
class Compression(Task):
    """All tokens of a row's first half again, in their order, from what the layers hold after the last of them.

        a b c d | | | |    : a b c d

    It is not the suite's task. There one vector, an encoder's output at a mark, and a position go through an MLP of its
    own, which names the token that stood there: all passes through the vector. A causal language model has no such
    decoder. Here marks are read one by one, and what was read reaches them through the layers: through a recurrent
    layer's state, whose size is the bottleneck. Softmax attention keeps every token and has none. Accuracies are not to
    be set beside the suite's.

    62 tokens are the suite's 31 random tokens. Ids: V - 1 tokens; V - 1 is the mark. Of an odd length the first mark
    asks for nothing.
    """

    vocab_size: int = setting(16, "token ids", at_least=3)

    @property
    def asked(self):
        return self.length // 2

    def problem(self):
        return None if self.length >= 2 else f"got {self.length} tokens a row, expected at least 2: one, and its mark"

    def rows(self, rng, count, *, training=False):
        held = self.length // 2
        tokens = np.full((count, self.length), self.vocab_size - 1)
        tokens[:, :held] = rng.integers(0, self.vocab_size - 1, (count, held))
        targets = np.zeros_like(tokens)
        targets[:, self.length - held :] = tokens[:, :held]
        return only_asked(tokens, targets, np.broadcast_to(np.arange(self.length) >= self.length - held, tokens.shape))
