import json
import pathlib
import re
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from plain_streams import SEPARATOR, stream_of

from zoo.data import cache, corpora, training_dataset, validation_batches
from zoo.data.tokenizer import ByteTokenizer
from zoo.errors import UsageError


@pytest.fixture
def open_streams(tmp_path):
    def call(spec, fraction=0.05, tokenizer=None, text_field="text"):
        source = corpora.find(spec, text_field)
        return cache.open_streams(source, tokenizer or ByteTokenizer(), fraction, str(tmp_path / "cache"))

    return call


@pytest.fixture
def cached(tmp_path):
    """Names in the cache folder, locks left out."""
    return lambda: sorted(p.name for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock")


def without_ends(tokens):
    return [token for token in tokens.tolist() if token != SEPARATOR]


def test_a_stream_is_the_documents_each_after_a_separator_and_one_at_the_end(open_streams, write_documents):
    spec, documents = write_documents(5)
    stream = open_streams(spec, fraction=0.0)["train"]
    np.testing.assert_array_equal(stream.tokens, stream_of(documents))
    assert [int(stream.tokens[start]) for start in stream.starts] == [SEPARATOR] * 5
    assert stream.tokens.dtype == np.uint16
    assert stream.text_bytes == sum(map(len, documents))
    assert stream.num_targets == stream.text_bytes + 5


def test_many_documents_are_split_by_content_and_none_is_in_both(open_streams, write_documents):
    spec, documents = write_documents(400)
    streams = open_streams(spec)
    parts = [part for split in streams.values() for part in _documents(split)]
    assert sorted(parts) == sorted(documents)
    chosen = _documents(streams["validation"])
    assert 5 <= len(chosen) <= 40
    assert chosen == [d for d in documents if corpora.in_validation(d, 0.05)]


def _documents(stream):
    ends = [*stream.starts[1:], len(stream.tokens) - 1]
    return [bytes(stream.tokens[a + 1 : b].tolist()) for a, b in zip(stream.starts, ends, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.2])
def test_few_documents_are_split_at_the_tail_and_validation_is_never_empty(
    open_streams, write_documents, count, fraction
):
    spec, documents = write_documents(count)
    streams = open_streams(spec, fraction)
    train, validation = streams["train"], streams["validation"]
    assert without_ends(train.tokens) + without_ends(validation.tokens) == list(b"".join(documents))
    whole = len(stream_of(documents)) - 1
    assert validation.num_targets == pytest.approx(max(1, fraction * whole), abs=1.5)
    assert train.text_bytes + validation.text_bytes == sum(map(len, documents))
    assert validation.text_bytes == len(without_ends(validation.tokens))
    for stream in streams.values():
        assert stream.tokens[0] == stream.tokens[-1] == SEPARATOR
        assert [s for s in np.flatnonzero(stream.tokens == SEPARATOR)][:-1] == stream.starts.tolist()
        assert len(stream.scales) == len(stream.starts)
    assert train.fingerprint != validation.fingerprint


def test_a_second_opening_reads_nothing_anew(open_streams, write_documents, cached, monkeypatch):
    spec, _ = write_documents(3)
    first = open_streams(spec)
    assert len(cached()) == 1
    monkeypatch.setattr(cache, "_write", None)
    np.testing.assert_array_equal(open_streams(spec)["train"].tokens, first["train"].tokens)


def test_other_text_tokenizer_or_split_is_another_folder(open_streams, write_documents, cached, bpe):
    spec, _ = write_documents(3)
    for arguments in ({}, {"fraction": 0.1}, {"tokenizer": bpe}):
        open_streams(spec, **arguments)
    assert len(cached()) == 3
    pathlib.Path(spec.replace("*", "0000")).write_text("edited")
    assert without_ends(open_streams(spec)["train"].tokens)[:6] == list(b"edited")
    assert len(cached()) == 4


@pytest.mark.parametrize("file", ["header.json", "train.tokens", "train.starts", "train.scales", "validation.tokens"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "longer"])
def test_a_damaged_cache_is_written_anew_with_a_warning(
    open_streams, write_documents, cached, file, damage, tmp_path, capsys
):
    spec, _ = write_documents(40)
    before = {split: np.array(stream.tokens) for split, stream in open_streams(spec).items()}
    path = tmp_path / "cache" / cached()[0] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-1], "flipped": content, "longer": content + b"x"}
    path.unlink() if damage == "gone" else path.write_bytes(damaged[damage])
    after = open_streams(spec)
    assert re.search("^warning: the token cache .* is damaged; it is written anew", capsys.readouterr().err)
    for split, tokens in before.items():
        np.testing.assert_array_equal(after[split].tokens, tokens)
    assert len(cached()) == 1
    open_streams(spec)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("count", [float("nan"), -1, "many", None, [[]]])
def test_a_header_with_counts_that_are_none_is_damaged(open_streams, write_documents, cached, tmp_path, count):
    spec, _ = write_documents(40)
    before = open_streams(spec)["train"]
    path = tmp_path / "cache" / cached()[0] / "header.json"
    streams = json.loads(path.read_text())["streams"]
    streams["train"]["counts"]["text_bytes"] = count
    path.write_text(json.dumps({"streams": streams, "checksum": cache._checksum_of(streams)}))
    assert open_streams(spec)["train"].text_bytes == before.text_bytes


def test_the_samples_of_a_large_file_reach_both_ends(tmp_path):
    content = bytearray(1000)
    path = tmp_path / "large"
    path.write_bytes(content)
    before = cache._sampled_checksum(path, samples=4, width=10)
    for position in (0, 5, 995, 999):
        changed = bytearray(content)
        changed[position] = 1
        path.write_bytes(changed)
        assert cache._sampled_checksum(path, samples=4, width=10) != before


def test_a_folder_that_cannot_be_written_is_named(config, write_documents, tmp_path):
    config.data.source, _ = write_documents(30)
    (tmp_path / "file").touch()
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UsageError, match="data.cache_dir: cannot write the token cache to .*file/cache"):
        training_dataset(config)


def test_a_disk_that_fills_up_leaves_no_half_cache(open_streams, tmp_path, cached):
    (tmp_path / "text.txt").write_bytes(b"some words\n" * 100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(UsageError, match="data.cache_dir: cannot write the token cache.*free some space"):
            open_streams(str(tmp_path / "text.txt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached() == []
    assert open_streams(str(tmp_path / "text.txt"))["train"].text_bytes > 1_000_000


def test_text_that_is_refused_leaves_no_half_cache(open_streams, tmp_path, cached):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(UsageError, match="a.jsonl:2"):
        open_streams(str(tmp_path / "a.jsonl"))
    assert cached() == []


_CHILD = """
import sys, fcntl, pathlib, time
from zoo.data import cache, corpora
from zoo.data.tokenizer import ByteTokenizer
spec, folder, me, locks = sys.argv[1:]
if locks == "no":
    def flock(*_): raise OSError("no locks here")
    fcntl.flock = flock
pathlib.Path(folder, me).touch()
while len(list(pathlib.Path(folder).glob("ready*"))) < 2: time.sleep(0.001)
streams = cache.open_streams(corpora.find(spec, "text"), ByteTokenizer(), 0.05, folder + "/cache")
print(len(streams["train"].tokens), len(streams["validation"].tokens))
"""


@pytest.mark.parametrize("locks", ["with", "no"])
def test_two_processes_that_write_the_same_cache_at_once_both_get_it(tmp_path, cached, locks):
    (tmp_path / "text.txt").write_bytes(b"some words\n" * 300_000)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(tmp_path / "text.txt"), str(tmp_path), f"ready{i}", locks],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    results = [child.communicate(timeout=120) for child in children]
    assert results[0] == results[1]
    assert results[0][0].split() == [b"3135002", b"165002"]
    assert len(cached()) == 1


def test_what_a_killed_writer_left_is_removed_by_the_next(open_streams, write_documents, cached, tmp_path, monkeypatch):
    spec, _ = write_documents(3)
    with monkeypatch.context() as patch:  # a kill: nothing is cleaned up
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(cache, "_describe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_streams(spec)
    assert [pathlib.Path(name).suffix for name in cached()] == [".partial"]
    open_streams(spec)
    assert [pathlib.Path(name).suffix for name in cached()] == [""]


def test_writing_does_not_hold_the_text_in_memory(open_streams, tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        for _ in range(96):
            file.write(b"some words and others\n" * 50_000)  # 1.1 MB
    tracemalloc.start()
    try:
        streams = open_streams(str(tmp_path / "large.txt"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert streams["train"].text_bytes > 100e6
    assert peak < 60e6


def test_ids_beyond_16_bits_are_kept(open_streams, write_documents):
    class Wide(ByteTokenizer):
        vocab_size, separator_id, fingerprint = 70_001, 70_000, "wide"

        def encode_bytes(self, text):
            return super().encode_bytes(text) + 66_000

    spec, documents = write_documents(2)
    stream = open_streams(spec, fraction=0.0, tokenizer=Wide())["train"]
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.tolist() == [token for d in documents for token in [70_000, *(b + 66_000 for b in d)]] + [
        70_000
    ]
    assert stream.max_id == 70_000


def test_bytes_of_tokens_are_exact_for_byte_level_bpe_and_spread_for_others(
    open_streams, write_documents, tmp_path, bpe
):
    spec, documents = write_documents(3)
    stream = open_streams(spec, fraction=0.0, tokenizer=bpe)["train"]
    assert set(stream.scales.tolist()) == {1.0}
    total = len(stream.tokens)
    assert stream.bytes_of(0, total, bpe.token_bytes).sum() == sum(map(len, documents)) == stream.text_bytes

    class Pairs(ByteTokenizer):  # every second byte: one token, though the table says one byte
        fingerprint = "pairs"

        def encode_bytes(self, text):
            return super().encode_bytes(text)[::2]

    pairs = open_streams(spec, fraction=0.0, tokenizer=Pairs())["train"]
    spread = pairs.bytes_of(0, len(pairs.tokens), Pairs().token_bytes)
    assert spread.sum() == pytest.approx(stream.text_bytes)
    ends = [*map(int, pairs.starts[1:]), len(pairs.tokens)]
    sums = [spread[int(a) : b].sum() for a, b in zip(pairs.starts, ends, strict=True)]
    np.testing.assert_allclose(sums, [len(d) for d in documents], rtol=1e-6)


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "sequence-zoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == pathlib.Path.home() / ".cache" / "sequence-zoo"


def test_the_header_says_what_is_inside(open_streams, write_documents, cached, tmp_path):
    spec, documents = write_documents(3)
    open_streams(spec, fraction=0.0)
    header = json.loads((tmp_path / "cache" / cached()[0] / "header.json").read_text())
    assert header["streams"]["train"]["counts"]["text_bytes"] == sum(map(len, documents))
    assert header["streams"]["train"]["tokens"]["dtype"] == "uint16"


def test_training_and_validation_share_one_cache(config, write_documents):
    config.data.source, _ = write_documents(30)
    training_dataset(config)
    validation_batches(config)
    folders = [p for p in pathlib.Path(config.data.cache_dir).iterdir() if p.is_dir()]
    assert len(folders) == 1
