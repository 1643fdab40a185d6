"""Labelled sequences: what their rows are, that labels stay out of the inputs, and what is refused."""

import collections

import numpy as np
import pytest

from zoo.config import Config
from zoo.data import rows
from zoo.data.labelled import listops
from zoo.data.labelled.stored import LabelledRows, Part, split
from zoo.errors import UsageError


def make(spec, length, **settings):
    config = Config()
    config.train.context_length = length
    for name, value in settings.items():
        setattr(config.data, name, value)
    name, _, options = spec.partition("?")
    return rows.SOURCES[name](config, options)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def value_of(tokens):
    """The value of an expression and its depth, by a stack."""
    stack = [[]]
    deepest = 1
    for token in tokens:
        if token in range(1, 11):
            stack[-1].append(token - 1)
        elif token in range(11, 15):
            stack.append([token])
            deepest = max(deepest, len(stack))
        else:
            operator, *values = stack.pop()
            median = int(np.median(values))
            stack[-1].append([min(values), max(values), median, sum(values) % 10][operator - 11])
    ((value,),) = stack
    return value, deepest


def test_listops_rows_are_expressions_and_their_values():
    source = make("listops?min_length=10", 64)
    batch = source.train_batch(3, 5, 200)
    assert batch["tokens"].shape == (200, 64) and batch["tokens"].dtype == np.int32
    for tokens, length, label in zip(*(batch[name] for name in ("tokens", "lengths", "label")), strict=True):
        assert 10 < length < 64 and not tokens[length:].any() and tokens[:length].all()
        assert value_of(tokens[:length])[0] == label
    assert same(batch, source.train_batch(3, 5, 200))
    first = source.train_batch(3, 5, 2)
    assert all(np.array_equal(first[name], batch[name][:2]) for name in first)  # a row does not depend on the others
    assert not same(batch, source.train_batch(3, 6, 200)) and not same(batch, source.train_batch(4, 5, 200))
    held = source.validation_batch(0, 20)
    assert same(source.validation_batch(10, 20), {name: array[10:] for name, array in held.items()})
    assert not set(map(bytes, held["tokens"])) & set(map(bytes, batch["tokens"]))


# Of 6,000 rows that Long Range Arena's procedure draws at its sizes: depth 10, 10 arguments, 500 < tokens < 2,000.
MEAN, DEVIATION, TENTH, MEDIAN, LAST_TENTH = 1041.3, 393.0, 579.9, 961.0, 1644.0
ANSWERS = [0.169, 0.088, 0.072, 0.078, 0.092, 0.091, 0.082, 0.071, 0.088, 0.170]


def test_listops_has_the_published_distribution():
    batch = make("listops?min_length=500", 2000).train_batch(0, 0, 300)
    lengths = batch["lengths"]
    assert abs(lengths.mean() - MEAN) < 4 * DEVIATION / 300**0.5 and abs(lengths.std() / DEVIATION - 1) < 0.15
    for quantile, share in ((TENTH, 0.1), (MEDIAN, 0.5), (LAST_TENTH, 0.9)):
        assert abs((lengths < quantile).mean() - share) < 4 * (share * (1 - share) / 300) ** 0.5
    counts = np.bincount(batch["label"], minlength=10) / 300
    assert (np.abs(counts - ANSWERS) < 4 * np.sqrt(np.array(ANSWERS) / 300)).all()
    depths = [value_of(row[:length])[1] for row, length in zip(batch["tokens"][:100], lengths, strict=False)]
    assert min(depths) >= 9 and max(depths) == 10 and np.mean(depths) > 9.9


def test_listops_draws_nodes_as_published():
    """Operators alike, 2 to 10 arguments alike, and a digit in three of four nodes above the greatest depth."""
    drawn = listops.ListOps(20_000, 1)
    operators, arguments, kinds = collections.Counter(), collections.Counter(), collections.Counter()
    for i in range(60):
        stack = [[None, 0]]
        for token in drawn.row(str(i))[0]:
            if token == listops.END:
                operator, count = stack.pop()
                operators[operator] += 1
                arguments[count] += 1
                continue
            if 1 < len(stack) < 10:  # not the root, which is an operator here, and not the deepest
                kinds[token < listops.OPERATOR] += 1
            stack[-1][1] += 1
            if token >= listops.OPERATOR:
                stack.append([token, 0])
    total = operators.total()
    assert total > 1000 and set(arguments) == set(range(2, 11))
    assert all(abs(operators[token] / total - 1 / 4) < 4 * (3 / 16 / total) ** 0.5 for token in range(11, 15))
    assert all(abs(arguments[count] / total - 1 / 9) < 4 * (8 / 81 / total) ** 0.5 for count in range(2, 11))
    assert abs(kinds[True] / kinds.total() - 0.75) < 4 * (3 / 16 / kinds.total()) ** 0.5


def series_part(count, *, seed=0, label=lambda i: "ab"[i % 2], channels=2):
    draws = np.random.default_rng(seed)
    inputs = [draws.normal(5, 3, (3 + i % 4, channels)) for i in range(count)]
    return Part(inputs, [label(i) for i in range(count)], [f"file:{i + 1}" for i in range(count)])


def test_stored_rows_are_standardised_on_the_training_part_and_padded():
    train, validation = series_part(50), series_part(9, seed=1)
    source = LabelledRows("some", 8, train, validation)
    assert (source.channels, source.num_classes, source.train_rows, source.validation_rows) == (2, 2, 50, 9)
    batch = source.validation_batch(0, 9)
    steps = np.concatenate(train.inputs)
    for row, (x, label) in enumerate(zip(validation.inputs, validation.labels, strict=True)):
        assert batch["lengths"][row] == len(x) and "ab"[batch["label"][row]] == label
        expected = (x - steps.mean(0)) / steps.std(0)
        np.testing.assert_allclose(batch["values"][row, : len(x)], expected, rtol=1e-5, atol=1e-6)
        assert not batch["values"][row, len(x) :].any()


def test_an_epoch_has_every_training_row_once_in_another_order_each():
    source = LabelledRows("some", 8, series_part(50), series_part(9, seed=1))
    steps = [source.train_batch(0, step, 25)["values"] for step in range(4)]
    epochs = [np.concatenate(steps[i : i + 2]) for i in (0, 2)]
    sets = [collections.Counter(map(bytes, epoch)) for epoch in epochs]
    assert sets[0] == sets[1] and max(sets[0].values()) == 1 and not np.array_equal(*epochs)
    assert same(source.train_batch(0, 3, 25), source.train_batch(0, 3, 25))
    assert not same(source.train_batch(0, 3, 25), source.train_batch(1, 3, 25))


def test_labels_are_not_visible_to_the_input():
    """With labels permuted among the rows the split, the order and all inputs are bitwise the same."""
    part = series_part(60)
    permuted = part._replace(labels=[part.labels[i] for i in np.random.default_rng(7).permutation(60)])
    one, other = (LabelledRows("some", 8, *split(each, 0.3)) for each in (part, permuted))
    for a, b in ((one.train_batch(0, 2, 30), other.train_batch(0, 2, 30)),
                 (one.validation_batch(0, 5), other.validation_batch(0, 5))):  # fmt: skip
        assert a["values"].tobytes() == b["values"].tobytes() and np.array_equal(a["lengths"], b["lengths"])
    assert not np.array_equal(one.train_batch(0, 2, 30)["label"], other.train_batch(0, 2, 30)["label"])
    assert one.fingerprint != other.fingerprint


def with_row(part, i, x):
    return part._replace(inputs=[x if j == i else old for j, old in enumerate(part.inputs)])


@pytest.mark.parametrize(
    "train, said",
    [
        (with_row(series_part(9), 4, np.full((3, 2), np.nan)), "file:5: step 1 of channel 1 is nan, expected a finite"),
        (with_row(series_part(9), 4, np.zeros((3, 1))), "file:5: has 1 channels, and file:1 has 2"),
        (with_row(series_part(9), 4, np.zeros((0, 2))), "file:5: an empty row"),
        (with_row(series_part(9), 4, np.zeros((9, 2))), "file:5: 9 steps, more than train.context_length = 8"),
        (series_part(9, label=str), "9 labels in 9 training rows, expected at least two rows of a class"),
        (series_part(9, label=lambda i: "a"), "all training rows of some have the label 'a'"),
        (series_part(9, label=lambda i: "bc"[i % 2]), "file:1: label 'a' is no class of the training rows"),
        (series_part(0), "some has no training rows"),
    ],
)
def test_bad_rows_are_refused_by_name(train, said):
    with pytest.raises(UsageError, match=said):
        LabelledRows("some", 8, train, series_part(4))


@pytest.mark.parametrize(
    "spec, length, said",
    [
        ("listops?min_length=70", 64, "none has more than 70 and fewer than 64 tokens"),
        ("listops?min_length=1&min_length=2", 64, "each option once"),
        ("listops?lenght=8", 64, "listops: unknown option 'lenght'; known, nearest first: min_length"),
        ("listops?max_depth=1", 64, "data.source: listops: max_depth: got 1, expected at least 2"),
        ("digits?size=8", 64, "digits: unknown option 'size'; known, nearest first: none"),
    ],
)
def test_bad_options_are_refused(spec, length, said):
    with pytest.raises(UsageError, match=said):
        make(spec, length)


@pytest.mark.parametrize("name, package", [("digits", "scikit-learn"), ("mnist1d", "mnist1d")])
def test_a_missing_package_is_named_with_its_extra(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UsageError, match=rf"{name} needs the package {package}: pip install 'sequence-zoo\[{name}\]'"):
        make(name, 64)


@pytest.mark.slow
def test_digits_are_the_pixels_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    source = make("digits", 70)
    assert (source.train_rows, source.validation_rows, source.num_classes, source.channels) == (1437, 360, 10, 1)
    batch = source.validation_batch(0, 360)
    assert set(batch["lengths"]) == {64} and not batch["values"][:, 64:].any()
    pixels, labels = datasets.load_digits(return_X_y=True)
    of_image = {image.tobytes(): label for image, label in zip(pixels.astype(np.uint8), labels, strict=True)}
    levels = np.unique(batch["values"][:, :64])  # 0 to 16, standardised
    assert len(levels) == 17
    for row, label in zip(batch["values"][:, :64, 0], batch["label"], strict=True):
        assert of_image[np.searchsorted(levels, row).astype(np.uint8).tobytes()] == label


@pytest.mark.slow
def test_mnist1d_is_the_authors_and_leaves_the_random_state_alone():
    package = pytest.importorskip("mnist1d")
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    source = make("mnist1d", 40)
    assert np.random.random() == expected
    assert (source.train_rows, source.validation_rows, source.num_classes, source.length) == (4000, 1000, 10, 40)
    made = package.data.make_dataset()
    batch = source.validation_batch(0, 1000)
    assert np.array_equal(batch["label"], made["y_test"])
    np.testing.assert_allclose(batch["values"][..., 0], made["x_test"], atol=0.02)  # standardised once more
    assert make("mnist1d?shuffle=true", 40).fingerprint != source.fingerprint
