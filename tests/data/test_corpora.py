import os
import socket

import pytest

from zoo.data import check, corpora, corpus_info, training_dataset
from zoo.data.tokenizer import ByteTokenizer
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


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "symbolic links"])
@pytest.mark.parametrize("by", ["path", "glob"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind, by):
    path = tmp_path / "b.txt"
    (tmp_path / "a.txt").write_text("text")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path)
    with pytest.raises(UsageError, match=f"data.source: .*b.txt' cannot be read: .*{kind}"):
        find(str(path if by == "path" else tmp_path / "*.txt"))


def test_a_glob_ends_where_links_form_loops(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i in range(3):  # without a memory of folders seen: 3^40 paths
        (tmp_path / "deep" / "er" / f"loop{i}").symlink_to(tmp_path / "deep")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "deep" / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("deep/a.txt", "deep/er/b.txt", "elsewhere/c.txt", "deep/.hidden.txt"):
        (tmp_path / name).write_text(name)
    texts = [b"".join(d.pieces).decode() for d in find(f"{tmp_path}/deep/**/*.txt").documents()]
    assert texts == ["deep/a.txt", "deep/er/b.txt", "elsewhere/c.txt"]
    assert len(find(f"{tmp_path}/**").paths) == 3


def test_a_file_of_two_names_is_read_once_and_in_two_sources_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert find("*.txt").paths == ("a.txt",)
    for other in (f"{tmp_path}/a.txt", "b.txt", "*.txt"):
        with pytest.raises(UsageError, match="data.source: 'a.txt' and .* read the same text"):
            corpora.find_all(f"a.txt,{other}", "text")


def test_validation_text_that_is_trained_on_is_said(config, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    config.data.source, config.data.validation_source = f"{tmp_path}/a.txt", f"{tmp_path}/*.txt"
    check(config)
    assert "warning: data.validation_source: training reads it too" in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read_is_refused(config, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("some words\n" * 50)
    encode = ByteTokenizer.encode_bytes

    def encode_and_write(self, text):
        path.write_text("other words")
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode_bytes", encode_and_write)
    config.data.source = str(path)
    with pytest.raises(UsageError, match="changed while they were read; start again"):
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
