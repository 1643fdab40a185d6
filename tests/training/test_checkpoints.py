"""Checkpoints of a small state: what is kept, what counts as damaged, what a full disk and a kill leave behind."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import checkpoints
from zoo.checkpoints import Checkpointer, SaveError, digest
from zoo.errors import RunError, UsageError


class State(NamedTuple):
    params: Any
    opt: Any
    step: jax.Array


def make_state(step, width=64):
    values = jax.random.normal(jax.random.key(step), (width, width))
    return State(
        {"a": {"kernel": values}, "b": jnp.full((3,), step, jnp.bfloat16)},
        (jnp.int32(step), values * 2),
        jnp.int32(step),
    )


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)))


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=2, keep_best=1)
    yield checkpointer
    checkpointer.close()


def save(checkpointer, *steps, losses=None):
    for step in steps:
        checkpointer.save(step, make_state(step), loss=(losses or {}).get(step), meta={"seconds": step / 3})
    checkpointer.wait()


def test_restore_gives_back_what_was_saved(checkpointer):
    save(checkpointer, 1, 2)
    found = checkpointer.restore(abstract(make_state(0)))
    assert (found.step, found.meta) == (2, {"seconds": 2 / 3})
    assert equal(found.state, make_state(2))


def test_nothing_saved_restores_to_none(checkpointer):
    assert checkpointer.restore(abstract(make_state(0))) is None


def test_the_state_may_be_donated_while_it_is_written(checkpointer):
    state = make_state(1)
    checkpointer.save(1, state)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    checkpointer.wait()
    assert equal(checkpointer.restore(abstract(make_state(0))).state, make_state(1))


def test_the_newest_and_the_best_are_kept(checkpointer):
    save(checkpointer, 1, 2, 3, 4, 5, losses={1: 2.0, 2: 1.0, 3: 1.5, 5: 1.2})
    assert checkpointer.steps() == [2, 4, 5]


def arrays(path):
    """The largest file, which holds array data."""
    return max((f for f in path.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_byte(path):
    content = bytearray(arrays(path).read_bytes())
    content[len(content) // 2] ^= 1
    arrays(path).write_bytes(content)


def flip_a_byte_of_the_digest(path):
    content = (path / digest.DIGEST).read_text()
    (path / digest.DIGEST).write_text(content.replace("a", "b"))


DAMAGE = {
    "one byte flipped": flip_a_byte,
    "cut short": lambda path: os.truncate(arrays(path), arrays(path).stat().st_size // 2),
    "a file missing": lambda path: arrays(path).unlink(),
    "a folder missing": lambda path: shutil.rmtree(path / "opt"),
    "digest flipped": flip_a_byte_of_the_digest,
    "digest cut short": lambda path: os.truncate(path / digest.DIGEST, 20),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(checkpointer, capsys, damage):
    save(checkpointer, 1, 2)
    damage(checkpointer.directory / "2")
    found = checkpointer.restore(abstract(make_state(0)))
    assert found.step == 1 and equal(found.state, make_state(1))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: checkpoint") and "2 is damaged" in warning and warning.count("\n") == 1
    assert (checkpointer.directory / "2.damaged").exists()
    save(checkpointer, 2)  # its step comes again
    assert checkpointer.restore(abstract(make_state(0))).step == 2
    assert not (checkpointer.directory / "2.damaged").exists()


def test_all_damaged_is_said_and_nothing_is_touched(checkpointer):
    save(checkpointer, 1, 2)
    for step in (1, 2):
        flip_a_byte(checkpointer.directory / str(step))
    for _ in range(2):
        with pytest.raises(UsageError, match=r"every checkpoint is damaged: 2 \(.* differs from its digest\), 1 \("):
            checkpointer.restore(abstract(make_state(0)))
    assert checkpointer.steps() == [1, 2]
    shutil.rmtree(checkpointer.directory / "1")
    (checkpointer.directory / "2").rename(checkpointer.directory / "2.damaged")
    with pytest.raises(UsageError, match="every checkpoint is damaged: 2.damaged"):
        checkpointer.restore(abstract(make_state(0)))


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from test_checkpoints import Checkpointer, digest, make_state
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, make_state(1))
checkpointer.wait()
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "digest":  # all is written, but for the digest
    digest.write_digest = die
checkpointer.save(2, make_state(2, width=1024))
if sys.argv[2] == "arrays":  # being written in the background
    die()
checkpointer.wait()
"""


@pytest.mark.parametrize("moment", ["arrays", "digest"])
def test_a_kill_during_a_save_leaves_the_one_before(tmp_path, checkpointer, moment):
    script = KILLED.format(here=str(pathlib.Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(checkpointer.directory), moment], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(checkpointer.directory.iterdir())) == 2  # the second was begun
    assert checkpointer.restore(abstract(make_state(0))).step == 1
    assert [entry.name for entry in checkpointer.directory.iterdir()] == ["1"]  # and its remains are cleared away
    save(checkpointer, 2)
    assert checkpointer.restore(abstract(make_state(0))).step == 2


def test_a_full_disk_is_said_and_leaves_the_one_before(checkpointer, monkeypatch):
    save(checkpointer, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(RunError, match="step 2 could not be written.*No space left.*step 1 is intact.*Make room"):
        save(checkpointer, 2)
    monkeypatch.undo()
    assert checkpointer.restore(abstract(make_state(0))).step == 1


@pytest.mark.filterwarnings("ignore")  # of threads and coroutines that Orbax leaves behind when a write fails
def test_a_write_that_fails_half_way_is_said_and_leaves_the_one_before(checkpointer):
    """The system refuses to write more than 8 KB to a file: arrays fail in the middle, as on a disk that fills up."""
    save(checkpointer, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(RunError, match="step 2 could not be written.*File too large.*step 1 is intact"):
            save(checkpointer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [entry.name for entry in checkpointer.directory.iterdir()] == ["1"]
    save(checkpointer, 3)
    assert checkpointer.steps() == [1, 3]
    assert equal(checkpointer.restore(abstract(make_state(0))).state, make_state(3))


def test_a_failed_save_shows_without_waiting(checkpointer, monkeypatch):
    monkeypatch.setattr(digest, "write_digest", lambda *_: 1 / 0)
    checkpointer.save(1, make_state(1))
    while not checkpointer._unfinished.done():
        pass
    with pytest.raises(RunError, match="there is no earlier checkpoint"):
        checkpointer.check()


def test_another_architecture_is_named_by_its_parameters(checkpointer):
    save(checkpointer, 1)
    other = make_state(0, width=32)._replace(params={"a": {"kernel": jnp.zeros((32, 32))}, "c": jnp.zeros(3)})
    with pytest.raises(UsageError) as error:
        checkpointer.restore(abstract(other))
    message = str(error.value)
    assert "another architecture" in message
    assert "a.kernel: [64, 64] there, [32, 32] in this config" in message
    assert "b: [3] there, missing in this config" in message and "c: missing there, [3] in this config" in message
    assert checkpointer.steps() == [1]  # nothing is set aside for it


def test_names_are_paths():
    assert list(checkpoints.named_leaves(make_state(1).params)) == ["a.kernel", "b"]
    np.testing.assert_array_equal(checkpoints.named_leaves(make_state(1).params)["b"], [1, 1, 1])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_state_whose_loss_is_not_finite_is_no_checkpoint(checkpointer, loss):
    save(checkpointer, 1, losses={1: 2.0})
    with pytest.raises(
        SaveError, match=f"step 2 could not be written .*its evaluation loss is {loss}.*step 1 is intact"
    ):
        save(checkpointer, 2, losses={2: loss})
    digest.write_digest(checkpointer.directory / "1", loss)  # as older releases did
    with pytest.raises(UsageError, match=f"every checkpoint is damaged: 1 .its evaluation loss is {loss}"):
        checkpointer.restore(abstract(make_state(0)))


@pytest.mark.parametrize(
    "content", ["[1]", '{"loss": 1.0}', '{"loss": "1", "files": {"a": "b"}}', "\x00", "[" * 100_000]
)
def test_a_digest_that_is_none_costs_its_checkpoint_alone(checkpointer, content):
    save(checkpointer, 1, 2, losses={1: 1.0, 2: 2.0})
    (checkpointer.directory / "1" / digest.DIGEST).write_text(content)
    save(checkpointer, 3)
    assert checkpointer.steps() == [2, 3]  # neither among the last, nor known as the best
    (checkpointer.directory / "3" / digest.DIGEST).write_text(content)
    assert checkpoints.newest_meta(checkpointer.directory) == (2, {"seconds": 2 / 3})
    assert checkpointer.restore(abstract(make_state(0))).step == 2


def test_what_is_no_checkpoint_is_left_alone(checkpointer, capsys):
    names = ["foo", "007", "\u00b2", "1e3", "x.damaged", "12.damaged.old"]
    save(checkpointer, 1)
    for name in names:
        (checkpointer.directory / name).mkdir()
        (checkpointer.directory / f"{name}.txt").write_text("")
    (checkpointer.directory / "2").write_text("a file")
    (checkpointer.directory / "13.damaged").write_text("a file")
    (checkpointer.directory / "30").mkdir()
    found = {path.name for path in checkpointer.directory.iterdir()}
    assert checkpointer.restore(abstract(make_state(0))).step == 1
    save(checkpointer, 2, 14)
    assert "2 is no checkpoint; renamed to 2.stray" in capsys.readouterr().err
    assert {path.name for path in checkpointer.directory.iterdir()} == (found - {"1"}) | {"2.stray", "14"}


def test_checkpoints_may_lie_elsewhere(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=1)
    save(checkpointer, 1, 2)
    assert checkpointer.restore(abstract(make_state(0))).step == 2
    checkpointer.close()


def test_a_lower_keep_last_makes_room_before_the_next_save(tmp_path):
    many = Checkpointer(tmp_path, keep_last=9, keep_best=1)
    save(many, 1, 2, 3, 4, losses={2: 1.0, 3: 1.5})
    many.close()
    few = Checkpointer(tmp_path, keep_last=1, keep_best=1)
    few.restore(abstract(make_state(0)))
    few.prune()
    few.close()
    assert few.steps() == [2, 4]


# --- A folder that others wrote ---------------------------------------------------------------------------------------


@pytest.fixture
def digested(tmp_path):
    """A folder that looks like a checkpoint, with a digest."""
    (tmp_path / "5" / "params").mkdir(parents=True)
    (tmp_path / "5" / "params" / "data").write_bytes(b"numbers")
    (tmp_path / "outside").write_bytes(b"numbers")
    digest.write_digest(tmp_path / "5", None)
    digest.verify(tmp_path / "5", limit=1000)
    return tmp_path / "5"


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "params/../../outside", "params"])
def test_a_digest_names_files_inside_its_folder_only(digested, name):
    record = json.loads((digested / "DIGEST.json").read_text())
    record["files"][name] = record["files"]["params/data"]
    (digested / "DIGEST.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is missing"):
        digest.verify(digested)


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "FIFO"])
def test_a_checkpoint_holds_nothing_to_follow_or_to_wait_for(digested, kind):
    stray = digested / "params" / "stray"
    os.mkfifo(stray) if kind == "FIFO" else stray.symlink_to("/dev/zero" if kind == "link to a file" else "/dev")
    with pytest.raises(ValueError, match="stray is no regular file"):
        digest.verify(digested)


def test_a_checkpoint_larger_than_its_model_is_not_read(digested):
    with open(digested / "params" / "data", "wb") as file:
        file.truncate(1 << 40)  # no blocks on disk
    with pytest.raises(ValueError, match="more than a model of this size has"):
        digest.verify(digested, limit=1 << 30)
