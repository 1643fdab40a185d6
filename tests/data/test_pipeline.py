import collections
import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from plain_streams import SEPARATOR, rows_of, stream_of

from zoo.config import Config
from zoo.data import cache, check, corpora, training_dataset, validation_batches
from zoo.errors import UsageError


def take(dataset, count, start=0):
    iterator = dataset.iterator(start)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def expected_rows(stream, length):
    stream = stream.tolist()
    starts = range(0, len(stream) - 1, length)
    rows = [(tuple(stream[s : s + length]), tuple(stream[s + 1 : s + length + 1])) for s in starts]
    return [(inputs[: len(targets)], targets) for inputs, targets in rows]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
            assert batch[name].dtype == other[name].dtype


@pytest.fixture
def corpus(config, write_documents):
    """All of it for training."""
    config.data.source, documents = write_documents(30)
    write_documents(1, seed=9, folder="validation")
    config.data.validation_source = config.data.source.replace("/text/", "/validation/")
    return documents


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 8, 50])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_an_epoch_predicts_every_token_exactly_once(config, corpus, length, threads):
    config.train.context_length, config.data.read_threads = length, threads
    stream = stream_of(corpus)
    rows = expected_rows(stream, length)
    config.train.batch_size = len(rows)
    dataset = training_dataset(config)
    assert dataset.tokens_per_epoch == len(stream) - 1
    for batch in take(dataset, 3):
        assert collections.Counter(rows_of(batch)) == collections.Counter(rows)
        assert batch["weights"].sum() == dataset.tokens_per_epoch


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_batches_run_over_the_ends_of_epochs_and_drop_nothing(config, corpus, batch_size):
    rows = expected_rows(stream_of(corpus), 8)
    config.train.batch_size = batch_size
    batches = take(training_dataset(config), 3 * len(rows) // batch_size + 1)
    seen = [row for batch in batches for row in rows_of(batch)]
    for epoch in range(3):
        part = seen[epoch * len(rows) : (epoch + 1) * len(rows)]
        assert collections.Counter(part) == collections.Counter(rows)


def test_names_shapes_and_types_of_a_batch(config, corpus):
    batch = take(training_dataset(config), 1)[0]
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((4, 8), "int32"),
        "targets": ((4, 8), "int32"),
        "segment_ids": ((4, 8), "int32"),
        "weights": ((4, 8), "float32"),
    }


@pytest.mark.parametrize("length", [8, 50])
def test_segments_start_at_separators_and_are_numbered_within_a_row(config, corpus, length):
    config.train.context_length = length
    for batch in take(training_dataset(config), 20):
        for tokens, segment_ids, weights in zip(batch["tokens"], batch["segment_ids"], batch["weights"], strict=True):
            segment = 1
            for t in range(length):
                segment += bool(t and tokens[t] == SEPARATOR)
                assert segment_ids[t] == (segment if weights[t] else 0)


@pytest.mark.parametrize("start", [0, 1, 5, 13, 100, 10_001])
def test_resuming_at_a_step_gives_the_batches_of_an_unbroken_run(config, corpus, start):
    config.train.batch_size = 7
    dataset = training_dataset(config)
    if start < 1000:
        assert_same(take(training_dataset(config), 30, start), take(dataset, start + 30)[start:])
    else:  # far ahead, without reading what came before
        began = time.perf_counter()
        assert_same(take(dataset, 3, start), take(dataset, 4, start - 1)[1:])
        assert time.perf_counter() - began < 5


def test_no_token_is_repeated_or_skipped_over_three_resumes(config, corpus):
    rows = expected_rows(stream_of(corpus), 8)
    config.train.batch_size = 1
    stops = [0, 3, 4, len(rows) - 20, len(rows)]
    seen = collections.Counter()
    for start, stop in itertools.pairwise(stops):
        for batch in take(training_dataset(config), stop - start, start):
            seen.update(rows_of(batch))
    assert seen == collections.Counter(rows)
    assert sum(len(targets) * count for (_, targets), count in seen.items()) == len(stream_of(corpus)) - 1


@pytest.mark.parametrize("weights", ["", "3,1"])
def test_rows_of_a_batch_can_be_read_without_the_others(config, write_documents, weights):
    config.data.source = ",".join(write_documents(30, seed=seed, folder=f"text{seed}")[0] for seed in (1, 2))
    config.data.weights, config.train.batch_size = weights, 8
    alone = take(training_dataset(config), 40, start=3)
    rows = [1, 4, 5]
    for batch, part in zip(alone, take(training_dataset(config, rows), 40, start=3), strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(part[name], array[rows], err_msg=name)
    validation = validation_batches(config)
    for batch, part in zip(validation, validation.only(rows), strict=True):  # the last one is filled up
        for name, array in batch.items():
            np.testing.assert_array_equal(part[name], array[rows], err_msg=name)


def test_the_order_follows_the_seed_and_changes_with_the_epoch(config, corpus):
    rows = expected_rows(stream_of(corpus), 8)
    config.train.batch_size = len(rows)
    first, second = (rows_of(batch) for batch in take(training_dataset(config), 2))
    assert first != second
    assert first != rows
    assert rows_of(take(training_dataset(config), 1)[0]) == first
    config.train.seed = 1
    assert rows_of(take(training_dataset(config), 1)[0]) not in (first, second)


def test_sources_without_weights_are_one_corpus(config, write_documents):
    specs, documents = zip(*(write_documents(25, seed=s, folder=f"text{s}") for s in (1, 2)), strict=True)
    config.data.source = ",".join(specs)
    config.data.validation_source = specs[0]
    rows = [row for part in documents for row in expected_rows(stream_of(part), 8)]
    config.train.batch_size = len(rows)
    dataset = training_dataset(config)
    assert dataset.tokens_per_epoch == sum(len(stream_of(part)) - 1 for part in documents)
    assert collections.Counter(rows_of(take(dataset, 1)[0])) == collections.Counter(rows)


def test_weights_are_shares_of_the_rows_and_small_sources_repeat(config, write_documents):
    small, _ = write_documents(3, folder="small", alphabet=b"a", longest=30)
    large, _ = write_documents(200, folder="large", alphabet=b"b")
    config.data.source, config.data.weights, config.train.context_length = f"{small},{large}", "3, 1", 4
    batches = take(training_dataset(config), 100)
    of_small = np.concatenate([(batch["tokens"] == ord("a")).any(axis=1) for batch in batches])
    assert of_small.mean() == pytest.approx(0.75, abs=0.02)
    assert all(0 < share.sum() < 4 for share in of_small.reshape(100, 4))  # evenly, not in runs


@pytest.mark.parametrize("weights", ["", "3,1"])
def test_rows_are_those_of_the_batches(config, write_documents, weights):
    config.data.source = ",".join(write_documents(20, seed=seed, folder=f"text{seed}")[0] for seed in (0, 1))
    config.data.weights = weights
    dataset = training_dataset(config)
    expected = []
    for batch in take(dataset, 3):
        for tokens, targets, weight in zip(batch["tokens"], batch["targets"], batch["weights"], strict=True):
            last = np.count_nonzero(weight)
            expected.append([*tokens[:last], targets[last - 1]])
    assert [row.tolist() for row in dataset.rows(3)] == expected


def test_a_batch_larger_than_the_memory_costs_its_rows_nothing(config, corpus):
    config.train.batch_size, config.train.context_length = 2**26, 31
    assert len(next(training_dataset(config).rows(10**9))) == 32


def test_closing_an_iterator_ends_its_threads(config, corpus):
    config.data.read_threads = 2
    before = set(threading.enumerate())

    def reading():
        return set(threading.enumerate()) - before

    iterators = [training_dataset(config).iterator() for _ in range(3)]
    for iterator in iterators:
        next(iterator)
    assert reading()
    for iterator in iterators:
        iterator.close()
    deadline = time.monotonic() + 10
    while reading() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reading()


def test_the_fingerprint_follows_text_tokenizer_and_weights(config, write_documents, bpe_path):
    a, _ = write_documents(30, seed=1, folder="a")
    b, _ = write_documents(30, seed=2, folder="b")
    config.train.context_length = 4
    found = []
    for source, weights, tokenizer in [
        (a, "", "bytes"),
        (b, "", "bytes"),
        (a, "", bpe_path),
        (f"{a},{b}", "1,2", "bytes"),
    ]:
        config.data.source, config.data.weights, config.data.tokenizer = source, weights, tokenizer
        found.append(training_dataset(config).fingerprint)
        assert training_dataset(config).fingerprint == found[-1]
    assert len(set(found)) == 4


# --- Validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_validation_covers_every_token_once_in_order(config, write_documents, length, batch_size):
    config.data.source, documents = write_documents(12)
    config.eval.batch_size = batch_size
    batches = validation_batches(config, context_length=length, source=config.data.source)
    stream = stream_of(documents)
    seen, text_bytes = [], 0
    for batch in batches:
        assert all(array.shape == (batch_size, length) for array in batch.values())
        seen += batch["targets"][batch["weights"] > 0].tolist()
        text_bytes += batch["bytes"].sum()
        np.testing.assert_array_equal(batch["segment_ids"] == 0, batch["weights"] == 0)
        np.testing.assert_array_equal(batch["bytes"], (batch["weights"] > 0) & (batch["targets"] != SEPARATOR))
        assert batch["bytes"].dtype == np.float32
    assert seen == stream[1:].tolist()
    assert len(list(batches)) == len(batches) == -(-(len(stream) - 1) // (length * batch_size))
    assert batches.num_tokens == len(seen)
    assert batches.text_bytes == text_bytes == sum(map(len, documents))
    assert_same(list(batches), list(batches))


def test_validation_and_training_are_all_of_the_text(config, write_documents):
    config.data.source, documents = write_documents(30)
    config.train.context_length, config.data.validation_fraction = 8, 0.2
    dataset, validation = training_dataset(config), validation_batches(config)
    text_bytes = sum(map(len, documents))
    assert validation.text_bytes == pytest.approx(0.2 * text_bytes, abs=2)
    assert text_bytes < dataset.tokens_per_epoch + validation.num_tokens <= text_bytes + len(documents) + 1


def test_validation_of_a_mixture_is_that_of_each_source(config, write_documents):
    specs = [write_documents(30, seed=s, folder=f"text{s}")[0] for s in (1, 2)]
    tokens = 0
    for spec in specs:
        config.data.source = spec
        tokens += validation_batches(config).num_tokens
    config.data.source, config.data.weights = ",".join(specs), "1,5"
    assert validation_batches(config).num_tokens == tokens


def test_a_validation_source_is_validated_on_whole_and_leaves_the_training_text_whole(config, corpus):
    assert training_dataset(config).tokens_per_epoch == len(stream_of(corpus)) - 1
    with open(config.data.validation_source.replace("*", "0000"), "rb") as file:
        assert validation_batches(config).num_tokens == len(file.read()) + 1


def test_some_of_the_batches_are_spread_over_the_text(config, corpus):
    config.eval.batch_size = 2
    every = list(validation_batches(config, source=config.data.source))
    some = validation_batches(config, source=config.data.source, max_batches=3)
    assert len(some) == 3
    assert_same(list(some), [every[i * len(every) // 3] for i in range(3)])
    assert len(validation_batches(config, source=config.data.source, max_batches=10**6)) == len(every)


def test_stdlib_is_validated_on_its_validation_split_only(config):
    inside = validation_batches(config)
    assert validation_batches(config, source="stdlib").fingerprint == inside.fingerprint
    assert inside.num_tokens < 1_000_000


def test_bytes_with_a_bpe_tokenizer_are_the_bytes_of_the_text(config, bpe_path):
    config.data.source, config.data.tokenizer, config.eval.batch_size = corpora.__file__, bpe_path, 8
    batches = validation_batches(config, context_length=100, source=corpora.__file__)
    with open(corpora.__file__, "rb") as file:
        size = len(file.read())
    assert sum(batch["bytes"].sum() for batch in batches) == batches.text_bytes == size
    assert batches.num_tokens < size


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_text_shorter_than_one_context_says_how_much_there_is(config, corpus):
    tokens = len(stream_of(corpus)) - 1
    config.train.context_length = tokens + 1
    with pytest.raises(
        UsageError, match=f"has {tokens} tokens, fewer than one context of {tokens + 1}; .*at most {tokens}"
    ):
        training_dataset(config)
    config.train.context_length = tokens
    assert take(training_dataset(config), 1)[0]["weights"].all()


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,0", "1,-2", "a,b", "1,nan", "1,inf", "1,"])
def test_weights_that_do_not_fit_the_sources_are_refused(config, write_documents, weights):
    config.data.source = ",".join(write_documents(3, seed=s, folder=f"text{s}")[0] for s in (1, 2))
    config.data.weights = weights
    with pytest.raises(UsageError, match=r"data.weights: got .*, expected a number|got . for 2 source\(s\)"):
        check(config)


def test_a_vocabulary_smaller_than_a_token_id_is_refused():
    config = Config()
    check(config)
    config.model.vocab_size = 257
    check(config)
    config.model.vocab_size = 256
    with pytest.raises(UsageError, match="model.vocab_size: 256 is smaller than .* id, 256; use 0 .* or at least 257"):
        check(config)


def test_a_cache_with_an_id_beyond_the_vocabulary_is_refused(config, corpus, monkeypatch):
    def open_streams(*arguments):
        return {split: dataclasses.replace(stream, max_id=300) for split, stream in opened(*arguments).items()}

    opened = cache.open_streams
    monkeypatch.setattr(cache, "open_streams", open_streams)
    with pytest.raises(UsageError, match="holds token 300, beyond a vocabulary of 257; delete"):
        training_dataset(config)


@pytest.mark.parametrize("field", ["source", "validation_source"])
def test_check_finds_missing_files_without_tokenizing(config, tmp_path, field):
    setattr(config.data, field, "missing.txt")
    with pytest.raises(UsageError, match=f"data.{field}: no file 'missing.txt'"):
        check(config)
    assert not (tmp_path / "cache").exists()
