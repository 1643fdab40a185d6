"""What a workdir binds, and what it lets go: no run here is trained, a checkpoint of a few numbers says what was."""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

from zoo import compare, data
from zoo.checkpoints import Checkpointer, read_config
from zoo.data import corpora
from zoo.data.tokenizer.__main__ import train as train_tokenizer
from zoo.errors import UsageError
from zoo.evaluate import __main__ as evaluate
from zoo.generate import __main__ as generate
from zoo.training import train, workdir


class State(NamedTuple):
    params: Any
    opt: Any


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizer.json of one vocabulary size."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"{name}bc def " * 50)
        made = train_tokenizer(corpora.find_all(str(folder / f"{name}.txt"), "text"), 260)
        (folder / f"{name}.json").write_text(made.to_str())
    return folder


@pytest.fixture
def prepare(tmp_path):
    """prepare(config, **arguments): of tmp_path/run, its lock let go."""

    def prepare(config, path=tmp_path / "run", **arguments):
        run = workdir.prepare(config, path, **arguments)
        run.lock.close()
        return run

    return prepare


def pretend_training(run, step):
    """A checkpoint that says that `run` was trained until `step`."""
    tokenizer = data.tokenizer.load(run.data_config.data.tokenizer).fingerprint
    checkpointer = Checkpointer(run.workdir / "checkpoints")
    meta = {"config": dataclasses.asdict(run.config), "tokenizer": tokenizer}
    checkpointer.save(step, State({"a": jnp.zeros(3)}, jnp.zeros(3)), meta=meta)
    checkpointer.close()


def test_a_start_that_trained_nothing_binds_nothing(make_config, prepare, tokenizers, tmp_path):
    wrong = make_config(**{"train.context_length": 50_000, "data.tokenizer": str(tokenizers / "a.json")})
    with pytest.raises(UsageError, match="fewer than one context"):
        train(wrong, tmp_path / "run")
    assert prepare(make_config(**{"data.tokenizer": str(tokenizers / "b.json")})).data_config.data.tokenizer.startswith(
        str(tmp_path)
    )
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (tokenizers / "b.json").read_bytes()
    run = prepare(make_config(**{"model.d_model": 32}))
    assert read_config(tmp_path / "run") == run.config and run.config.model.vocab_size == 320
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_a_refused_start_leaves_no_folder(make_config, prepare, tmp_path):
    with pytest.raises(UsageError, match="no file"):
        prepare(make_config(**{"data.source": "nowhere.txt"}))
    assert not (tmp_path / "run").exists()


def test_a_trained_run_is_changed_by_naming_the_setting(make_config, prepare):
    pretend_training(prepare(make_config()), 6)
    changed = make_config(**{"optimizer.learning_rate": 1e-3, "optimizer.schedule": "linear"})
    with pytest.raises(UsageError, match=r"learning_rate: 0.003 -> 0.001; .*--override=optimizer.learning_rate,optim"):
        prepare(changed)
    with pytest.raises(UsageError, match=r"another config: optimizer.schedule: cosine -> linear \("):
        prepare(changed, override=["optimizer.learning_rate"])
    names = ["optimizer.learning_rate", "optimizer.schedule"]
    assert prepare(changed, override=names).config.optimizer.schedule == "linear"
    prepare(make_config())  # nothing was trained with the new values
    with pytest.raises(UsageError, match="a run cannot change 'train.batch_size'; what it can, nearest first: "):
        prepare(changed, override=["train.batch_size"])
    with pytest.raises(UsageError, match="another config: train.batch_size: 4 -> 8"):
        prepare(make_config(**{"train.batch_size": 8}), override=names)


def test_overridable_settings_exist():
    known = workdir.zoo_config.leaves(workdir.Config())
    assert set(workdir.OVERRIDABLE) <= set(known) and "optimizer.name" not in workdir.OVERRIDABLE
    assert all(any(name.startswith(free) for name in known) for free in workdir.FREE + workdir.NOTED)
    said = (pathlib.Path(__file__).parents[2] / "docs" / "running.md").read_text()
    named = [name for name in workdir.OVERRIDABLE if not name.startswith("optimizer.")]
    for name in (*workdir.FREE, *workdir.NOTED, *named):
        assert f"`{name}*`" in said or f"`{name}`" in said, f"docs/running.md does not say that {name} may change"


def test_fewer_steps_than_are_done_are_refused(make_config, prepare):
    pretend_training(prepare(make_config()), 6)
    prepare(make_config(**{"train.steps": 6}))
    with pytest.raises(UsageError, match="train.steps: 5 is less than the 6 steps that the run in .* has done"):
        prepare(make_config(**{"train.steps": 5}))


def test_relative_and_absolute_paths_are_one(make_config, prepare, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(corpus)
    relative = {"data.source": "*.txt", "data.cache_dir": "cache", "data.validation_source": "00.txt"}
    run = prepare(make_config(**relative))
    pretend_training(run, 6)
    saved = read_config(run.workdir).data
    assert (saved.source, saved.cache_dir) == (f"{corpus}/*.txt", f"{corpus}/cache")
    monkeypatch.chdir(tmp_path)
    prepare(make_config(**{"data.validation_source": f"{corpus}/00.txt"}))
    with pytest.raises(UsageError, match="data.source: .*txt -> stdlib"):
        prepare(make_config(**{"data.source": "stdlib", "data.validation_source": f"{corpus}/00.txt"}))


def test_home_is_expanded_everywhere(make_config, prepare, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(corpus / "00.txt", tmp_path)
    config = make_config(
        **{"data.source": "~/00.txt", "data.cache_dir": "~/cache", "data.validation_source": "~/00.txt"}
    )
    run = prepare(config, "~/runs/x")
    assert run.workdir == tmp_path / "runs" / "x" and read_config("~/runs/x") == run.config
    assert run.config.data.source == run.config.data.validation_source == f"{tmp_path}/00.txt"
    assert run.config.data.cache_dir == f"{tmp_path}/cache"
    for found in (
        evaluate._arguments(["--workdir=~/x", "--output=~/x"], "evaluate"),
        generate._arguments(["--workdir=~/x", "--prompt_file=~/x"], "generate"),
        compare._arguments(["~/x", "--output=~/x"], "compare"),
    ):
        paths = [getattr(found, name, None) for name in ("workdir", "output", "prompt_file", "runs")]
        for path in filter(None, paths):
            assert path in (f"{tmp_path}/x", [f"{tmp_path}/x"])


def test_a_run_keeps_its_tokenizer(make_config, prepare, tokenizers, tmp_path, capsys):
    original = shutil.copy(tokenizers / "a.json", tmp_path / "original.json")
    config = make_config(**{"data.tokenizer": str(original)})
    run = prepare(config)
    pretend_training(run, 6)
    own, content = run.workdir / "tokenizer.json", original.read_bytes()
    os.truncate(own, 100)
    prepare(config)  # made whole from the original
    assert own.read_bytes() == content and "damaged or gone; written anew" in capsys.readouterr().err

    shutil.copy(tokenizers / "b.json", original)
    prepare(config)  # the original is another one by now
    assert own.read_bytes() == content
    original.unlink()
    assert prepare(config).data_config.data.tokenizer == str(own)
    with pytest.raises(UsageError, match="b.json' is not the tokenizer that the run was trained with"):
        prepare(make_config(**{"data.tokenizer": str(tokenizers / "b.json")}))
    with pytest.raises(UsageError, match="data.tokenizer: .*original.json -> bytes"):
        prepare(make_config())
    prepare(make_config(**{"data.tokenizer": str(tokenizers / "a.json")}))  # the same, elsewhere
    own.write_bytes(content + b" ")
    with pytest.raises(UsageError, match=r"run/tokenizer.json' is damaged or gone, and .* put one of them back"):
        prepare(config)


@pytest.mark.parametrize("damage", ["deleted", "cut short", "not UTF-8"])
def test_a_damaged_config_json_is_written_anew(make_config, prepare, damage):
    run = prepare(make_config())
    pretend_training(run, 6)
    file = run.workdir / "config.json"
    file.unlink() if damage == "deleted" else file.write_bytes(b"\xff" if damage == "not UTF-8" else b"{")
    if damage != "deleted":
        with pytest.raises(UsageError, match="config.json is no config of a run"):
            read_config(run.workdir)
    assert prepare(make_config()).config == read_config(run.workdir)


def test_a_lock_outlives_its_file(make_config, prepare, tmp_path):
    run = workdir.prepare(make_config(), tmp_path / "run")
    (run.workdir / ".lock").unlink()
    with pytest.raises(UsageError, match="another process trains there"):
        prepare(make_config())
    run.lock.close()
    prepare(make_config())


@pytest.mark.parametrize("obstacle", ["run", "run/checkpoints", "run/config.json/x"])
def test_a_workdir_that_cannot_be_is_refused(make_config, prepare, tmp_path, obstacle):
    path = tmp_path / pathlib.Path(obstacle)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    with pytest.raises(UsageError, match="--workdir: .* cannot be written"):
        prepare(make_config())


def test_a_workdir_that_is_no_path_is_refused(make_config, prepare, tmp_path):
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(UsageError, match="--workdir: .* cannot be written"):
            prepare(make_config(), tmp_path / name)


def test_a_fifo_in_place_of_the_lock_is_refused_not_waited_for(make_config, prepare, tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / ".lock")
    with pytest.raises(UsageError, match="--workdir: .* cannot be written"):
        prepare(make_config())


def test_naming_what_may_change_anyway_is_no_mistake(make_config, prepare):
    pretend_training(prepare(make_config()), 4)
    prepare(make_config(**{"train.steps": 30, "eval.every": 3}), override=["train.steps", "eval.every"])
    with pytest.raises(UsageError, match="cannot change 'eval.evry'"):
        prepare(make_config(), override=["eval.evry"])


def test_settings_that_shapes_do_not_show_are_named(make_config):
    old, new = make_config(), make_config(**{"model.gla.num_heads": 4, "model.remat": "full", "model.unrolled": 2})
    new.model.retnet.num_heads, new.model.positions = 4, "none"
    assert workdir.model_difference(old.model, new.model) == [
        "model.positions: rope -> none", "model.gla.num_heads: 2 -> 4",
    ]  # fmt: skip
    assert json.dumps(workdir.changes(old, new))
