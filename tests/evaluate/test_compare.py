"""The comparison of runs, on workdirs written by hand."""

import json
import os
import re

import pytest
from rich.console import Console

from zoo import compare
from zoo.config import preset, to_json
from zoo.flops import num_parameters, state_bytes
from zoo.mixers import MIXERS


def write_run(path, mixer="gla", steps=40, last_step=40, corpus="aaaa", summary=True, **train):
    """A run whose validation loss falls from 3 to 3 - last_step / 100."""
    config = preset("tiny")
    config.model.mixer, config.model.num_layers, config.model.d_model, config.model.vocab_size = mixer, 2, 32, 320
    config.train.steps = steps
    for name, value in train.items():
        setattr(config.train, name, value)
    path.mkdir(parents=True)
    (path / "config.json").write_text(to_json(config))
    rows = []
    for step in range(10, last_step + 1, 10):
        common = {"step": step, "tokens": 100 * step, "seconds": step / 4}
        loss = 3 - step / 100
        rows.append(common | {"loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 390.0})
        rows.append(common | {"eval_loss": loss, "eval_bits_per_byte": 2 * loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (path / "summary.json").write_text(json.dumps({"step": last_step, "corpus": {"fingerprint": corpus}}))
    return config


def run(tmp_path, *names):
    compare.main([*(str(tmp_path / name) for name in names), f"--output={tmp_path / 'out'}"])
    return {r["run"]: r for r in json.loads((tmp_path / "out" / "comparison.json").read_text())}


def test_two_finished_runs(tmp_path, capsys):
    gla = write_run(tmp_path / "gla")
    attention = write_run(tmp_path / "softmax", "attention", last_step=30, steps=30)
    records = run(tmp_path, "gla", "softmax")
    first = records["gla"]
    assert (first["mixer"], first["tokens"], first["seconds"], first["corpus"]) == ("gla", 4000, 10.0, "aaaa")
    assert first["eval_loss"] == pytest.approx(2.6) and first["eval_bits_per_byte"] == pytest.approx(5.2)
    assert first["tokens_per_second"] == pytest.approx(400.0)
    assert first["parameters"] == num_parameters(gla.model) and first["state_bytes"] == state_bytes(gla.model, 256)
    assert records["softmax"]["state_bytes"] == state_bytes(attention.model, 256)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"comparison.json", "report.html", "loss.png"}
    output = capsys.readouterr()
    assert output.err == ""
    assert "5.2000" in output.out and output.out.index("gla") < output.out.index("softmax")  # the best first


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_table_of_fifteen_runs_fits_the_screen(width, capsys):
    values = {
        "parameters": 2_437_704, "context_length": 256, "step": 180, "tokens": 368_640, "eval_loss": 1.4512,
        "eval_accuracy": None, "eval_mae": None, "eval_bits_per_byte": 2.0936, "tokens_per_second": 3108.0,
        "seconds": 118.6, "state_bytes": 805_306_396, "corpus": "5cb1a01ac0c72b3c",
        "state_context_length": 131_072, "finished": True,
    }  # fmt: skip
    alike = [values | {"run": family, "mixer": family, "step": None if i else 20} for i, family in enumerate(MIXERS)]
    patterns = [r | {"run": f"runs/{r['run']}", "tokens": i, "mixer": "gla,gla,attention"} for i, r in enumerate(alike)]
    for records in (alike, patterns):
        Console(width=width).print(compare.table(records, width))
        lines = capsys.readouterr().out.splitlines()
        body = [line for line in lines if "attention" in line and "│" in line]
        assert len(body) >= 2 and max(map(len, lines)) <= width and not any("…" in line for line in lines)
        assert all("2.0936" in line for line in lines if "hgrn2" in line)
        assert width < 160 or "comparison.json" not in "".join(lines)  # nothing is left out where all fits


def test_texts_are_kept_apart(tmp_path, capsys):
    write_run(tmp_path / "one", corpus="aaaa")
    write_run(tmp_path / "two", corpus="bbbb")
    run(tmp_path, "one", "two")
    output = capsys.readouterr()
    assert "different texts" in output.err
    assert "text aaaa" in output.out and "text bbbb" in output.out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"loss_aaaa.png", "loss_bbbb.png"}


def test_context_lengths_that_differ_are_said(tmp_path, capsys):
    write_run(tmp_path / "short", context_length=128)
    write_run(tmp_path / "long", context_length=512)
    records = run(tmp_path, "short", "long")
    assert "train.context_length differs (short: 128, long: 512)" in capsys.readouterr().err
    assert {r["state_context_length"] for r in records.values()} == {512}


def test_a_run_still_being_written(tmp_path, capsys):
    write_run(tmp_path / "done")
    write_run(tmp_path / "running", last_step=20, summary=False)
    with open(tmp_path / "running" / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    records = run(tmp_path, "done", "running")
    assert records["running"]["step"] == 20 and not records["running"]["finished"] and records["done"]["finished"]
    output = capsys.readouterr()
    assert "running has not finished: step 20 of 40" in output.err and "running *" in output.out


def test_a_run_that_was_made_longer_has_not_finished(tmp_path):
    write_run(tmp_path / "run", last_step=20, steps=40)
    assert not run(tmp_path, "run")["run"]["finished"]


def test_a_run_that_has_just_begun(tmp_path, capsys):
    write_run(tmp_path / "new", last_step=0, summary=False)
    record = run(tmp_path, "new")["new"]
    assert record["eval_loss"] is None and record["tokens_per_second"] is None
    assert "new has written no metrics yet" in capsys.readouterr().err


def test_runs_with_one_folder_name_are_told_apart_by_their_paths(tmp_path):
    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run", "retnet")
    assert set(run(tmp_path, "a/run", "b/run")) == {str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is no run"),
        (["run", "--context_length=0"], "--context_length: got 0"),
        (["run", "--output=run/config.json/x"], "--output: cannot write"),
        (["run", "--bogus=1"], "unrecognized arguments: --bogus=1"),
        ([], "required: RUN"),
    ],
)
def test_bad_arguments_exit_with_2(tmp_path, monkeypatch, capsys, arguments, message):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        compare.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


# --- A workdir is only read -------------------------------------------------------------------------------------------


def test_what_a_workdir_says_is_neither_a_path_nor_obeyed_by_the_terminal(tmp_path, capsys):
    evil = "/../../ESCAPED\x1b]0;title\x07[/red]"
    write_run(tmp_path / "a[bold]", corpus=evil)
    write_run(tmp_path / "b", corpus="aaaa")
    run(tmp_path, "a[bold]", "b")
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err and "a[bold]" in output.out and "[/red]" in output.out
    assert {path.name for path in tmp_path.iterdir()} == {"a[bold]", "b", "out"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names > {"comparison.json", "report.html", "loss_aaaa.png"} and len(names) == 4


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "[1]", "summary.json: expected an object"),
        ("summary.json", '{"corpus": {"fingerprint": ["a"]}}', "summary.json: expected an object"),
        ("summary.json", '{"corpus"', "summary.json is no JSON"),
        ("summary.json", "[" * 100_000, "summary.json is no JSON .nested too deeply"),
        ("config.json", "[" * 100_000, "config.json is no config of a run"),
        ("config.json", '{"train": {"steps": 1' + "0" * 5000 + "}}", "config.json is no config of a run"),
        ("config.json", b"\xff", "config.json is no config of a run"),
    ],
)
def test_odd_content_is_one_line_of_error(tmp_path, capsys, file, content, message):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, "run")
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


@pytest.mark.parametrize("row", ['{"step": 1, "seconds": 2}', '{"step": 1, "loss": 2}', '{"step": 1, "tokens": null}'])
def test_a_row_may_lack_any_number(tmp_path, row):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(row + "\n")
    record = run(tmp_path, "run")["run"]
    assert (record["step"], record["tokens"], record["tokens_per_second"]) == (1, None, None)


def test_metrics_larger_than_a_run_leaves_are_refused(tmp_path, capsys):
    write_run(tmp_path / "run")
    os.truncate(tmp_path / "run" / "metrics.jsonl", 2 << 30)  # sparse
    with pytest.raises(SystemExit):
        run(tmp_path, "run")
    assert "metrics.jsonl cannot be read (it is larger than" in capsys.readouterr().err


def test_a_fingerprint_without_end_is_cut(tmp_path, capsys):
    for name in "ab":
        write_run(tmp_path / name, corpus="c" * 100_000 + name)
    records = run(tmp_path, "a", "b")
    assert records["a"]["corpus"] != records["b"]["corpus"] and len(records["a"]["corpus"]) < 64
    assert len(capsys.readouterr().out) < 10_000


@pytest.mark.parametrize("file", ["summary.json", "metrics.jsonl", "config.json"])
def test_what_would_block_or_never_end_is_refused(tmp_path, capsys, file):
    write_run(tmp_path / "run")
    (tmp_path / "run" / file).unlink()
    os.mkfifo(tmp_path / "run" / file)
    with pytest.raises(SystemExit):
        run(tmp_path, "run")
    (tmp_path / "run" / file).unlink()
    (tmp_path / "run" / file).symlink_to("/dev/zero")
    with pytest.raises(SystemExit):
        run(tmp_path, "run")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("cannot be read" in e and "it is a" in e for e in errors)


def test_a_run_without_bytes_has_no_bits_per_byte(tmp_path, capsys):
    write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name != "eval_bits_per_byte"} for row in rows]
    rows[-1]["eval_loss"] = float("nan")  # as json.dumps writes it: NaN, which is no JSON
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = run(tmp_path, "run")["run"]
    assert record["eval_bits_per_byte"] is None and record["eval_loss"] == pytest.approx(2.7)
    assert " - " in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "out" / "comparison.json").read_text()
