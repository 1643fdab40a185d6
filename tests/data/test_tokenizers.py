import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from zoo.config import Config
from zoo.data import corpora
from zoo.data import tokenizer as zoo_tokenizer
from zoo.data.tokenizer import ByteTokenizer, FileTokenizer, library
from zoo.data.tokenizer.__main__ import main, train
from zoo.errors import UsageError

TEXT = st.text(max_size=60) | st.sampled_from(["<|endoftext|>", "a<|endoftext|>b", "\r\n\t 🦓", "naïve", "e\u0301"])


@given(TEXT)
def test_bytes_come_back_as_they_were(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int32
    assert len(ids) == len(text.encode())


@settings(deadline=None)
@given(TEXT)
def test_byte_level_bpe_comes_back_as_it_was(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.separator_id not in ids
    assert bpe.token_bytes[ids].sum() == len(text.encode())


@settings(deadline=None)
@given(text=TEXT)
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_streamed_text_joins_to_the_text_and_never_shows_half_a_character(bpe, name, text):
    tokenizer = ByteTokenizer() if name == "bytes" else bpe
    decoder = tokenizer.stream_decoder()
    shown = [decoder.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in part for part in shown) or "\ufffd" in text
    assert "".join(shown) + decoder.flush() == text


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 270), max_size=20))
@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_any_ids_decode_and_stream_to_the_same_text(bpe, name, ids):
    tokenizer = ByteTokenizer() if name == "bytes" else bpe
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_invalid_bytes_become_replacement_characters_and_separators_nothing():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"
    assert tokenizer.decode([97, 256, 0xFF, 98, 300]) == "a\ufffdb"
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(i) for i in (0xE2, 0x82, 0xAC)] == ["", "", "€"]
    assert decoder.push(0xE2) + decoder.flush() == "\ufffd"


def test_vocabulary_and_separator():
    assert (ByteTokenizer().vocab_size, ByteTokenizer().separator_id) == (257, 256)


def test_a_separator_in_the_text_is_text(bpe):
    assert bpe.decode([bpe.separator_id]) == ""
    assert bpe.decode(bpe.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def word_tokenizer(path, *, special=(), decoder=None):
    model = models.WordLevel({"[UNK]": 0, "der": 1, "zoo": 2, "wächst": 3}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(path))
    return FileTokenizer(str(path))


def test_the_separator_is_an_existing_special_token_or_a_new_id(tmp_path):
    assert word_tokenizer(tmp_path / "a.json").separator_id == 4
    assert word_tokenizer(tmp_path / "a.json").vocab_size == 5
    with_special = word_tokenizer(tmp_path / "b.json", special=["<s>", "</s>"])
    assert (with_special.separator_id, with_special.vocab_size) == (5, 6)  # </s> comes before <s> in the list


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path):
    assert word_tokenizer(tmp_path / "a.json").encode("der zoo wächst wächst").tolist() == [1, 2, 3, 3]


def test_a_tokenizer_that_is_not_byte_level_streams_what_it_decodes(tmp_path):
    metaspace = word_tokenizer(tmp_path / "a.json", decoder=decoders.WordPiece())
    decoder = metaspace.stream_decoder()
    shown = [decoder.push(i) for i in [1, 2, 3, 1]]
    assert "".join(shown) + decoder.flush() == metaspace.decode([1, 2, 3, 1]) == "der zoo wächst der"


def test_byte_fallback_waits_for_the_whole_character(tmp_path):
    vocabulary = {"<unk>": 0, "▁a": 1} | {f"<0x{b:02X}>": b + 2 for b in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "a.json"))
    decoder = FileTokenizer(str(tmp_path / "a.json")).stream_decoder()
    euro = [b + 2 for b in "€".encode()]
    assert [decoder.push(i) for i in [1, *euro, 1]] == ["a", "", "", "€", " a"]
    assert decoder.push(euro[0]) == ""
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("content", [b"not json", b"{}", b"\xff\xfe"])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UsageError, match="data.tokenizer: .*t.json.*no tokenizer.json"):
        zoo_tokenizer.load(str(tmp_path / "t.json"))


def described(path, **changes):
    """A tokenizer.json with two letters, but for `changes` of its model and its pre_tokenizer."""
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1}, "merges": [],
    }  # fmt: skip
    pre_tokenizer = changes.pop("pre_tokenizer", None)
    path.write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": None, "model": model | changes,
    }))  # fmt: skip
    return str(path)


def test_a_tokenizer_with_absurd_contents_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="t.json' has no tokens"):
        zoo_tokenizer.load(described(tmp_path / "t.json", vocab={}))
    with pytest.raises(UsageError, match="t.json' has ids up to 4,000,000,000; expected .* below 4,194,304"):
        zoo_tokenizer.load(described(tmp_path / "t.json", vocab={"a": 0, "b": 4_000_000_000}))
    monkeypatch.setattr(zoo_tokenizer, "LARGEST_FILE", 100)
    with pytest.raises(UsageError, match="larger than 100 bytes"):
        zoo_tokenizer.load(described(tmp_path / "t.json"))
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(UsageError, match="it is a FIFO"):
        zoo_tokenizer.load(str(tmp_path / "fifo.json"))


def test_dropout_of_merges_is_off(tmp_path):
    path = described(tmp_path / "t.json", vocab={"a": 0, "aa": 1}, merges=[["a", "a"]], dropout=0.5)
    assert zoo_tokenizer.load(path).encode("aa" * 100).tolist() == [1] * 100


BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


def test_a_panic_of_the_library_is_one_error_and_leaves_nothing_on_the_terminal(tmp_path, capfd):
    tokenizer = zoo_tokenizer.load(described(tmp_path / "t.json", pre_tokenizer=BACKTRACKS))
    with pytest.raises(UsageError, match="data.tokenizer: the text cannot be tokenized: .*retry-limit"):
        tokenizer.encode("a" * 60 + "!")
    assert capfd.readouterr().err == ""
    os.write(2, b"what others write there stays")
    assert capfd.readouterr().err == "what others write there stays"


def test_a_text_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_SECONDS", 0.0)  # a longer wait may itself be late on a busy machine
    monkeypatch.setattr(library, "_SECONDS_PER_CHARACTER", 0.0)
    tokenizer = zoo_tokenizer.load(described(tmp_path / "t.json", pre_tokenizer=BACKTRACKS))
    with pytest.raises(UsageError, match="23 characters were not tokenized within 0 s; a regular expression"):
        tokenizer.encode("a" * 22 + "!")  # half a second, below the limit of the library's own


def test_a_missing_tokenizer_says_how_to_get_one(tmp_path):
    with pytest.raises(UsageError, match="data.tokenizer: .*No such file.*zoo.data.tokenizer trains one"):
        zoo_tokenizer.load(str(tmp_path / "t.json"))


def test_a_run_keeps_its_own_tokenizer(tmp_path, bpe_path, bpe):
    config = Config()
    assert zoo_tokenizer.for_run(tmp_path, config).vocab_size == 257
    with open(bpe_path, "rb") as file:
        (tmp_path / "tokenizer.json").write_bytes(file.read())
    assert zoo_tokenizer.for_run(tmp_path, config).fingerprint == bpe.fingerprint


def command(*arguments):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "zoo.data.tokenizer", *arguments], capture_output=True, text=True
    )
    return process.returncode, process.stdout, process.stderr


def test_the_command_trains_a_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("the zoo grows and the zoo sleeps, naïve\n" * 50)
    path = str(tmp_path / "new" / "tokenizer.json")
    code, out, err = command(f"--source={tmp_path}/text.txt", "--vocab_size=280", f"--output={path}")
    assert (code, err) == (0, "")
    assert f"--config.data.tokenizer={path}" in out
    tokenizer = zoo_tokenizer.load(path)
    assert tokenizer.vocab_size <= 280
    assert len(tokenizer.encode("the zoo grows")) < 8
    assert (
        json.loads((tmp_path / "new" / "tokenizer.json").read_text())["added_tokens"][0]["content"] == "<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab_size=many"], "vocab_size"),
        (["--vocab_size=256", "--output=x.json"], "--vocab_size: got 256, expected at least 257"),
        (["--vocab_size=1e30", "--output=x.json"], "--vocab_size: got '1e30', expected a whole number"),
        (["--vocab_size=300", "--output=x.json", "--validation_fraction=nan"], "--validation_fraction: got nan"),
        (["--vocab_size=300"], "--output"),
        (["--vocab_size=300", "--output="], "--output: got '', expected the path of a file"),
        (["--vocab_size=3e2", "--output=."], "--output: got '.', expected the path of a file"),
        (["--vocab_size=3e2", "--output=x.json", "--source=missing.txt"], "--source: no file 'missing.txt'"),
    ],
)
def test_the_command_ends_with_2_on_bad_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(UsageError, match="--vocab_size: got 256, expected at least 257"):
        train([], 256)
    with pytest.raises(UsageError, match="--vocab_size: got 99999999999999, .* at most 4194304"):
        train([], 99_999_999_999_999)


@pytest.mark.parametrize("fraction", [float("nan"), 1.0, -0.1])
def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(fraction):
    with pytest.raises(UsageError, match="--validation_fraction: got"):
        train([], 300, fraction)


def test_a_fraction_of_0_reads_all(tmp_path):
    (tmp_path / "a.txt").write_text("the zoo grows")
    assert train([corpora.find(str(tmp_path / "a.txt"), "text")], 260, 0.0).get_vocab_size() == 260


def test_training_refuses_text_that_is_no_utf8_and_no_text(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"a\xff")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}')
    with pytest.raises(UsageError, match="not UTF-8 at byte 1"):
        train([corpora.find(str(tmp_path / "binary.txt"), "text")], 300)
    with pytest.raises(UsageError, match="no text to train on"):
        train([corpora.find(str(tmp_path / "empty.jsonl"), "text")], 300)
