"""What is read of files that others wrote, what is written for others, and what reaches a terminal."""

import errno
import json
import os

import pytest

from zoo import files
from zoo.errors import UsageError, exit_with_message
from zoo.terminal import one_line, printable


def test_a_file_is_read_up_to_its_bound_and_other_kinds_not_at_all(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "a", 5) == b"12345"
    os.mkfifo(tmp_path / "fifo")
    for path, why in (
        (tmp_path, "a directory"), (tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device"),
        (tmp_path / "b", "No such"), ("a\0b", "no path"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=why):
            files.read_bytes(path, 5)
    with pytest.raises(OSError, match="larger than 4 bytes"):
        files.read_bytes(tmp_path / "a", 4)


def test_json_that_is_nested_deeply_is_a_value_error(tmp_path):
    (tmp_path / "a").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        files.read_json(tmp_path / "a", 1 << 20)


def test_json_is_strict():
    def refuse(constant):
        raise AssertionError(constant)

    text = files.to_json({"a": [float("nan"), (1.5, float("-inf"))], "b": "NaN"})
    assert json.loads(text, parse_constant=refuse) == {"a": [None, [1.5, None]], "b": "NaN"}


def test_a_file_is_replaced_whole_and_a_link_is_not_followed(tmp_path):
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "a.json").symlink_to(tmp_path / "outside")
    with files.replacing(tmp_path / "a.json") as path:
        path.write_text("new")
    assert (tmp_path / "outside").read_text() == "kept" and (tmp_path / "a.json").read_text() == "new"
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a.json") as path:
        path.write_text(str(1 / 0))
    assert (tmp_path / "a.json").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "outside"]


def test_a_name_may_be_as_long_as_names_are_and_modes_are_the_umask_s(tmp_path):
    path = tmp_path / ("\u4e16" * 80 + ".json")  # 245 bytes
    before = os.umask(0o027)
    try:
        files.write(path, "世界")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "世界" and path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(files.WriteError, match=r"summary.json cannot be written \(No space left"):
        files.write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize(
    "character", ["\x1b", "\x07", "\r", "\x00", "\x7f", "\x9b", "\u202e", "\u2028", "\ud800", "\b"]
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(character):
    assert printable(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


def test_other_text_stays_as_it_is():
    text = "naïve 世界 👩‍🚀 [red]\n\tline"
    assert printable(text) == text
    assert one_line(text) == "naïve 世界 👩‍🚀 [red]\\n\\tline"


def test_messages_of_errors_are_printed_without_escapes(capsys):
    with pytest.raises(SystemExit), exit_with_message():
        raise UsageError("file \x1b]0;title\x07:\n       second problem")
    assert capsys.readouterr().err == "error: file \\x1b]0;title\\x07:\n       second problem\n"
