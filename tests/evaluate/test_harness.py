"""lm-evaluation-harness on tasks of local files, with the extra `eval`; beside its own `hf` model where torch is."""

import contextlib
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax import nn

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from zoo import checkpoints, interop, sharding  # noqa: E402
from zoo import config as zoo_config  # noqa: E402
from zoo.evaluate import __main__ as evaluate  # noqa: E402
from zoo.evaluate.harness import adapter  # noqa: E402
from zoo.training import step  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": "What is red, and hangs on a tree?", "answers": ["an apple", "an ape", "b"], "right": 0},
    {"question": "Which of these is a number that is even?", "answers": ["one", "two", "three"], "right": 1},
    {"question": "How many? " * 9, "answers": ["A", "B", "C"], "right": 2},  # longer than the context
]
TEXTS = [{"text": "A short text."}, {"text": "Another text, of more than one window of tokens. " * 4}, {"text": "x"}]
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_target": "right",
        "doc_to_choice": "answers", "num_fewshot": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
    "local_writing": {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_missing": {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "dataset_path": "a/missing"},
}  # fmt: skip
CONTEXT = 64


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = folder / ("questions.jsonl" if name == "local_choice" else "texts.jsonl")
        kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        about = {"task": name, "test_split": "test", "metadata": {"version": 1}}
        if name == "local_choice":
            about["fewshot_split"] = "test"
        if "dataset_path" not in task:
            about |= {"dataset_path": "json", "dataset_kwargs": kwargs}
        folder.joinpath(f"{name}.yaml").write_text(json.dumps(about | task))  # JSON is YAML
    return folder


def make_run(folder, mixer):
    """A run that was never trained, of bytes."""
    config = zoo_config.Config()
    model = {"mixer": mixer, "num_layers": 2, "d_model": 32, "d_ff": 32, "vocab_size": 257, "positions": "rope"}
    config = dataclasses.replace(config, model=interop.family.with_settings(config.model, model))
    config.train.context_length = CONTEXT
    programs = step.build(config, sharding.make_mesh(config.mesh))
    with contextlib.closing(checkpoints.Checkpointer(folder / "checkpoints")) as checkpointer:
        checkpointer.save(0, programs.init(), meta={"config": dataclasses.asdict(config)})
    (folder / "config.json").write_text(zoo_config.to_json(config))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), "gla,attention")


def samples(model, tasks, *names):
    """By task, of each document and request: the arguments, and what the model answered."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[*names], task_manager=manager, bootstrap_iters=0)["samples"]
    return {
        name: [
            (args, answer[0])
            for sample in found[name]
            for args, answer in zip(sample["arguments"], sample["resps"], strict=True)
        ]
        for name in names
    }


def direct(model, tokens, scored):
    """The log-likelihood of the last `scored` of `tokens`."""
    logits = np.asarray(model(jnp.asarray([tokens[:-1]]))[0][0, -scored:], np.float64)
    return float(np.asarray(nn.log_softmax(logits))[np.arange(scored), tokens[-scored:]].sum())


def test_local_tasks_on_a_run(run, tasks, capsys):
    """By the command; the answers are those of the model on the separator and the bytes, at most 64 of them read."""
    asked = "--harness=local_choice?num_fewshot=2,local_rolling,local_writing"
    evaluate.main([f"--workdir={run}", asked, f"--harness_tasks={tasks}"])
    printed = capsys.readouterr().out
    assert "acc" in printed and "not read again" in printed
    assert "10 contexts lost their beginning" in printed  # of nine questions with two examples, and of a prompt
    record = json.loads((run / "harness.json").read_text())
    assert record["tasks"]["local_choice"]["num_fewshot"] == 2 and record["tasks"]["local_choice"]["documents"] == 3
    assert record["costs"]["read"] < record["costs"]["tokens"]

    loaded = checkpoints.load_run(run)
    sep = loaded.tokenizer.separator_id
    begins = adapter.beginning(run, loaded.tokenizer)
    found = samples(adapter.RunLM(loaded, begins, CONTEXT), tasks, "local_choice", "local_rolling", "local_writing")
    for (context, continuation), (nats, _) in found["local_choice"]:
        tokens = [sep, *(context + continuation).encode()][-CONTEXT - 1 :]
        assert nats == pytest.approx(direct(loaded.model, tokens, len(continuation)), rel=1e-5)
    nats = [answer for _, answer in found["local_rolling"]]
    for text, wanted in zip(TEXTS, nats, strict=True):
        ids = text["text"].encode()
        tokens = [sep, *ids]
        pieces = [(tokens[max(0, i - 1) : i + CONTEXT][: CONTEXT + 1]) for i in range(1, len(tokens), CONTEXT)]
        last = len(ids) % CONTEXT if len(ids) > CONTEXT else 0
        if last:  # the last window reaches back
            pieces[-1] = tokens[-CONTEXT - 1 :]
        counts = [len(piece) - 1 for piece in pieces[:-1]] + [last or len(pieces[-1]) - 1]
        assert wanted == pytest.approx(
            sum(direct(loaded.model, piece, n) for piece, n in zip(pieces, counts, strict=True)), rel=1e-5
        )
    value = record["tasks"]["local_rolling"]["metrics"]["bits_per_byte"]["value"]
    assert value == pytest.approx(-sum(nats) / np.log(2) / sum(len(t["text"]) for t in TEXTS), rel=1e-5)
    for _, text in found["local_writing"]:
        assert "e" not in text and len(text) <= 8


def test_what_cannot_be_run_is_one_line(run, tasks, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for flags, message in {
        ("--harness=local_missing",): "its data set 'a/missing' is not on this machine",
        ("--harness=local_choice?few=1",): "unknown option 'few'; known, nearest first: num_fewshot, limit",
        ("--harness=local_choice?limit=0",): "limit: got 0",
        ("--harness=local_choice", "--batches=2"): "--batches does nothing with --harness",
        ("--harness=local_writing", "--context_length=8"): "asks for up to 8 new tokens",
        ("--harness=local_rolling", "--context_length=8,9"): "--harness takes one",
        ("--harness=,",): "got none",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([f"--workdir={run}", f"--harness_tasks={tasks}", *flags])
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error, error


@pytest.mark.slow
@pytest.mark.parametrize("has_bos", [False, True])
def test_scores_are_those_of_transformers(has_bos, tasks, tmp_path):
    """A tiny Llama, exported and imported: each document to 1e-4, whose context may be longer than what is read."""
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    out = tmp_path / "llama"
    assert interop.export_run(str(make_run(tmp_path / "run", "attention")), str(out)).model_type == "llama"
    if has_bos:
        tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
        )
        tokenizer.save(str(out / "tokenizer.json"))
    made = interop.import_model(str(out), str(tmp_path / "imported"))
    loaded = checkpoints.load_run(made.workdir)
    begins = adapter.beginning(made.workdir, loaded.tokenizer)
    assert begins == ((256, (256,), (256,), 256) if has_bos else (256, (), (), 256))
    names = ["local_choice", "local_rolling", "local_writing"]
    wanted = samples(HFLM(pretrained=str(out), device="cpu", batch_size=4, max_length=CONTEXT), tasks, *names)
    for share, pack in ((True, True), (True, False), (False, True), (False, False)):
        found = samples(adapter.RunLM(loaded, begins, CONTEXT, share=share, pack=pack), tasks, *names)
        for name in names:
            for (args, ours), (their_args, theirs) in zip(found[name], wanted[name], strict=True):
                assert args == their_args
                if name == "local_writing":
                    assert ours == theirs
                elif name == "local_rolling":
                    assert ours == pytest.approx(theirs, abs=1e-4)
                else:
                    assert ours[0] == pytest.approx(theirs[0], abs=1e-4) and ours[1] == theirs[1]
