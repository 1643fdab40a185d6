"""Labelled sequences of files: jsonl, images, .ts; what they hold, and what is refused by file and row."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data.test_labelled import make
from zoo.data import stored
from zoo.errors import UsageError

WORDS = ["good", "bad", "fair", "no"]


def write_reviews(path, count=60, *, labels=None, replace=None):
    """Rows whose text names them; `replace`: the third line."""
    lines = [
        json.dumps({"text": f"{i} " + WORDS[i % 4] * (1 + i % 3), "label": labels[i] if labels else WORDS[i % 2]})
        for i in range(count)
    ]
    if replace is not None:
        lines[2] = replace
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(source):
    """Input as text (of bytes) and class of each row of both parts."""
    found = []
    for part, count in (("train", source.train_rows), ("validation", source.validation_rows)):
        batch = source.take(part, range(count))
        for tokens, length, label in zip(*(batch[name] for name in ("tokens", "lengths", "label")), strict=True):
            assert not tokens[length:].any()
            found.append((bytes(tokens[:length].astype(np.uint8)).decode(), source.classes[label]))
    return found


def test_text_and_its_classes(tmp_path):
    path = write_reviews(tmp_path / "a.jsonl")
    source = make(f"labelled_text?path={path}", 32, validation_fraction=0.3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(rows_of(source)) == sorted((record["text"], record["label"]) for record in records)
    assert 6 <= source.validation_rows <= 30 and source.classes == ["bad", "good"] and source.vocab_size == 257
    write_reviews(tmp_path / "b.jsonl", 7)
    given = make(f"labelled_text?path={path}&validation={tmp_path / 'b.jsonl'}", 32)
    assert (given.train_rows, given.validation_rows) == (60, 7)
    cut = make(f"labelled_text?path={path}&cut=true", 4)
    assert sorted(text for text, _ in rows_of(cut)) == sorted(record["text"][:4] for record in records)
    assert (cut.take("train", range(5))["lengths"] == 4).all()


def test_permuted_labels_leave_the_inputs_of_text_as_they_are(tmp_path):
    labels = [WORDS[i % 2] for i in range(60)]
    permuted = [labels[i] for i in np.random.default_rng(0).permutation(60)]
    one, other = (
        make(f"labelled_text?path={write_reviews(tmp_path / f'{i}.jsonl', labels=each)}", 32, validation_fraction=0.3)
        for i, each in enumerate((labels, permuted))
    )
    for a, b in ((one.train_batch(0, 1, 16), other.train_batch(0, 1, 16)),
                 (one.validation_batch(0, 6), other.validation_batch(0, 6))):  # fmt: skip
        assert a["tokens"].tobytes() == b["tokens"].tobytes() and a["lengths"].tobytes() == b["lengths"].tobytes()
    assert not np.array_equal(one.train_batch(0, 1, 16)["label"], other.train_batch(0, 1, 16)["label"])


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"text": "a"}', "a.jsonl:3: no label, the field 'label'"),
        ('{"text": "a", "label": null}', "a.jsonl:3: label 'label' is null; expected a string or a whole number"),
        ('{"text": "a", "label": 0.5}', "a.jsonl:3: label 'label' is float; expected"),
        ('{"label": "good"}', "a.jsonl:3: no field 'text'"),
        ('{"text": 1, "label": "good"}', "a.jsonl:3: field 'text' is not a string but int"),
        ('{"text": "", "label": "good"}', "a.jsonl:3: an empty row"),
        ('{"text": "' + "a" * 40 + '", "label": "good"}', "a.jsonl:3: 40 steps, more than train.context_length = 32"),
        ("[1]", "a.jsonl:3: not a JSON object but list"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, said):
    path = write_reviews(tmp_path / "a.jsonl", replace=line)
    with pytest.raises(UsageError, match=said):
        make(f"labelled_text?path={path}", 32, validation_fraction=0.3)


def write_images(folder, count=8, shape=(4, 6)):
    """Images of two classes; the pixels of each follow from its number."""
    draws = np.random.default_rng(0)
    for i in range(count):
        path = folder / ["cat", "dog"][i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, shape, np.uint8)).save(path)
    return folder


def test_images_are_pixels_or_patches_in_rows_from_the_top(tmp_path):
    pixels = np.arange(20 * 4 * 6 * 2).reshape(20, 4, 6, 2).astype(np.float32)
    np.save(tmp_path / "x.npy", pixels)
    np.save(tmp_path / "y.npy", np.arange(20) % 3)
    spec = f"images?path={tmp_path / 'x.npy'}&labels={tmp_path / 'y.npy'}"
    for patch, steps in ((1, 24), (2, 6)):
        source = make(f"{spec}&patch={patch}", 30, validation_fraction=0.3)
        assert (source.channels, source.num_classes) == (2 * patch * patch, 3)
        for part, count in (("train", source.train_rows), ("validation", source.validation_rows)):
            batch = source.take(part, range(count))
            assert (batch["lengths"] == steps).all()
            for values, label in zip(batch["values"], batch["label"], strict=True):
                steps_of = np.rint(values[:steps] * source._deviation + source._mean).astype(int)
                image = steps_of[0, 0] // 48
                assert source.classes[label] == str(image % 3)
                squares = [
                    pixels[image, y : y + patch, x : x + patch].ravel()
                    for y in range(0, 4, patch)
                    for x in range(0, 6, patch)
                ]
                assert np.array_equal(steps_of, squares)


def test_folders_of_images_are_their_classes(tmp_path):
    source = make(f"images?path={write_images(tmp_path / 'pets', 40)}", 24, validation_fraction=0.3)
    assert source.classes == ["cat", "dog"] and source.train_rows + source.validation_rows == 40
    label_of = {}
    for path in (tmp_path / "pets").glob("*/*.png"):
        label_of[np.asarray(Image.open(path)).tobytes()] = path.parent.name
    batch = source.take("train", range(source.train_rows))
    for values, label in zip(batch["values"], batch["label"], strict=True):
        image = np.rint(values[:, 0] * source._deviation + source._mean).astype(np.uint8)
        assert label_of[image.tobytes()] == source.classes[label]
    assert make(f"images?path={tmp_path / 'pets'}&color=true", 24, validation_fraction=0.3).channels == 3


def test_bad_images_are_named(tmp_path):
    folder = write_images(tmp_path / "pets")
    (folder / "dog/9.png").write_text("not an image")
    with pytest.raises(UsageError, match="dog/9.png: cannot be read as an image"):
        make(f"images?path={folder}", 24)
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(folder / "dog/9.png")
    with pytest.raises(UsageError, match="dog/9.png: 5 x 6 pixels, and .*cat/0.png has 4 x 6; expected one size"):
        make(f"images?path={folder}&color=false", 24)
    (folder / "dog/9.png").unlink()
    with pytest.raises(UsageError, match="4 x 6 pixels do not divide into patches of 4"):
        make(f"images?path={folder}&patch=4", 24)
    np.save(tmp_path / "x.npy", np.zeros((5, 4, 4)))
    np.save(tmp_path / "y.npy", np.zeros(4, int))
    np.save(tmp_path / "z.npy", np.zeros(5))
    for labels, said in (("y", "the labels have .4,.; expected"), ("z", "z.npy: an array of float64, expected whole")):
        with pytest.raises(UsageError, match=said):
            make(f"images?path={tmp_path / 'x.npy'}&labels={tmp_path / labels}.npy", 24)


TS = """#a comment
@problemName Some
@timeStamps false
@univariate false
@classLabel true 1 2
@data
1,2,3:4,5,6:1
7,8:9,10:2
"""


def write_ts(folder, content=TS):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("TRAIN", "TEST"):
        (folder / f"Some_{part}.ts").write_text(content + "".join(content.splitlines(True)[-2:]) * 2)
    return f"ucr?path={folder / 'Some_TRAIN.ts'}&validation={folder / 'Some_TEST.ts'}"


def test_series_of_the_archives(tmp_path, monkeypatch):
    source = make(write_ts(tmp_path), 4)
    assert (source.channels, source.classes, source.train_rows, source.validation_rows) == (2, ["1", "2"], 6, 6)
    batch = source.validation_batch(0, 2)
    assert batch["lengths"].tolist() == [3, 2] and batch["label"].tolist() == [0, 1]
    values = batch["values"] * source._deviation + source._mean
    np.testing.assert_allclose(values[0, :3], [[1, 4], [2, 5], [3, 6]], rtol=1e-5)
    np.testing.assert_allclose(values[1, :2], [[7, 9], [8, 10]], rtol=1e-5)
    shipped = tmp_path / "aeon" / "datasets" / "data" / "Some"
    write_ts(shipped)
    (tmp_path / "aeon" / "__init__.py").write_text("raise RuntimeError\n")  # it is not imported
    monkeypatch.syspath_prepend(str(tmp_path))
    named = make("ucr?name=Some", 4).validation_batch(0, 2)
    assert np.array_equal(named["values"], batch["values"])
    with pytest.raises(UsageError, match="aeon ships no 'Other'; nearest: Some"):
        make("ucr?name=Other", 4)


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("7,8:9,10:2", "7,?:9,10:2", "Some_TRAIN.ts:8: step 2 of channel 1 is nan"),
        ("7,8:9,10:2", "7,x:9,10:2", "Some_TRAIN.ts:8: channel 1: got '7,x', expected numbers"),
        ("7,8:9,10:2", "7,8:9:2", "Some_TRAIN.ts:8: channels of different lengths"),
        ("7,8:9,10:2", "7,8:2", "Some_TRAIN.ts:8: has 1 channels"),
        ("@classLabel true 1 2", "@classLabel false", "Some_TRAIN.ts:5: got '@classLabel false'"),
        ("@data\n", "", "Some_TRAIN.ts: no line @data"),
    ],
)
def test_bad_series_of_the_archives_are_named(tmp_path, old, new, said):
    with pytest.raises(UsageError, match=said):
        make(write_ts(tmp_path, TS.replace(old, new)), 4)


def test_paths_of_options_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = stored.with_absolute_path("labelled_text?path=a%26b/*.jsonl&label=stars&validation=/c.jsonl")
    assert made == f"labelled_text?path={tmp_path}/a%26b/*.jsonl&label=stars&validation=/c.jsonl"
    assert stored.with_absolute_path("digits") == "digits"
