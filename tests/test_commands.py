"""The commands as users type them: every mixer trains, resumes, evaluates and generates; bad input exits with 2."""

import io
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from flax import nnx

from zoo import compare
from zoo.checkpoints import Checkpointer
from zoo.config import preset, to_json
from zoo.evaluate.__main__ import main as evaluate
from zoo.generate.__main__ import main as generate
from zoo.model import LanguageModel

ROOT = pathlib.Path(__file__).parent.parent
TEXT = "".join(f"def f{n}(x):\n    return x + {n}  # é\n\n" for n in range(200))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def user_cache(text, monkeypatch):
    """Evaluation tokenizes into the user's cache directory, whatever a workdir names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(text.parent))


def command(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, input=stdin, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def train(workdir, text, mixer, steps):
    """The tiny GLA's config with another mixer, and small enough for a test."""
    small = {
        "model.num_layers": 3, "model.d_model": 16, "model.d_ff": 32, "train.batch_size": 2, "train.context_length": 64,
        "eval.batches": 1, "train.steps": steps, "data.source": text, "data.cache_dir": text.parent / "cache",
        "optimizer.schedule": "constant", "optimizer.warmup_steps": 1,  # one program for any number of steps
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in small.items()]
    done = command(
        "train.py", "--config=configs/gla.py:tiny", f"--workdir={workdir}", f"--config.model.mixer={mixer}", *overrides
    )
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _slow(mixer):
    return pytest.param(mixer, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "mixer", ["gla,gla,attention", *map(_slow, ["attention", "linear_attention", "retnet", "mamba"])]
)
def test_any_mixer_trains_resumes_evaluates_and_generates(mixer, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert [row["step"] for row in train(run, text, mixer, steps=4) if "eval_loss" in row] == [4]
    rows = train(run, text, mixer, steps=6)
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 6]  # the second went on from the first

    evaluate([f"--workdir={run}", "--tasks=perplexity"])
    result = json.loads((run / "evaluate.json").read_text())["tasks"]["perplexity"]["by_context_length"][0]
    assert result["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-5)  # what the trainer measured
    assert result["bits_per_byte"] == pytest.approx(rows[-1]["eval_bits_per_byte"], rel=1e-5)
    assert f"{result['bits_per_byte']:.4f}" in capsys.readouterr().out

    generate([f"--workdir={run}", "--prompt=def f(", "--max_tokens=8", "--temperature=0"])
    output = capsys.readouterr()
    assert output.out.startswith("def f(") and output.err.startswith("step 6; prefill: 7 tokens")

    compare.main([str(run), f"--output={tmp_path / 'comparison'}"])
    record = json.loads((tmp_path / "comparison" / "comparison.json").read_text())[0]
    assert record["finished"] and record["mixer"] == mixer and record["eval_loss"] == rows[-1]["eval_loss"]


class State(NamedTuple):
    params: Any
    opt: Any


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A run with a checkpoint of random weights, at step 7."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    workdir.mkdir()
    config = preset("tiny")
    config.model.num_layers, config.model.d_model, config.model.vocab_size = 1, 16, 320
    config.model.positions, config.model.max_positions = "learned", 100
    config.train.batch_size, config.train.context_length = 2, 64
    config.data.source, config.data.cache_dir = str(text), str(text.parent / "cache")
    (workdir / "config.json").write_text(to_json(config))
    params = nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(0)), nnx.Param)
    checkpointer = Checkpointer(workdir / "checkpoints")
    checkpointer.save(7, State(params, {"count": jnp.zeros(())}))
    checkpointer.close()
    return workdir


def test_the_commands_run_by_themselves(run, tmp_path):
    done = command(
        "-m", "zoo.generate", f"--workdir={run}", "--prompt_file=-", "--prompt=", "--max_tokens=20", "--seed=1",
        "--no-stop_at_separator", stdin="é = ".encode(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    first, second = done.stdout.decode().split("--- 2 of 2 ---\n")
    assert first.startswith("--- 1 of 2 ---\n") and second.startswith("é = ")
    assert "decode: 64 tokens" in done.stderr.decode() and "state: " in done.stderr.decode()
    output = tmp_path / "figures.json"
    done = command("-m", "zoo.evaluate", f"--workdir={run}", "--tasks=perplexity", f"--output={output}", "--batches=2")
    assert done.returncode == 0, done.stderr.decode()
    assert "gzip -9 needs" in done.stdout.decode() and output.exists()
    assert output.with_name("figures_perplexity.png").exists()
    done = command("-m", "zoo.compare", run, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr.decode()


def test_the_record_of_an_evaluation_says_what_was_measured(run, text, tmp_path, capsys):
    evaluate([f"--workdir={run}", "--tasks=perplexity", "--context_length=16,64", f"--output={tmp_path / 'own.json'}"])
    record = json.loads((tmp_path / "own.json").read_text())
    assert (record["step"], record["mixer"], record["corpus"]["source"]) == (7, "gla", str(text))
    assert record["corpus"]["gzip_bits_per_byte"] > 0 and record["corpus"]["fingerprint"]
    assert {"jax", "python"} <= set(record["versions"]) and record["device"] == "cpu (cpu)" and record["date"]
    lengths = record["tasks"]["perplexity"]["by_context_length"]
    assert [r["context_length"] for r in lengths] == [16, 64]
    assert lengths[0]["tokens"] == lengths[1]["tokens"] == record["corpus"]["validation_tokens"]
    capsys.readouterr()


@pytest.mark.slow
def test_what_a_run_cannot_do_is_left_out_unless_it_was_asked_for(run, tmp_path, capsys):
    asked = [f"--workdir={run}", f"--output={tmp_path / 'own.json'}"]
    evaluate([*asked, "--tasks=default,parity"])
    assert list(json.loads((tmp_path / "own.json").read_text())["tasks"]) == ["perplexity", "decode", "parity"]
    errors = capsys.readouterr().err
    assert errors.count("warning: left out: ") == 2 and "recall: the validation text has fewer than 4" in errors
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "own.json", "own.npz", "own.html", "own_perplexity.png", "own_decode.png", "own_parity.png"
    }  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        evaluate([*asked, "--tasks=default,recall"])
    assert "error: --tasks: recall: the validation text has fewer than 4" in capsys.readouterr().err


def test_any_text_can_be_evaluated(run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("another text, all of it\n" * 5)
    (run / "evaluate.json").write_text("the run's own")
    evaluate([f"--workdir={run}", "--tasks=perplexity", f"--source={other}"])
    assert (run / "evaluate.json").read_text() == "the run's own"
    (output,) = run.glob("evaluate-other-*.json")
    record = json.loads(output.read_text())
    assert record["corpus"]["source"] == str(other) and record["corpus"]["validation_bytes"] == 120
    assert record["tasks"]["perplexity"]["by_context_length"][0]["bytes"] == 120
    capsys.readouterr()


def test_a_prompt_file_is_a_prompt(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"x = 1")
    common = [f"--workdir={run}", "--max_tokens=12", "--temperature=0"]
    outputs = []
    for source in (f"--prompt_file={tmp_path / 'prompt.txt'}", "--prompt=x = 1", "--prompt_file=-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x = 1")))
        generate([*common, source])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] and outputs[0].startswith("x = 1")


GENERATE = {
    "no run": (["--workdir=nowhere", "--prompt=x"], "nowhere is no run"),
    "no step": (["--step=3", "--prompt=x"], "no checkpoint of step 3; it has steps 7"),
    "no prompt": ([], "no prompt; give --prompt=TEXT"),
    "no such file": (["--prompt_file=nowhere.txt"], "'nowhere.txt' cannot be read"),
    "a file without end": (["--prompt_file=/dev/zero"], "'/dev/zero' has more than 16 MiB"),
    "no tokens": (["--prompt=x", "--max_tokens=0"], "--max_tokens: got 0, expected at least 1"),
    "temperature": (["--prompt=x", "--temperature=-1"], "temperature: got -1.0"),
    "top_p": (["--prompt=x", "--top_p=0"], "top_p: got 0.0, expected more than 0 and at most 1"),
    "top_k": (["--prompt=x", "--top_k=-2"], "top_k: got -2"),
    "not a number": (["--prompt=x", "--max_tokens=many"], "--max_tokens: got 'many', expected a whole number"),
    "a temperature that is no number": (["--prompt=x", "--temperature=nan"], "temperature: got nan, expected a finite"),
    "a huge seed": (["--prompt=x", f"--seed={2**63}"], "--seed: got 9223372036854775808, expected at least 0"),
    "a number without end": (["--prompt=x", "--top_k=" + "9" * 5000], "--top_k: got '999"),
    "unknown flag": (["--prompt=x", "--max_token=3"], "unrecognized arguments: --max_token=3"),
    "too long": (["--prompt=x", "--max_tokens=99"], "exceed the model's 100 learned positions"),
    "an empty stop string": (["--prompt=x", "--stop="], "stop: got an empty string"),
    "min_p": (["--prompt=x", "--min_p=1.5"], "--min_p: got 1.5, expected at least 0 and at most 1"),
    "penalty": (["--prompt=x", "--repetition_penalty=0"], "--repetition_penalty: got 0.0, expected at least 1e-06"),
    "samples": (["--prompt=x", "--samples=0"], "--samples: got 0, expected at least 1"),
    "no texts": (["--prompt=x", "--batch_size=0"], "--batch_size: got 0, expected at least 1"),
    "logprobs without a file": (["--prompt=x", "--logprobs=2"], "--logprobs: a text shows none; give --output="),
    "interactive and a prompt": (["--interactive", "--prompt=x"], "goes without --prompt and --prompt_file"),
    "interactive and a list": (["--interactive", "--prompts=x"], "--interactive: it is one text on stdout, and goes"),
    "two texts for a state": (["--prompt=x", "--samples=2", "--save_state=x"], "--save_state: it is one text"),
    "two prompts for a state": (["--prompt=x", "--prompt=y", "--save_state=x"], "without more than one prompt"),
    "no such state": (["--prompt=x", "--load_state=nowhere"], "nowhere: cannot be read"),
    "no list": (["--prompts=nowhere.jsonl"], "--prompts: 'nowhere.jsonl' cannot be read"),
    "two kinds of prompts": (["--prompts=-", "--prompt=x"], "goes without --prompt and --prompt_file"),
    "no folder": (["--prompt=x", "--max_tokens=8", "--output=nowhere/x"], "--output: 'nowhere/x' cannot be written"),
    "a device": (["--prompt=x", "--max_tokens=8", "--output=/dev/null"], "it is a device, expected a regular file"),
}


@pytest.mark.parametrize(("arguments", "message"), GENERATE.values(), ids=GENERATE)
def test_bad_input_to_generate_exits_with_2(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        generate([f"--workdir={run}", *arguments])
    output = capsys.readouterr()
    assert exit.value.code == 2 and message in output.err and output.out == ""


BAD_LISTS = {
    "empty": ("x.jsonl", " \n\r\n", "'x.jsonl' has no prompt; expected one on each line"),
    "no JSON": ("x.jsonl", '"a"\n\n{"prompt": "b"', 'x.jsonl, line 3: no JSON ("Expecting'),
    "no prompt": ("x.jsonl", '{"text": "b"}', "line 1: got {'text': 'b'}, expected a string or {\"prompt\""),
    "unknown": ("x.jsonl", '{"prompt": "b", "temp": 1}', "unknown setting 'temp'; known, nearest first: temperature"),
    "a number": ("x.jsonl", '{"prompt": "b", "top_p": 2}', "top_p: got 2.0, expected more than 0 and at most 1"),
    "not a number": ("x.jsonl", '{"prompt": "b", "top_k": "5"}', "top_k: got '5', expected a whole number"),
    "stop": ("x.jsonl", '{"prompt": "b", "stop": [1]}', "stop: got [1], expected a string, or a list of strings"),
    "empty stop": ("x.jsonl", '{"prompt": "b", "stop": ""}', "x.jsonl, line 1: stop: got an empty string"),
    "half a character": ("x.jsonl", '{"prompt": "\\ud800"}', "line 1: its prompt has half of a character"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_line_that_is_no_prompt_is_named(run, name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path(name).write_text(content)
    with pytest.raises(SystemExit) as exit:
        generate([f"--workdir={run}", f"--prompts={name}"])
    output = capsys.readouterr()
    assert exit.value.code == 2 and message in output.err and output.err.count("\n") == 1 and output.out == ""


def test_a_file_of_prompts_goes_on_where_it_was_stopped(run, tmp_path, capsys):
    lines = ['"x = "', '{"prompt": "é", "max_tokens": 3}', '{"prompt": "y", "samples": 2, "stop": "e", "seed": 7}']
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines) + "\n")
    output = tmp_path / "texts.jsonl"
    common = [f"--workdir={run}", f"--prompts={tmp_path / 'prompts.jsonl'}", "--batch_size=2", "--logprobs=1"]
    common += ["--max_tokens=20", "--no-stop_at_separator"]
    generate([*common, f"--output={output}"])
    whole = output.read_bytes()
    rows = sorted(map(json.loads, whole.splitlines()), key=lambda row: (row["number"], row["sample"]))
    assert [(row["prompt"], row["sample"]) for row in rows] == [("x = ", 0), ("é", 0), ("y", 0), ("y", 1)]
    assert [row["tokens"] for row in rows[:2]] == [20, 3] and rows[2]["text"] != rows[3]["text"]
    assert all(("e" not in row["text"]) and row["ended"] in ("stop", "length") for row in rows[2:])
    first = rows[0]["logprobs"][0]
    assert first["logprob"] <= first["likeliest"][0]["logprob"] < 0 and len(rows[0]["logprobs"]) == 20
    output.write_bytes(whole[: whole.index(b"\n") + 5])  # as a kill may leave it
    generate([*common, f"--output={output}"])
    assert output.read_bytes() == whole and "1 of 4 texts were there" in capsys.readouterr().err
    generate([*common, f"--output={output}"])
    assert output.read_bytes() == whole and "has all 4 texts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate([*common, f"--output={output}", "--temperature=0.5"])
    assert "line 1, is no result of these prompts, settings and parameters" in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_turns_are_typed_and_their_state_is_kept_in_a_file(run, tmp_path, capsys, monkeypatch):
    def typed(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        generate([*common, "--interactive"])
        return capsys.readouterr()

    common = [f"--workdir={run}", "--max_tokens=4", "--temperature=0", "--no-stop_at_separator"]
    generate([*common, "--prompt=x = ", f"--save_state={tmp_path / 'a'}"])
    text = capsys.readouterr().out
    assert text.startswith("x = ")
    first, save = text.removeprefix("x = "), f"/save {tmp_path / 'b'}"
    output = typed("x = ", "/undo", "/undo", "/nothing", "x\\", "y", "", "/help", save)
    assert output.out.startswith(first) and output.out.count("\n") >= 3
    errors = output.err.splitlines()
    assert errors[0] == "error: /undo: there is no turn before"
    assert errors[1].startswith("error: /nothing: expected /undo")
    assert errors[-1].startswith("step 7; the state: 12 tokens, ")  # separator, "x\ny", and two turns of 4
    assert (tmp_path / "b").exists()

    generate([f"--workdir={run}", "--prompt=x = ", "--max_tokens=0", f"--save_state={tmp_path / 'c'}"])
    assert capsys.readouterr().out == "x = \n"
    generate([*common, f"--load_state={tmp_path / 'c'}"])
    assert capsys.readouterr().out == first
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    generate([*common, f"--load_state={tmp_path / 'b'}", "--interactive"])
    assert "the state: 12 tokens" in capsys.readouterr().err


EVALUATE = {
    "no run": (["--workdir=nowhere"], "nowhere is no run"),
    "no step": (["--step=3"], "no checkpoint of step 3; it has steps 7"),
    "unknown task": (["--tasks=perplexty"], "unknown task 'perplexty'; known, nearest first: perplexity"),
    "no task": (["--tasks="], "--tasks: got none; known: perplexity"),
    "a task too large": (["--tasks=mqar"], "--tasks: mqar has 8192 token ids, and the model"),
    "a task's option": (["--tasks=needle?dept=1"], "--tasks: needle: unknown option 'dept'; known, nearest"),
    "text too short": (["--tasks=recall"], "recall: the validation text has fewer than 4 documents of 64 tokens"),
    "no such text": (["--source=nowhere.txt"], "no file 'nowhere.txt'"),
    "context length": (["--context_length=64,none"], "--context_length: got 'none', expected a whole number"),
    "context length 0": (["--context_length=0"], "--context_length: got 0, expected at least 1 token"),
    "too long": (["--context_length=128"], "--context_length: 128 exceeds the model's 100 learned positions"),
    "batches": (["--batches=-1"], "--batches: got -1"),
    "output": (["--output=nowhere/x.json"], "--output: the folder 'nowhere' does not exist"),
    "unknown flag": (["--task=perplexity"], "unrecognized arguments: --task=perplexity"),
}


@pytest.mark.parametrize(("arguments", "message"), EVALUATE.values(), ids=EVALUATE)
def test_bad_input_to_evaluate_exits_with_2(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate([f"--workdir={run}", *arguments])
    output = capsys.readouterr()
    assert exit.value.code == 2 and message in output.err and output.out == ""


def test_ctrl_c_ends_a_command_without_a_traceback(run, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("zoo.generate.batch.answer", stop)
    with pytest.raises(SystemExit) as exit_:
        generate([f"--workdir={run}", "--prompt=x", "--max_tokens=8"])
    assert exit_.value.code == 130 and capsys.readouterr().err.endswith("\ninterrupted\n")
