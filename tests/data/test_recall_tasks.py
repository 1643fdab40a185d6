"""Tasks that ask for what stood in the row: every answer by another rule, and the published distributions."""

import numpy as np
import pytest

from zoo.data.synthetic import make


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (128, 8), (256, 16), (512, 64)])
def test_mqar_has_the_published_sizes_and_places(length, pairs):
    """P(slot 0 for key 1) and key 1's mean slot, from the weights; and as drawn."""
    probability, mean = {64: (0.2511, 6.20), 128: (0.2131, 11.31), 256: (0.1847, 20.48), 512: (0.1673, 32.53)}[length]
    task = make("mqar", length)
    assert (task.pairs, task.vocab_size, task.alpha, task.asked) == (pairs, 8192, 0.01, pairs)
    count = 4000
    rows = task.rows(np.random.default_rng(0), count)
    first_key = rows.tokens[:, 2 * pairs :: 2] == rows.tokens[:, :1]  # [rows, slots]
    assert (first_key.sum(1) == 1).all()
    slots = first_key.argmax(1)
    assert (slots == 0).mean() == pytest.approx(probability, abs=4 * np.sqrt(0.25 * 0.75 / count))
    assert slots.mean() == pytest.approx(mean, abs=4 * slots.std() / np.sqrt(count))


@pytest.mark.parametrize("random_filler", [False, True])
def test_mqar_asks_for_each_pairs_value_once(random_filler):
    pairs, vocab_size = 6, 40
    task = make("mqar", 41, pairs=pairs, vocab_size=vocab_size, random_filler=random_filler)
    rows = task.rows(np.random.default_rng(0), 500)
    seen = set()
    for tokens, targets, asked in zip(rows.tokens, rows.targets, rows.asked, strict=True):
        value_of = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == len(set(value_of.values())) == pairs
        assert all(0 < key < vocab_size // 2 <= value < vocab_size for key, value in value_of.items())
        places = np.flatnonzero(asked)
        assert (places >= 2 * pairs).all() and not (places % 2).any() and {*tokens[places]} == value_of.keys()
        assert [value_of[key] for key in tokens[places]] == list(targets[places]) and not targets[~asked].any()
        others = tokens[2 * pairs :][~asked[2 * pairs :]]
        assert others.any() == random_filler
        seen.update(others)
    assert seen == (set(range(vocab_size)) if random_filler else {0})
    assert (rows.known == rows.asked).all()


@pytest.mark.parametrize(
    ("needles", "tokens", "depth"), [(1, 1, -1.0), (3, 2, -1.0), (1, 2, 0.5), (3, 2, 0.0), (2, 1, 1.0)]
)
def test_needle_asks_for_what_followed_the_mark_and_the_key(needles, tokens, depth):
    task = make("needle", 60, needles=needles, tokens=tokens, depth=depth, vocab_size=12)
    rows = task.rows(np.random.default_rng(0), 400)
    size, haystack, starts = 2 + tokens, 59 - tokens, []
    for sequence, targets, asked in zip(rows.tokens, rows.targets, rows.asked, strict=True):
        marks = np.flatnonzero(sequence == 11)
        assert len(marks) == needles + 1 and (np.diff(marks) >= size).all() and marks[-1] == haystack
        value_of = {sequence[at + 1]: sequence[at + 2 : at + size] for at in marks[:-1]}
        assert len(value_of) == needles
        assert list(targets[asked]) == list(value_of[sequence[haystack + 1]])
        assert list(np.flatnonzero(asked)) == list(range(60 - tokens, 60))
        starts += [at for at in marks[:-1] if sequence[at + 1] == sequence[haystack + 1]]
    furthest = haystack - size
    if depth < 0:
        assert min(starts) == 0 and max(starts) == furthest and np.mean(starts) == pytest.approx(furthest / 2, rel=0.1)
    elif needles == 1:
        assert set(starts) == {round(depth * furthest)}
    else:
        assert set(starts) == {round(depth) * furthest}
