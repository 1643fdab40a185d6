import os

import pytest

from zoo.data import corpora, corpus_info, training_dataset
from zoo.errors import UsageError


def find(spec):
    return corpora.find(spec, "text")


def test_stdlib_has_no_test_folders_no_installed_packages_and_no_duplicate_topics():
    names = [document.name for document in find("stdlib").documents()]
    assert names == sorted(names)
    assert len(names) == len(set(names)) > 500
    assert "stdlib/json/decoder.py" in names
    assert "stdlib/pydoc_data/topics/while" in names
    assert "stdlib/pydoc_data/topics.py" not in names
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any("sysconfigdata" in name or "config-3" in name for name in names)


def test_stdlib_is_the_same_each_time_and_split_by_path():
    first, second = find("stdlib"), find("stdlib")
    assert first.identity() == second.identity()
    in_validation = [d.name for d in first.documents() if corpora.in_validation(d.split_key, 0.05)]
    assert in_validation == [d.name for d in second.documents() if corpora.in_validation(d.split_key, 0.05)]
    assert 20 <= len(in_validation) <= 80


def test_the_figures_of_stdlib(config):
    info = corpus_info(config)
    assert info["source"] == "stdlib"
    assert info == corpus_info(config)
    assert info["train_bytes"] > 8_000_000
    assert 200_000 < info["validation_bytes"] < info["train_bytes"] / 5
    assert info["train_bytes"] < info["train_tokens"] < info["train_bytes"] + 2000  # a separator each document
    assert 1.6 < info["gzip_bits_per_byte"] < 2.2
    int(info["fingerprint"], 16)
    config.data.validation_fraction = 0.1
    assert corpus_info(config)["fingerprint"] != info["fingerprint"]


def test_a_larger_fraction_keeps_what_a_smaller_one_chose():
    keys = [str(i).encode() for i in range(2000)]
    few = {key for key in keys if corpora.in_validation(key, 0.05)}
    many = {key for key in keys if corpora.in_validation(key, 0.2)}
    assert few < many
    assert 60 < len(few) < 140
    assert not any(corpora.in_validation(key, 0.0) for key in keys)


def test_a_glob_is_read_in_sorted_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "folder.txt").mkdir()
    assert [b"".join(d.pieces) for d in find(f"{tmp_path}/*.txt").documents()] == [b"a", b"b", b"c"]


def test_the_identity_changes_with_content_and_kind_but_not_with_the_place(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    a, b, c = (find(str(tmp_path / name)).identity() for name in ("a.txt", "b.txt", "c.jsonl"))
    assert a == b != c
    (tmp_path / "a.txt").write_text('{"text": "y"}')
    assert find(str(tmp_path / "a.txt")).identity() != a


def test_the_identity_of_a_large_file_follows_its_time_of_change(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_HASHED_WHOLE", 3)
    path = tmp_path / "large.txt"
    path.write_text("large")
    before = find(str(path)).identity()
    assert find(str(path)).identity() == before
    path.write_text("other")
    os.utime(path, ns=(1, 1))
    assert find(str(path)).identity() != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.txt", "no file 'missing.txt'.*path or a glob"),
        ("*.nothing", r"no file matches '\*.nothing'"),
        (".", "is a directory; give a file or a glob"),
        ("empty.txt", "is empty"),
        ("hf:wikitext", "hub is not built yet; download"),
        ("", "got nothing"),
        (" , ", "got nothing"),
    ],
)
def test_a_source_that_is_not_there_is_refused(config, tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    config.data.source = spec
    with pytest.raises(UsageError, match=f"data.source: .*{message}"):
        training_dataset(config)


def test_a_file_whose_documents_are_all_empty_is_refused(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": ""}\n')
    config.data.source = str(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="holds no text"):
        training_dataset(config)


def test_text_that_is_no_utf8_is_for_the_byte_tokenizer_only(config, tmp_path, bpe_path):
    path = tmp_path / "binary.txt"
    path.write_bytes(b"x" * 1_500_000 + b"\n" + b"\xff\x00" * 100)
    config.data.source = str(path)
    assert training_dataset(config).tokens_per_epoch > 1_000_000
    config.data.tokenizer = bpe_path
    with pytest.raises(UsageError, match="binary.txt: not UTF-8 at byte 1500001; .*data.tokenizer=bytes"):
        training_dataset(config)
