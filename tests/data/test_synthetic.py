"""The synthetic tasks: their answers by another route, their distributions, and as a source of a run."""

import collections
import hashlib
import itertools
import pathlib

import numpy as np
import pytest

from zoo import data
from zoo.config import Config
from zoo.data.synthetic import TASKS, find, make
from zoo.data.synthetic.task import options
from zoo.errors import UsageError
from zoo.training import workdir


def rows_of(task, count, seed=0):
    """Sequences with their answers, [count, T + 1]."""
    rows = task.rows(np.random.default_rng(seed), count)
    return np.concatenate([rows.tokens, rows.targets[:, -1:]], axis=1)


def digest(batches):
    found = hashlib.sha256()
    for batch in batches:
        for name in ("tokens", "targets", "segment_ids", "weights"):
            found.update(batch[name].tobytes())
    return found.hexdigest()[:16]


# Vocabulary, length and copies; digests of rows, training and validation batches, and of a corpus.
KEPT = """
induction_heads 20 30 16 3707c7fb06e77958 702435331d744924 c1f2127cbe4491be 17c798a4871a33a4
associative_recall 10 20 16 fa87db935ead98e3 661242eecfc42378 15b0209cb8c8adf2 cf352e838acc4341
selective_copying 16 128 8 494c793503033e69 4f8c0f03fcb27d55 b0d7040d1ae36b10 30190ece80233d9e
parity 2 32 16 d4857195a439d31a 128abea4fd1066fb fe0c86e350d53b8e 7e77e5f5fc5f9f4f
modular_addition 5 12 16 fcf71115ccaa8a61 9a3392222081db26 c910f91055c18bd4 48ed51d7b88f9ef6
word_problem:S3 6 16 16 aa58a5f5305eac89 3f7c4a3cdb6ba477 04c2993d939ad16f a5440bc84e22a258
word_problem:A5 60 16 16 2428f5489ee9195f 2a234f5fe2315ec7 bfbb3ecd58bd8f04 519723a283ee4cab
word_problem:S5 120 16 16 cd7c3e99c3f3c2f7 7822e3fb096850fe 3f7ccc4fcfa7bcf1 1c195fbca3f5ed64
"""


@pytest.mark.parametrize("line", KEPT.strip().split("\n"))
def test_rows_and_descriptions_are_those_that_runs_were_kept_with(line):
    """benchmarks/results/papers_*.json, and checkpoints of runs on tasks."""
    name, *sizes, rows, training, validation, corpus = line.split()
    vocab_size, length, copies = map(int, sizes)
    task = make(name, length, vocab_size=vocab_size, **({"copies": copies} if name == "selective_copying" else {}))
    assert repr(task) == f"Task(name={name!r}, vocab_size={vocab_size}, length={length}, copies={copies})"
    drawn = task.rows(np.random.default_rng([3, 5]), 7)
    assert digest(drawn.batch(answers_only=each) for each in (True, False)) == rows
    config = config_of(name)
    batches = data.training_dataset(config).iterator()
    assert digest(itertools.islice(batches, 2)) == training
    batches.close()
    assert digest(data.validation_batches(config, max_batches=2)) == validation
    assert data.corpus_info(config)["fingerprint"] == corpus


def test_induction_heads_ask_for_what_followed_the_mark():
    t = make("induction_heads", 30)
    rows = rows_of(t, 2000)
    assert rows.shape == (2000, 32) and t.context_length == 31
    places = []
    for row in rows:
        (first, last) = np.flatnonzero(row == 18)
        assert last == 30 and row[31] == row[first + 1] < 18
        places.append(first)
    assert set(places) == set(range(28))  # anywhere, so that the answer is not the mark itself
    assert max(collections.Counter(rows[:, -1]).values()) < 2 * 2000 / 18


def test_associative_recall_asks_for_the_value_of_a_key_that_occurred():
    t = make("associative_recall", 20)
    rows = rows_of(t, 2000)
    assert rows.shape == (2000, 23) and t.context_length == 22
    for row in rows:
        pairs = dict(zip(row[:20:2], row[1:20:2], strict=True))
        assert all(pairs[key] == value for key, value in zip(row[:20:2], row[1:20:2], strict=True))
        assert set(pairs) <= set(range(4)) and set(pairs.values()) <= set(range(4, 8))
        assert row[20] == 8 and row[22] == pairs[row[21]]


def test_selective_copying_asks_for_the_tokens_in_order():
    t = make("selective_copying", 40, copies=4)
    batch = t.rows(np.random.default_rng(0), 500).batch(answers_only=False)
    assert batch["tokens"].shape == (500, 44)
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
        assert list(tokens[:40][tokens[:40] > 0]) == list(targets[weights > 0])
        assert (tokens[40:] == 15).all() and list(np.flatnonzero(weights)) == [40, 41, 42, 43]
    places = np.flatnonzero((batch["tokens"][:, :40] > 0).any(0))
    assert len(places) == 40


def test_states_are_what_the_tokens_so_far_make_of_the_identity():
    parity, sums = make("parity", 20), make("modular_addition", 20, vocab_size=7)
    for t in (parity, sums):
        batch = t.rows(np.random.default_rng(0), 50).batch(answers_only=False)
        np.testing.assert_array_equal(batch["targets"], np.cumsum(batch["tokens"], axis=1) % t.vocab_size)
        assert batch["weights"].all() and set(batch["tokens"].flat) == set(range(t.vocab_size))


@pytest.mark.parametrize("name, order", [("S3", 6), ("A5", 60), ("S5", 120)])
def test_states_of_a_word_problem_are_arrangements(name, order):
    """Of n things, which each token's permutation puts elsewhere."""
    size = int(name[1])
    t = make(f"word_problem:{name}", 20)
    assert t.vocab_size == order
    elements = [np.array(each) for each in itertools.permutations(range(size))]
    if name[0] == "A":
        elements = [each for each in elements if round(np.linalg.det(np.eye(size)[each])) == 1]
    assert len(elements) == order
    batch = t.rows(np.random.default_rng(0), 40).batch(answers_only=True)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        arranged = np.arange(size)
        for token, target in zip(tokens, targets, strict=True):
            arranged = elements[token][arranged]
            assert (elements[target] == arranged).all()
    assert (np.flatnonzero(batch["weights"][0]) == 19).all()  # the state after the last
    counts = np.bincount(t.rows(np.random.default_rng(1), 3000).targets[:, -1], minlength=order)
    assert (counts > 0).all() and counts.max() < 3 * 3000 / order


@pytest.mark.parametrize(("name", "moved", "elements"), [("S5", 2, 11), ("S5", 3, 31), ("A5", 3, 21), ("A5", 4, 36)])
def test_tokens_of_a_word_problem_move_so_many_points(name, moved, elements):
    """Targets may be any element. 10 exchanges and 20 cycles of three; 15 pairs of exchanges."""
    t = make(f"word_problem:{name}", 8, moved=moved)
    rows = t.rows(np.random.default_rng(0), 2000)
    every = list(itertools.permutations(range(5)))
    if name[0] == "A":
        every = [each for each in every if round(np.linalg.det(np.eye(5)[list(each)])) == 1]
    tokens = set(rows.tokens.flat)
    assert {sum(a != b for a, b in enumerate(every[token])) for token in tokens} <= {0, *range(2, moved + 1)}
    assert len(tokens) == elements and len(set(rows.targets[:, -1])) > 0.9 * len(every)
    assert "moved" in repr(t) and "moved" not in repr(make(f"word_problem:{name}", 8))


def test_a_tests_weights_are_on_the_answer_and_training_may_count_every_token():
    rows = make("induction_heads", 20).rows(np.random.default_rng(0), 3)
    batch = rows.batch(answers_only=True)
    assert (batch["weights"].sum(1) == 1).all() and batch["weights"][:, -1].all()
    assert rows.batch(answers_only=False)["weights"].all()


def config_of(source, context_length=64):
    config = Config()
    config.data.source, config.train.context_length = source, context_length
    config.train.batch_size, config.train.steps = 4, 3
    return config


@pytest.mark.parametrize("name", TASKS)
def test_as_a_source_batches_are_functions_of_their_step_and_can_be_read_in_part(name):
    config = config_of(name)
    config.eval.batch_size = 64
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
        assert all(np.array_equal(part[key], array[[1, 3]]) for key, array in batch.items())
    assert data.corpus_info(config)["validation_tokens"] == validation.num_tokens


@pytest.mark.parametrize(
    ("source", "context_length", "message"),
    [
        ("induction_heads,stdlib", 64, "cannot be mixed"),
        ("stdlib, mqar?pairs=2", 64, "cannot be mixed"),
        ("selective_copying", 8, "selective_copying: got a length of -8 .* 16 tokens to copy; rows have 8 tokens"),
        ("induction_heads", 3, "got a length of 2, expected at least 3"),
        ("associative_recall", 31, "expected even"),
        ("mqar?pairs=8", 31, "got 31 tokens a row, expected at least 32"),
        ("mqar?vocab_size=8&pairs=4", 64, "got a vocabulary of 8, expected an even one of at least 10"),
        ("word_problem", 64, "unknown synthetic task 'word_problem'; known, nearest first: word_problem:"),
        ("word_problem:S4", 64, "unknown synthetic task 'word_problem:S4'; .*word_problem:A5"),
        ("word_problem:A5?moved=2", 64, "word_problem:A5: got moved = 2, by which no element but one is left"),
        ("word_problem:S5?vocab_size=60", 64, "word_problem:S5: got a vocabulary of 60, expected 120"),
        ("mqqar?pairs=2", 64, "unknown synthetic task 'mqqar'; known, nearest first: mqar"),
        ("mqar?pair=2", 64, "mqar: unknown option 'pair'; known, nearest first: pairs"),
        ("mqar?pairs", 64, r"got 'pairs', expected each option once, as in mqar\?pairs=0"),
        ("mqar?pairs=2&pairs=3", 64, "expected each option once"),
        ("mqar?alpha=fast", 64, "mqar: alpha: got 'fast', expected a number"),
        ("mqar?alpha=0", 64, "mqar: alpha: got 0.0, expected more than 0"),
        ("mqar?pairs=-1", 64, "mqar: pairs: got -1, expected at least 1"),
    ],
)
def test_what_cannot_be_is_named(source, context_length, message):
    with pytest.raises(UsageError, match=f"data.source: .*{message}"):
        find(config_of(source, context_length))


def test_a_task_is_told_from_text_and_its_vocabulary_fits_the_models():
    assert all(find(config_of(text)) is None for text in ("stdlib", "words.txt", "needle*", "needl?.txt"))
    small = config_of("induction_heads")
    small.model.vocab_size = 16
    with pytest.raises(UsageError, match="model.vocab_size: got 16, induction_heads needs at least 20"):
        find(small)
    assert workdir.settle_vocabulary(config_of("mqar"), None).model.vocab_size == 8192
    assert workdir.settle_vocabulary(config_of("parity"), None).model.vocab_size == 320
    with pytest.raises(UsageError, match="parity: unknown option 'pairs'; known, nearest first: vocab_size"):
        make("parity", 8, pairs=2)


def test_the_documentation_has_every_task_and_option():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name in TASKS:
        (row,) = (line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1])
        assert all(f"`{option}=" in row for option in options(name).keys() - {"vocab_size"})


@pytest.mark.parametrize(("name", "value"), [("validation_source", "other.txt"), ("weights", "1,2")])
def test_settings_of_text_are_refused_not_passed_over(name, value):
    config = config_of("induction_heads")
    setattr(config.data, name, value)
    with pytest.raises(UsageError, match=f"data.{name}: "):
        data.check(config)
