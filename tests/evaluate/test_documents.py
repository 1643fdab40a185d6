"""Losses by document: sums counted by hand, intervals held against what they claim, files that others wrote."""

import io
import math
import os

import numpy as np
import pytest

from zoo.errors import UsageError
from zoo.evaluate import documents
from zoo.evaluate.documents import Documents, Read


def of(nats, size=100.0):
    nats = np.asarray(nats, np.float64)
    return Documents(nats, np.full(len(nats), size), np.full(len(nats), size / math.log(2)))


def test_sums_by_document_by_hand():
    found = Documents.none(3)
    document = np.array([[0, 0, 2], [2, -1, -1]])
    found.add(document, np.array([[1.0, 2, 4], [8, 16, 32]]), np.ones((2, 3)), np.array([[1.0, 0, 2], [3, 9, 9]]))
    found.add(document, np.zeros((2, 3)), np.array([[1.0, 0, 0], [0, 0, 0]]), np.zeros((2, 3)))
    assert [sums.tolist() for sums in found] == [[3, 0, 12], [3, 0, 2], [1, 0, 5]]


def test_what_is_hard_for_both_cancels():
    """Documents differ much more than the two runs do, whose difference is the same in each."""
    hard = np.random.default_rng(0).uniform(100, 300, 50)
    best, other = of(hard), of(hard + 1)
    same, apart = documents.differences([best, other])
    assert same == (0, 0) and apart == (pytest.approx(0.01), pytest.approx(0.01))  # nats of 100 units
    low, high = documents.interval(best)
    assert low < hard.sum() / 5000 < high and high - low > 0.2
    assert documents.differences([best, other]) == [same, apart]  # seeded


@pytest.mark.parametrize("count", [40, 10_000])
def test_an_interval_is_that_of_the_mean(count):
    """1.96 standard errors; documents of many are drawn in groups."""
    rng = np.random.default_rng(1)
    best = rng.uniform(50, 150, count)
    other = best + rng.normal(2, 10, count)
    low, high = documents.differences([of(best), of(other)])[1]
    error = 1.96 * np.std(other - best) / math.sqrt(count) / 100
    mean = (other - best).mean() / 100
    assert low == pytest.approx(mean - error, abs=0.15 * error) and high == pytest.approx(
        mean + error, abs=0.15 * error
    )


def test_runs_that_read_other_parts_are_not_compared():
    whole, part = of(np.ones(6)), of(np.ones(6))
    part.bytes[3:] = part.tokens[3:] = part.nats[3:] = 0
    with pytest.raises(ValueError, match="not the same parts"):
        documents.differences([whole, part])
    with pytest.raises(ValueError, match="not the same parts"):
        documents.differences([whole, of(np.ones(7))])
    one = of([1.0])
    with pytest.raises(ValueError, match="fewer than two documents"):
        documents.differences([one, one])
    assert documents.interval(one) is None


def test_what_is_kept_comes_back(tmp_path):
    run = of([1.5, 2.5])
    arrays = documents.to_arrays(Read(64), run) | documents.to_arrays(Read(128, 8), run)
    documents.write(tmp_path / "x.npz", "abc", arrays)
    fingerprint, found = documents.read(tmp_path / "x.npz")
    assert fingerprint == "abc" and set(found) == {(64, 0), (128, 8)}
    for sums, expected in zip(found[Read(64)], run, strict=True):
        np.testing.assert_allclose(sums, expected, rtol=1e-7)
    assert documents.read(tmp_path / "nothing.npz") == ("", {})


def saved(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


NUMBERS = np.ones(2, np.float32)
ODD = {
    "no zip": b"x" * 100,
    "cut": saved(fingerprint=np.array("a"), **{"1x0/nats": NUMBERS})[:-30],
    "pickled": saved(fingerprint=np.array("a"), **{"1x0/nats": np.array([{}], object)}),
    "of another name": saved(fingerprint=np.array("a"), nats=NUMBERS),
    "not all of them": saved(fingerprint=np.array("a"), **{"1x0/nats": NUMBERS}),
    "no fingerprint": saved(**{f"1x0/{name}": NUMBERS for name in Documents._fields}),
    "not finite": saved(fingerprint=np.array("a"), **{f"1x0/{n}": NUMBERS * np.nan for n in Documents._fields}),
    "text": saved(fingerprint=np.array("a"), **{f"1x0/{n}": np.array(["a"]) for n in Documents._fields}),
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_another_file_in_its_place_is_an_error(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UsageError, match="x.npz is not what zoo.evaluate writes .*evaluate the run again"):
        documents.read(tmp_path / "x.npz")


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_the_file_is_executed(tmp_path):
    made = tmp_path / "made"
    arrays = {f"1x0/{name}": np.array([Touches(str(made))], object) for name in Documents._fields}
    (tmp_path / "x.npz").write_bytes(saved(fingerprint=np.array("a"), **arrays))
    with pytest.raises(UsageError, match="is not what zoo.evaluate writes"):
        documents.read(tmp_path / "x.npz")
    assert not made.exists()


def test_what_would_block_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(UsageError, match="x.npz cannot be read: it is a FIFO"):
        documents.read(tmp_path / "x.npz")
