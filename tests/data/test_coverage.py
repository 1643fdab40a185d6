"""How much of a text a tokenizer has no tokens for."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from zoo.data import corpus_info, training_dataset, validation_batches
from zoo.data.tokenizer import FileTokenizer
from zoo.errors import UsageError

LETTERS = {c: i for i, c in enumerate("abcde ")}
BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def metaspace(model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def bert(model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_level(model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return tokenizer


def plain(model, normalizer=None, pre_tokenizer=None):
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


SPACED = LETTERS | {"▁": 6, "<unk>": 7}
UNIGRAM = [("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in "abcde")]
WORDS = {"[UNK]": 0, "ab": 1, "c": 2, "##d": 3}
FALLBACK = SPACED | {f"<0x{b:02X}>": b + 8 for b in range(256)}
TOKENIZERS = {
    "BPE that drops": plain(models.BPE(LETTERS, [])),
    "BPE with an unknown token": metaspace(models.BPE(SPACED, [], unk_token="<unk>")),
    "BPE with bytes to fall back on": metaspace(models.BPE(FALLBACK, [], unk_token="<unk>", byte_fallback=True)),
    "byte-level BPE": byte_level(models.BPE(BYTES, [])),
    "byte-level BPE without some bytes": byte_level(models.BPE({c: i for c, i in BYTES.items() if c != "x"}, [])),
    "byte-level BPE without half a character": byte_level(models.BPE({c: i for c, i in BYTES.items() if c != "Ã"}, [])),
    "Unigram": metaspace(models.Unigram(UNIGRAM, unk_id=0)),
    "WordPiece": bert(models.WordPiece(WORDS, unk_token="[UNK]")),
    "WordLevel": bert(models.WordLevel(WORDS, unk_token="[UNK]")),
    "WordLevel that cuts nowhere": plain(models.WordLevel({"ab cd": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "a normalizer that deletes": plain(models.BPE(LETTERS, []), normalizers.Replace("b", "")),
    "a pre_tokenizer that deletes": plain(models.BPE(LETTERS, []), None, pre_tokenizers.CharDelimiterSplit("b")),
    "accents stripped": plain(
        models.BPE(LETTERS, []), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "spaces stripped at the ends": plain(models.BPE(LETTERS, []), normalizers.Strip()),
}


@pytest.mark.parametrize(
    ("name", "text", "lost"),
    [
        ("BPE that drops", "abc de", ""),
        ("BPE that drops", "ab xyz\n", "xyz\n"),
        ("BPE that drops", "naïve a", "nïv"),
        ("BPE with an unknown token", "ab cd", ""),
        ("BPE with an unknown token", "ab xyz de", "xyz"),
        ("BPE with an unknown token", "🦓 ab", "🦓"),
        ("BPE with bytes to fall back on", "🦓 xyz\n", ""),
        ("byte-level BPE", "🦓 xyz\n\t naïve \x00", ""),
        ("byte-level BPE without some bytes", "xyz", "x"),
        ("byte-level BPE without half a character", "naïve", "ï"),
        ("Unigram", "ab cd", ""),
        ("Unigram", "ab xx cd x", "xxx"),
        ("WordPiece", "ab cd\n ab", ""),
        ("WordPiece", "ab xyz cd x xyz", "xyzxxyz"),
        ("WordLevel", "ab c zebra\n", "zebra"),
        ("WordLevel that cuts nowhere", "ab cd", ""),
        ("WordLevel that cuts nowhere", "ab cd e", "abcde"),
        ("a normalizer that deletes", "abba", "bb"),
        ("a pre_tokenizer that deletes", "abba", "bb"),
        ("accents stripped", "e\u0301a", ""),
        ("spaces stripped at the ends", "  ab cd  ", ""),
    ],
)
def test_lost_bytes_are_those_of_what_no_token_stands_for(tmp_path, name, text, lost):
    TOKENIZERS[name].save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(str(tmp_path / "t.json"))
    texts = [b"ab", text.encode()]
    found = tokenizer.lost_bytes(texts, tokenizer.encode_batch(texts))
    assert found[1] == len(lost.encode())


@pytest.fixture
def drops(config, tmp_path):
    """A config whose tokenizer drops 4 of each 10 bytes."""
    TOKENIZERS["BPE that drops"].save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("abcd xyz!\x01"[:10] * 400)
    config.data.source, config.data.tokenizer = str(tmp_path / "a.txt"), str(tmp_path / "t.json")
    return config


def test_a_tokenizer_that_loses_more_than_the_bound_is_refused_with_the_share(drops):
    with pytest.raises(
        UsageError, match=r"no tokens for 50.0% of the text .*\(2,000 bytes\).*data.max_lost_text = 0.01"
    ):
        training_dataset(drops)
    drops.data.max_lost_text = 0.49
    with pytest.raises(UsageError, match="data.max_lost_text = 0.49"):
        corpus_info(drops)


def test_bytes_count_what_is_represented(drops):
    drops.data.max_lost_text = 0.5
    info = corpus_info(drops)
    assert info["lost_text"] == pytest.approx(0.5)
    assert info["train_bytes"] + info["validation_bytes"] == 2000
    batches = validation_batches(drops, source=drops.data.source)
    assert sum(batch["bytes"].sum() for batch in batches) == pytest.approx(batches.text_bytes) == 2000
    assert batches.num_tokens == 2001  # with the separator


def test_unknown_tokens_stand_for_no_bytes(config, tmp_path):
    TOKENIZERS["Unigram"].save(str(tmp_path / "t.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("ab xx cd", "xx", "ab")))
    config.data.source, config.data.tokenizer = str(tmp_path / "a.jsonl"), str(tmp_path / "t.json")
    config.data.max_lost_text, config.train.context_length = 1.0, 4
    batches = validation_batches(config, source=config.data.source)
    rows = list(batches)
    # "ab xx cd" keeps 6 of its bytes and "ab" both; the one of "xx" that has a token is the space put before it
    assert sum(row["bytes"].sum() for row in rows) == pytest.approx(batches.text_bytes) == 8
    assert all(row["bytes"][row["targets"] == 0].sum() == 0 for row in rows)


def test_a_tokenizer_without_a_token_for_any_of_the_text_says_so(config, tmp_path):
    TOKENIZERS["BPE that drops"].save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("xyz" * 20)
    config.data.source, config.data.tokenizer = str(tmp_path / "a.txt"), str(tmp_path / "t.json")
    with pytest.raises(UsageError, match="has no token for any of the text"):
        training_dataset(config)
