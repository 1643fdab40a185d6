"""metrics.jsonl and its kin: damaged lines, full disks."""

import errno
import json
import os
import struct

import pytest

from zoo import files, metrics
from zoo.errors import UsageError


def write(folder, content):
    (folder / "metrics.jsonl").write_bytes(content)


def line(step, **values):
    return json.dumps({"step": step, "loss": 1.5} | values).encode() + b"\n"


DAMAGE = {
    "no JSON": b"{'step': 3}",
    "binary": b"\x80\x81\xff",
    "zeros": bytes(20),
    "no object": b"[3]",
    "no step": b'{"loss": 1.0}',
    "a step that is none": b'{"step": "3"}',
    "not finite": b'{"step": 3, "loss": NaN}',
    "a text": b'{"step": 3, "loss": "1"}',
    "beyond float32": b'{"step": 3, "loss": 1e300}',
    "nested": b"[" * 100_000,
    "huge": b'{"step": 1' + b"0" * 400 + b"}",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_costs_itself(make_config, tmp_path, capsys, damage):
    write(tmp_path, line(1) + damage + b"\n" + line(2, mfu=None) + line(7))
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 7]
    assert f"{tmp_path}/metrics.jsonl: no row in line 2; left out" in capsys.readouterr().err
    writer = metrics.Writer(tmp_path, make_config(), step=5)
    writer.write({"step": 6, "loss": 1.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1) + line(2, mfu=None) + line(6)


def test_a_line_cut_off_by_a_kill_is_no_damage(tmp_path, capsys):
    write(tmp_path, line(1) + line(2)[:-5])
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    assert capsys.readouterr().err == ""


def test_rows_that_are_no_file(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UsageError, match="metrics.jsonl cannot be read .it is a directory"):
        metrics.read(tmp_path)


def test_rows_deleted_while_a_run_trains(make_config, tmp_path, capsys):
    writer = metrics.Writer(tmp_path, make_config(), step=0)
    writer.write({"step": 1, "loss": 1.5})
    (tmp_path / "metrics.jsonl").unlink()
    for step in (2, 3):
        writer.write({"step": step, "loss": 1.5})
    writer.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [2, 3]
    assert capsys.readouterr().err.count("was deleted while the run trains") == 1


def full_disk(monkeypatch, module, name, room=0):
    """The disk takes `room` bytes of a write, then no more."""
    original = getattr(module, name)

    def limited(file, data):
        nonlocal room
        taken, room = min(room, len(data)), max(0, room - len(data))
        if taken == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, data[:taken])

    monkeypatch.setattr(module, name, limited)


def test_a_full_disk_leaves_whole_rows(make_config, tmp_path, monkeypatch):
    writer = metrics.Writer(tmp_path, make_config(), step=0)
    writer.write({"step": 1, "loss": 1.5})
    full_disk(monkeypatch, os, "write", room=10)
    with pytest.raises(files.WriteError, match=r"metrics.jsonl cannot be written \(No space left on device\)"):
        writer.write({"step": 2, "loss": 1.5})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == line(1)
    assert writer.unwritten == [{"step": 2, "loss": 1.5}]


def test_tensorboard_gets_the_rows_and_says_when_it_cannot(make_config, tmp_path, monkeypatch):
    from tensorboardX.proto.event_pb2 import Event

    writer = metrics.Writer(tmp_path, make_config(**{"metrics.tensorboard": True}), step=4)
    writer.write({"step": 5, "loss": 1.5, "mfu": None})
    writer.sync()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, an event, its checksum
        (size,) = struct.unpack("Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    version, start, row = events
    assert version.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (5, 1)
    assert row.step == 5 and [(v.tag, v.simple_value) for v in row.summary.value] == [("loss", 1.5)]

    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", lambda _: os.write(99_999, b""))
    with pytest.raises(files.WriteError, match="tensorboard/events.out.* cannot be written"):
        writer.sync()
    writer.close()
