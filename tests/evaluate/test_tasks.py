"""The tasks of evaluation: what each measures, held against direct computations and hand-made readers."""

import dataclasses
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo import data
from zoo.config import Config, preset
from zoo.data import synthetic
from zoo.errors import UsageError
from zoo.evaluate import documents, tasks
from zoo.evaluate.pieces import Reader
from zoo.evaluate.task import Request
from zoo.evaluate.tasks import recall
from zoo.evaluate.tasks.rows import Rows
from zoo.evaluate.windows import longest_windows
from zoo.model import LanguageModel

PIECE, LONG = 16, 16 * 16


def build(mixer="gla", positions=None):
    config = preset("tiny").model
    config.mixer, config.num_layers, config.d_model, config.vocab_size = mixer, 1, 16, 320
    config.d_ff = 16
    if positions:
        config.positions, config.max_positions = "learned", positions
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 30.0
    return model, config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Six long documents, each of a random letter pattern of its own, and a short one."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    lines = ["".join(chr(97 + i) for i in rng.integers(0, 26, size)) for size in [LONG + 40] * 6 + [5]]
    folder.joinpath("text.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return folder


def request_of(text, mixer="gla", source=None, positions=None, reader=None) -> Request:
    config = Config()
    model, config.model = build(mixer, positions)
    config.train.batch_size, config.train.context_length = 4, PIECE
    config.data.cache_dir = str(text / "cache")
    config.data.source = source or str(text / "text.jsonl")
    config.data.validation_source = "" if source else config.data.source
    request = Request(config, types.SimpleNamespace(model=model), [PIECE], 0)  # all that tasks know of a run
    if reader is not None:
        request.__dict__["reader"] = reader
    return request


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["attention", pytest.param("gla", marks=pytest.mark.slow)])
def test_rows_read_in_pieces_have_the_losses_of_one_call(mixer):
    model, _ = build(mixer)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 320, (2, 3, 24))
    weights = rng.random((3, 24)).astype(np.float32)
    losses, right = Reader(model, 2, 8, 24, answers=True)(tokens, targets, weights)
    expected = model.token_scores(*map(jnp.asarray, (tokens, targets, weights)))
    np.testing.assert_allclose(losses, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(right, expected[1])


# --- Extrapolation ----------------------------------------------------------------------------------------------------


def test_the_same_tokens_are_predicted_from_more_and_more_of_their_document(text):
    seen = []

    def reader(tokens, targets, weights):
        seen.append((tokens, targets))
        return weights * tokens.shape[1], None

    reader.rows = 4
    request = request_of(text, reader=reader)
    found = tasks.TASKS["extrapolation"].measure(request)[0]["by_context_length"]
    assert [r["context_length"] for r in found] == [r["loss"] for r in found] == [16, 32, 64, 128, 256]
    assert [r["change"] for r in found] == [None, 16, 48, 112, 240]
    assert all(r["tokens"] == 4 * PIECE for r in found) and found[1]["low"] == found[1]["high"] == 16
    windows = longest_windows(request, "extrapolation")
    assert windows.shape == (4, LONG + 1)  # of long documents alone, from their separators on
    separator = data.validation_batches(request.config).tokenizer.separator_id
    assert (windows[:, 0] == separator).all() and (windows[:, 1:] != separator).all()
    for tokens, targets in seen:
        np.testing.assert_array_equal(targets[:, -PIECE:], windows[:, -PIECE:])
        np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])


def test_text_without_long_documents_goes_as_far_as_it_can_or_says_so(text, tmp_path):
    def reader():
        pass

    reader.rows = 4
    request = request_of(text, reader=reader)
    for size, length in ((40, 32), (20, 16)):
        (tmp_path / f"{size}.jsonl").write_text(f'{{"text": "{"x" * size}"}}\n' * 5)
        request.config.data.source = request.config.data.validation_source = str(tmp_path / f"{size}.jsonl")
        assert longest_windows(request, "recall").shape == (4, length + 1)
    (tmp_path / "short.jsonl").write_text('{"text": "xxxxx"}\n' * 50)
    request.config.data.source = request.config.data.validation_source = str(tmp_path / "short.jsonl")
    with pytest.raises(UsageError, match="recall: the validation text has fewer than 4 documents of 16 tokens"):
        longest_windows(request, "recall")


def test_learned_positions_bound_the_lengths(text):
    request = request_of(text, positions=100)
    assert request.multiples() == [16, 32, 64] and request.longest == 100
    assert tasks.TASKS["decode"]._lengths(request) == [16, 64]
    with pytest.raises(UsageError, match="--context_length: 128 exceeds the model's 100 learned positions"):
        tasks.TASKS["perplexity"].check(dataclasses.replace(request, context_lengths=[128]))
    with pytest.raises(UsageError, match="--context_length: 128 exceeds the model's 100 learned positions"):
        Rows("needle").check(dataclasses.replace(request, context_lengths=[128]))


# --- Recall -----------------------------------------------------------------------------------------------------------


def copying_reader(reach):
    """A model that knows a token when the two before it and it stood together up to `reach` tokens before."""

    def reader(tokens, targets, weights):
        losses = np.ones(tokens.shape)
        for row in range(len(tokens)):
            for p in range(1, tokens.shape[1]):
                for q in range(max(1, p - reach), p):
                    if (tokens[row, q - 1 : q + 2] == [*tokens[row, p - 1 : p + 1], targets[row, p]]).all():
                        losses[row, p] = 0
        return losses * weights, (losses == 0) * weights

    reader.rows = 4
    return reader


def test_a_passage_is_gained_as_far_as_the_model_reaches(text):
    request = request_of(text, reader=copying_reader(reach=40))
    request.config.train.context_length = 64
    result, _ = tasks.TASKS["recall"].measure(request)
    found = {r["distance"]: r["gain"] for r in result["by_distance"]}
    # 8 tokens are 7 predictions, the first without two tokens of the passage before it.
    assert result["passage"] == 8 and found == pytest.approx({16: 6 / 7, 32: 6 / 7, 64: 0, 128: 0})
    assert all(r["loss"] + r["gain"] == r["without"] == 1 for r in result["by_distance"])


def test_distances_of_answers_by_hand():
    tokens = np.array([[5, 7, 1, 5, 7, 5], [5, 8, 5, 7, 2, 5]])
    targets = np.array([[7, 1, 5, 7, 5, 7], [8, 5, 7, 2, 5, 8]])
    weights = np.array([[0, 0, 0, 1, 0, 1], [1, 0, 1, 0, 0, 1]])
    expected = [[0, 0, 0, 3, 0, 2], [0, 0, 0, 0, 0, 5]]  # a 7 behind a 5; of the second row an 8, though a 7 is nearer
    np.testing.assert_array_equal(recall.distances_back(tokens, targets, weights, 1), expected)
    tokens, targets = np.array([[1, 5, 7, 2, 5, 7, 1, 5]]), np.array([[5, 7, 2, 5, 7, 1, 5, 7]])
    for by, distance in ((1, 3), (2, 6), (3, 0)):  # behind 5; behind 1 5; behind 7 1 5
        found = recall.distances_back(tokens, targets, np.arange(8)[None] == 7, by)
        assert found[0].tolist() == [0] * 7 + [distance]


def test_recall_of_a_task_goes_by_the_distance_to_its_answers(text):
    request = request_of(text, source="mqar?vocab_size=64&pairs=2", reader=copying_reader(0))
    losses = []

    def reader(tokens, targets, weights):
        distances = recall.distances_back(tokens, targets, weights, 1)
        losses.append(distances)
        return distances * 1.0, (distances <= 8) * weights

    reader.rows = 4
    request.__dict__["reader"] = reader
    result, _ = tasks.TASKS["recall"].measure(request)
    assert result["of"] == "mqar" and losses[0].shape[1] == 4 * PIECE
    for r in result["by_distance"]:
        assert r["distance"] / 2 < r["loss"] <= r["distance"] and r["accuracy"] == (r["distance"] <= 8)
    assert sum(r["tokens"] for r in result["by_distance"]) == (losses[0] > 0).sum() == 2 * len(losses[0])
    tables = tasks.TASKS["recall"].tables({"run": result})
    assert tables[0].title == "recall of mqar" and len(tables[0].rows) == len(result["by_distance"])


@pytest.mark.parametrize("name", [name for name, cls in synthetic.TASKS.items() if cls.recalled_by])
def test_answers_stand_where_the_task_says(name):
    sizes = {"vocab_size": 64, "pairs": 4} if name == "mqar" else {}
    batch = synthetic.make(name, 64, **sizes).fresh(1, 0, 64)
    arrays = [batch[name] for name in ("tokens", "targets", "weights")]
    distances = recall.distances_back(*arrays, synthetic.TASKS[name].recalled_by)
    assert ((distances > 0) == (batch["weights"] > 0)).all()


def test_what_has_no_answer_before_has_no_recall(text):
    request = request_of(text, source="parity", reader=copying_reader(0))
    with pytest.raises(UsageError, match="--tasks: recall: the answers of parity stand nowhere before"):
        tasks.TASKS["recall"].check(request)


# --- Synthetic tasks --------------------------------------------------------------------------------------------------


def test_a_task_is_measured_along_its_axis(text):
    request = request_of(text)
    for spec, axis, values in (
        ("needle", "depth", [0, 0.25, 0.5, 0.75, 1]),
        ("mqar?vocab_size=64", "pairs", [2, 4]),
        ("mqar?vocab_size=64&pairs=4", "context length", [16]),
        ("selective_copying?copies=4", "context length", [16]),
        ("parity", "position", [1, 2, 4, 8, 16]),
    ):
        result, _ = Rows(spec).measure(request)
        assert result["axis"] == axis and [p["value"] for p in result["points"]] == values, spec
        answers = [p["tokens"] for p in result["points"]]
        if axis == "position":
            assert answers == [512, 512, 1024, 2048, 4096]
        elif axis == "pairs":
            assert answers == [2 * 256, 4 * 256]
        assert all(0 <= p["accuracy"] <= 1 and p["loss"] > 0 for p in result["points"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mqar", "--tasks: mqar has 8192 token ids, and the model 320; .* mqar.vocab_size=320"),
        ("mqar?pair=3", "--tasks: mqar: unknown option 'pair'; known, nearest first: pairs"),
        ("mqar?vocab_size=64&pairs=5", "--tasks: mqar: got 16 tokens a row, expected at least 20.* .--context_length."),
        ("needle?depth=2", "--tasks: needle: depth: got 2"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_before_anything_is_compiled(text, spec, message):
    with pytest.raises(UsageError, match=message):
        Rows(spec).check(request_of(text))


def test_tasks_by_name():
    of_heads = ["classes", "values"]
    assert list(tasks.find("default")) == ["perplexity", "extrapolation", "recall", "decode", *of_heads]
    assert list(tasks.find(" recall, needle?depth=1 ,recall,parity")) == ["recall", "needle?depth=1", "parity"]
    for name, near in (("recal", "recall"), ("nedle?depth=1", "needle"), ("extrapolate", "extrapolation")):
        with pytest.raises(UsageError, match=f"unknown task '{name[:5]}.*known, nearest first: {near}"):
            tasks.find(name)
    assert all(
        synthetic.TASKS[name].axis[0] in ("", "position", *synthetic.task.options(name)) for name in synthetic.TASKS
    )


# --- Decoding, documents ----------------------------------------------------------------------------------------------


def test_a_tokens_time_is_the_median_of_runs(text, monkeypatch):
    seconds = iter([9, 9, 9, 2, 2, 2, 1, 1, 1, 3, 3, 3, 2, 2, 2])  # lengths take turns

    def generate(model, prompts, max_tokens, sampling):
        took = next(seconds) / 1000 * max_tokens
        return types.SimpleNamespace(decode_seconds=took, decode_tokens=max_tokens, prefill_seconds=0.5)

    monkeypatch.setattr("zoo.evaluate.tasks.decode.generate", generate)
    result, _ = tasks.TASKS["decode"].measure(request_of(text, "attention"))
    found = result["by_context_length"]
    assert [r["context_length"] for r in found] == [16, 64, 256]
    assert [r["milliseconds"] for r in found] == pytest.approx([2] * 3) and found[0]["slowest"] == pytest.approx(9)
    assert found[2]["state_bytes"] > 15 * found[0]["state_bytes"] and found[2]["prefill_tokens_per_second"] == 512


def test_perplexity_keeps_each_documents_sums(text):
    request = dataclasses.replace(request_of(text), context_lengths=[PIECE, 32])
    result, kept = tasks.TASKS["perplexity"].measure(request)
    for r in result["by_context_length"]:
        n = r["context_length"]
        nats, tokens, sizes = (kept[f"{n}x0/{name}"] for name in documents.Documents._fields)
        assert tokens.tolist() == [LONG + 41] * 6 + [6] and sizes.tolist() == [LONG + 40] * 6 + [5]
        assert nats.sum() / math.log(2) / sizes.sum() == pytest.approx(r["bits_per_byte"], rel=1e-5)
        assert r["low"] < r["bits_per_byte"] < r["high"] and r["documents"] == 7 and r["unit"] == "bits per byte"


def test_what_does_not_fit_the_memory_is_refused(text, monkeypatch):
    monkeypatch.setattr("zoo.memory.available", lambda devices: 1000)
    for name in ("extrapolation", "recall"):
        with pytest.raises(UsageError, match=f"--tasks: {name}: 4 sequence.* of 256 tokens: at least .* name other"):
            tasks.TASKS[name].check(request_of(text, "attention"))
