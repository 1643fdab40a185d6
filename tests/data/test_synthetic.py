"""The synthetic tasks: their answers by another route, their distributions, and as a source of a run."""

import collections
import itertools

import numpy as np
import pytest

from zoo import data
from zoo.config import Config
from zoo.data.synthetic import TASKS, Task, find
from zoo.errors import UsageError


def task(name, **sizes):
    return Task(name, **({"vocab_size": 10, "length": 20, "copies": 4} | sizes))


def test_induction_heads_ask_for_what_followed_the_mark():
    t = task("induction_heads", vocab_size=20, length=30)
    rows = t.rows(np.random.default_rng(0), 2000)
    assert rows.shape == (2000, 32) and t.context_length == 31
    places = []
    for row in rows:
        (first, last) = np.flatnonzero(row == 18)
        assert last == 30 and row[31] == row[first + 1] < 18
        places.append(first)
    assert set(places) == set(range(28))  # anywhere, so that the answer is not the mark itself
    assert max(collections.Counter(rows[:, -1]).values()) < 2 * 2000 / 18


def test_associative_recall_asks_for_the_value_of_a_key_that_occurred():
    t = task("associative_recall")
    rows = t.rows(np.random.default_rng(0), 2000)
    assert rows.shape == (2000, 23) and t.context_length == 22
    for row in rows:
        pairs = dict(zip(row[:20:2], row[1:20:2], strict=True))
        assert all(pairs[key] == value for key, value in zip(row[:20:2], row[1:20:2], strict=True))
        assert set(pairs) <= set(range(4)) and set(pairs.values()) <= set(range(4, 8))
        assert row[20] == 8 and row[22] == pairs[row[21]]


def test_selective_copying_asks_for_the_tokens_in_order():
    t = task("selective_copying", vocab_size=16, length=40)
    batch = t.batch(t.rows(np.random.default_rng(0), 500), answers_only=False)
    assert batch["tokens"].shape == (500, 44)
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
        assert list(tokens[:40][tokens[:40] > 0]) == list(targets[weights > 0])
        assert (tokens[40:] == 15).all() and list(np.flatnonzero(weights)) == [40, 41, 42, 43]
    places = np.flatnonzero((batch["tokens"][:, :40] > 0).any(0))
    assert len(places) == 40


def test_states_are_what_the_tokens_so_far_make_of_the_identity():
    parity, sums = task("parity", vocab_size=2), task("modular_addition", vocab_size=7)
    for t in (parity, sums):
        batch = t.batch(t.rows(np.random.default_rng(0), 50), answers_only=False)
        np.testing.assert_array_equal(batch["targets"], np.cumsum(batch["tokens"], axis=1) % t.vocab_size)
        assert batch["weights"].all() and set(batch["tokens"].flat) == set(range(t.vocab_size))


@pytest.mark.parametrize("name, order", [("S3", 6), ("A5", 60), ("S5", 120)])
def test_states_of_a_word_problem_are_arrangements(name, order):
    """Of n things, which each token's permutation puts elsewhere."""
    size = int(name[1])
    t = task(f"word_problem:{name}", vocab_size=order)
    elements = [np.array(each) for each in itertools.permutations(range(size))]
    if name[0] == "A":
        elements = [each for each in elements if round(np.linalg.det(np.eye(size)[each])) == 1]
    assert len(elements) == order
    batch = t.batch(t.rows(np.random.default_rng(0), 40), answers_only=True)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        arranged = np.arange(size)
        for token, target in zip(tokens, targets, strict=True):
            arranged = elements[token][arranged]
            assert (elements[target] == arranged).all()
    assert (np.flatnonzero(batch["weights"][0]) == 19).all()  # the state after the last
    counts = np.bincount(t.rows(np.random.default_rng(1), 3000)[:, -1], minlength=order)
    assert (counts > 0).all() and counts.max() < 3 * 3000 / order


def test_a_tests_weights_are_on_the_answer_and_training_may_count_every_token():
    t = task("induction_heads")
    rows = t.rows(np.random.default_rng(0), 3)
    batch = t.batch(rows, answers_only=True)
    assert (batch["weights"].sum(1) == 1).all() and (batch["targets"][:, -1] == rows[:, -1]).all()
    assert t.batch(rows, answers_only=False)["weights"].all()


def config_of(source, context_length=64):
    config = Config()
    config.data.source, config.train.context_length = source, context_length
    config.train.batch_size, config.train.steps = 4, 3
    return config


@pytest.mark.parametrize("name", TASKS)
def test_as_a_source_batches_are_functions_of_their_step_and_can_be_read_in_part(name):
    config = config_of(name)
    data.check(config)
    batches = data.training_dataset(config).iterator()
    first, second, third = (next(batches) for _ in range(3))
    batches.close()
    assert first["tokens"].shape == (4, 64) and not np.array_equal(first["tokens"], second["tokens"])
    resumed = data.training_dataset(config, [1, 3]).iterator(start_step=2)
    half = next(resumed)
    resumed.close()
    for key, array in half.items():
        np.testing.assert_array_equal(array, third[key][1::2])
    validation = data.validation_batches(config)
    assert sum(batch["weights"].sum() for batch in validation) == validation.num_tokens
    assert not any(np.array_equal(batch["tokens"], first["tokens"]) for batch in validation)
    for batch, part in zip(validation, validation.only([1, 3]), strict=True):
        assert all(np.array_equal(part[key], array[1::2]) for key, array in batch.items())
    assert data.corpus_info(config)["validation_tokens"] == validation.num_tokens


def test_what_cannot_be_is_named():
    with pytest.raises(UsageError, match="cannot be mixed"):
        find(config_of("induction_heads,stdlib"))
    with pytest.raises(UsageError, match="selective_copying: got a length of -8"):
        find(config_of("selective_copying", context_length=8))
    with pytest.raises(UsageError, match="expected even"):
        find(config_of("associative_recall", context_length=31))
    small = config_of("induction_heads")
    small.model.vocab_size = 16
    with pytest.raises(UsageError, match="needs at least 20"):
        find(small)
    with pytest.raises(UsageError, match="data.source: unknown synthetic task 'word_problem'; expected .*:S3"):
        find(config_of("word_problem"))
    assert find(config_of("stdlib")) is None
    with pytest.raises(UsageError, match="word_problem:S5: got a vocabulary of 60, expected 120"):
        task("word_problem:S5", vocab_size=60)
    with pytest.raises(UsageError, match="unknown synthetic task 'word_problem:S4'; expected one of .*word_problem:A5"):
        task("word_problem:S4")


@pytest.mark.parametrize(("name", "value"), [("validation_source", "other.txt"), ("weights", "1,2")])
def test_settings_of_text_are_refused_not_passed_over(name, value):
    config = config_of("induction_heads")
    setattr(config.data, name, value)
    with pytest.raises(UsageError, match=f"data.{name}: "):
        data.check(config)
