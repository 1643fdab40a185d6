"""MAD's tasks: the sizes of its baselines, every answer by another rule, and what is drawn how often."""

import numpy as np
import pytest

from zoo.data.synthetic import make

SUITES_FACTS = {120: 175, 0: 239, 101: 249, 119: 185, 114: 174, 90: 243, 107: 150, 6: 142}


def rows_of(name, length, count, training=False, **sizes):
    task = make(name, length, **sizes)
    rows = task.rows(np.random.default_rng(0), count, training=training)
    assert rows.asked.sum(1).max() <= task.asked and (rows.known | ~rows.asked).all()
    assert rows.tokens.shape == rows.targets.shape == (count, length) and rows.tokens.max() < task.vocab_size
    return rows


def test_defaults_are_the_baselines():
    said = {
        "in_context_recall": {"vocab_size": 16},
        "noisy_recall": {"vocab_size": 32, "noise_vocab_size": 16, "noise": 0.2},
        "fuzzy_recall": {"vocab_size": 16, "key_length": 3, "value_length": 3},
        "memorization": {"vocab_size": 256, "seed": 12345},
        "mad_selective_copying": {"vocab_size": 16, "copies": 16},
        "compression": {"vocab_size": 16},
    }
    for name, sizes in said.items():
        sized = ", ".join(f"{key}={value}" for key, value in list(sizes.items())[1:])
        assert repr(make(name, 64)) == f"Task(name='{name}', vocab_size={sizes['vocab_size']}, length=64" + (
            f", {sized})" if sized else ")"
        )


@pytest.mark.parametrize("length", [128, 127])
@pytest.mark.parametrize(("name", "noise"), [("in_context_recall", 0.0), ("noisy_recall", 0.2)])
def test_recall_asks_for_the_values_of_keys_that_came_again(name, noise, length):
    rows = rows_of(name, length, 300)
    noisy, last_keys, expected = 0, [], np.zeros((300, length), bool)
    sequences = np.concatenate([rows.tokens, rows.targets[:, -1:]], axis=1)[:, :128]
    assert (rows.targets[:, :127] == sequences[:, 1:]).all()
    for row, sequence in enumerate(sequences):
        value_of = {}
        for i in range(0, 128, 2):
            key, value = sequence[i : i + 2]
            if key >= 16:
                noisy += 1
                assert value >= 16 and i < 126
                continue
            assert key < 8 <= value < 16 and value_of.get(key, value) == value
            expected[row, i] = key in value_of
            value_of[key] = value
        assert expected[row, 126]
        last_keys.append(sequence[126])
    assert (rows.asked == expected).all() and rows.known[:, :127].all() and rows.known.sum() == 300 * 127
    assert noisy / (300 * 63) == pytest.approx(noise, abs=0.015)
    assert np.bincount(last_keys, minlength=8).min() > 300 / 8 / 2


def test_noisy_recall_keeps_a_pair():
    rows = rows_of("noisy_recall", 6, 500, noise=0.99)
    assert ((rows.tokens[:, :4] < 16).any(1) & rows.asked[:, 4]).all()


@pytest.mark.parametrize("training", [False, True])
def test_fuzzy_recall_asks_for_values_of_several_tokens(training):
    """A row falls into pairs where a value's token is followed by a key's."""
    rows = rows_of("fuzzy_recall", 128, 300, training)
    key_sizes, value_sizes, answerable = np.zeros(4, int), np.zeros(4, int), 0
    for tokens, targets, asked in zip(rows.tokens, rows.targets, rows.asked, strict=True):
        sequence = np.append(tokens, targets[-1])
        start = np.flatnonzero(sequence != 15)[0]
        assert start >= 2 and (sequence[start:] != 15).all() and (sequence[1:] == targets).all()
        cuts = np.flatnonzero((sequence[start + 1 :] < 7) & (sequence[start:-1] >= 7)) + start + 1
        value_of, expected = {}, np.zeros(129, bool)
        for pair, at in zip(np.split(sequence, cuts), [0, *cuts], strict=True):
            first = start if at == 0 else at
            pair = pair[pair != 15]
            key, value = tuple(pair[pair < 7]), tuple(pair[pair >= 7])
            assert len({*key}) == len(key) and len({*value}) == len(value)
            assert value_of.get(key, value) == value
            expected[first + len(key) : first + len(pair)] = key in value_of
            value_of[key] = value
            key_sizes[len(key)] += 1
            value_sizes[len(value)] += 1
        assert (expected[1:] == asked).all()
        answerable += asked[-1]
    assert answerable >= 290
    evenly = pytest.approx(1 / 3, abs=0.06)
    assert list(value_sizes / value_sizes.sum())[1:] == [evenly] * 3
    if training:
        assert list(key_sizes / key_sizes.sum())[1:] == [evenly] * 3
    else:
        assert key_sizes[:3].sum() == 0


def test_memorization_has_the_same_facts_in_every_row():
    rows = rows_of("memorization", 32, 400)
    assert rows.asked[:, 1::2].all() and not rows.asked[:, ::2].any() and (rows.known == rows.asked).all()
    keys, values = rows.tokens[:, ::2].ravel(), rows.targets[:, 1::2].ravel()
    assert (rows.tokens[:, 1::2] == 255).all()
    facts = dict(zip(keys, values, strict=True))
    assert set(facts) == set(range(127)) and len(set(facts.values())) == 127
    assert all(facts[key] == value and 127 <= value < 255 for key, value in zip(keys, values, strict=True))
    other = make("memorization", 32, seed=1).rows(np.random.default_rng(0), 400)
    assert (other.tokens == rows.tokens).all() and (other.targets[:, 1::2] != rows.targets[:, 1::2]).any()


def test_memorization_has_the_suites_facts():
    """As generate_kv_map(255, seed=12345) of athms/mad-lab gives them: the first keys it lists, and their values."""
    facts = make("memorization", 2)
    rows = facts.rows(np.random.default_rng(0), 4000)
    value_of = dict(zip(rows.tokens[:, 0], rows.targets[:, 1], strict=True))
    assert {key: value_of[key] for key in SUITES_FACTS} == SUITES_FACTS


def test_selective_copying_has_blanks_before_its_tokens():
    rows = rows_of("mad_selective_copying", 256, 500)
    for tokens, targets, asked in zip(rows.tokens, rows.targets, rows.asked, strict=True):
        (mark,) = np.flatnonzero(tokens == 15)
        assert mark == 239 and tokens[238] < 14 and (tokens[240:] == 14).all()
        copied = tokens[:239][tokens[:239] < 14]
        assert len(copied) == 16 and list(targets[asked]) == list(copied) and (np.flatnonzero(asked) >= 240).all()
    first = (rows.tokens < 14).argmax(1)  # blanks before the first token: 223 of them, each there with 1 / 16
    assert first.mean() == pytest.approx(223 / 16, abs=4 * np.sqrt(223 / 16 / 500))


@pytest.mark.parametrize("length", [62, 9])
def test_compression_asks_for_all_of_it(length):
    rows, held = rows_of("compression", length, 100), length // 2
    assert (rows.tokens[:, held:] == 15).all() and set(rows.tokens[:, :held].flat) == set(range(15))
    for tokens, targets, asked in zip(rows.tokens, rows.targets, rows.asked, strict=True):
        assert list(np.flatnonzero(asked)) == list(range(length - held, length))
        assert list(targets[asked]) == list(tokens[:held])
