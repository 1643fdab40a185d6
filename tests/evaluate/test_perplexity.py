"""Evaluation: figures computed by hand, positions counted by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import data
from zoo.config import Config, preset
from zoo.evaluate import __main__ as evaluate
from zoo.evaluate import perplexity
from zoo.evaluate.tasks import TASKS
from zoo.model import LanguageModel

VOCAB = 320  # of the byte tokenizer, rounded up to a multiple of 64
DOCUMENTS = ["the first document, héhé", "a second one " * 9, "x", "and the last"]
TEXT_BYTES = sum(len(text.encode()) for text in DOCUMENTS)
TOKENS = TEXT_BYTES + len(DOCUMENTS)  # after each document a separator is predicted


def build(scale=1.0):
    """At scale 0 the embedding is zero, and the head with it: every id is equally likely."""
    config = preset("tiny").model
    config.mixer, config.num_layers, config.d_model, config.vocab_size = "gla", 1, 16, VOCAB
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= scale
    return model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    folder.joinpath("text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in DOCUMENTS))
    config = Config()
    config.data.source = config.data.validation_source = str(folder / "text.jsonl")
    config.data.cache_dir = str(folder / "cache")
    config.train.batch_size, config.train.context_length = 2, 32
    return config


@pytest.mark.parametrize("context_length", [8, 32, 1000])
def test_a_uniform_model_has_the_loss_of_its_vocabulary(config, context_length):
    result = perplexity(build(0.0), data.validation_batches(config, context_length))
    assert result["tokens"] == TOKENS and result["bytes"] == TEXT_BYTES
    assert result["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert result["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    bits = math.log2(VOCAB) * TOKENS / TEXT_BYTES  # 8.3 bits a token
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    for bin in result["loss_by_position"]:
        assert bin["loss"] == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_without_bytes_there_are_no_bits_per_byte(config):
    batches = [b | {"bytes": np.zeros_like(b["bytes"])} for b in data.validation_batches(config, 32)]
    result = perplexity(build(0.0), batches)
    assert result["bits_per_byte"] is None and result["loss"] > 0
    table = TASKS["perplexity"].tables({"run": {"by_context_length": [{"context_length": 32} | result]}})[0]
    assert table.headings[3] == "bits per byte" and table.rows[0][3] == "-"


def test_another_text_has_a_file_of_its_own_and_a_workdir_names_no_cache():
    assert evaluate._name(None, "0123456789") == "evaluate.json"
    assert evaluate._name("../a b/*.jsonl.gz", "0123456789") == "evaluate-jsonl-01234567.json"
    assert evaluate._name("stdlib", "0123456789") == "evaluate-stdlib-01234567.json"
    config = Config()
    config.data.cache_dir = "/somewhere"
    assert evaluate._with_data(config, "run", None, "").data.cache_dir == ""
    assert evaluate._with_data(config, "run", None, "mine").data.cache_dir == "mine"


def test_the_loss_is_the_cross_entropy_of_the_models_logits(config):
    model = build(30.0)
    nats = 0.0
    for batch in data.validation_batches(config):
        logits, _ = model(jnp.asarray(batch["tokens"]), segment_ids=jnp.asarray(batch["segment_ids"]))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        nats += float((nll * batch["weights"]).sum())
    result = perplexity(model, data.validation_batches(config))
    assert result["loss"] == pytest.approx(nats / TOKENS, rel=1e-5)
    assert result["loss"] > math.log(VOCAB) + 0.1  # confident, and wrong


def test_loss_by_position_sums_to_the_loss(config):
    result = perplexity(build(30.0), data.validation_batches(config))
    bins = result["loss_by_position"]
    assert sum(b["tokens"] for b in bins) == result["tokens"]
    assert sum(b["tokens"] * b["loss"] for b in bins) / result["tokens"] == pytest.approx(result["loss"], rel=1e-12)
    assert len({round(b["loss"], 3) for b in bins}) == len(bins)
    assert [(b["first"], b["last"]) for b in bins] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]


def test_positions_are_counted_from_the_start_of_document_or_row():
    """Rows of 6: documents of 4 and 2 tokens; a document of 5 and a padded place."""
    rows = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0]], np.int32)
    batch = {
        "tokens": np.zeros((2, 6), np.int32),
        "targets": np.zeros((2, 6), np.int32),
        "segment_ids": rows,
        "weights": (rows > 0).astype(np.float32),
        "bytes": (rows > 0).astype(np.float32),
    }
    bins = perplexity(build(0.0), [batch])["loss_by_position"]
    assert [(b["first"], b["last"], b["tokens"]) for b in bins] == [(1, 1, 3), (2, 2, 3), (3, 4, 4), (5, 8, 1)]


def test_batches_without_a_token_to_score_are_an_error():
    nothing = {name: np.zeros((1, 4), np.int32) for name in ("tokens", "targets", "segment_ids")}
    nothing |= {name: np.zeros((1, 4), np.float32) for name in ("weights", "bytes")}
    for batches in ([], [nothing]):
        with pytest.raises(ValueError, match="no token to score"):
            perplexity(build(0.0), batches)
