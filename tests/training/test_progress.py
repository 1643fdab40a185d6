"""What a person sees of a run."""

import io

import pytest
from rich.console import Console

from zoo.training import progress

TRAINING = {"step": 20, "loss": 1.5, "tokens_per_second": 4321.0, "mfu": None}


def lines(monkeypatch, *rows, terminal=False, width=80):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr("builtins.print", lambda text, **_: stream.write(text + "\n"))
    line = progress.ProgressLine(10, 100)
    for row in rows:
        line.row(row, seconds_per_step=2.0)
    line.say("saved in runs/[red]x[/red]")
    line.close()
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_mfu_is_shown_where_it_is_known(terminal, monkeypatch):
    assert "MFU" not in lines(monkeypatch, TRAINING, terminal=terminal)
    assert "MFU 41.2%" in lines(monkeypatch, TRAINING | {"mfu": 0.412}, terminal=terminal)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_evaluation_says_how_much_it_is_of_and_leaves_out_what_has_no_bytes(terminal, monkeypatch):
    row = {"step": 20, "eval_loss": 1.25, "eval_bits_per_byte": 1.8034, "eval_tokens": 65536}
    shown = lines(monkeypatch, row, terminal=terminal)
    assert "step 20  validation loss 1.2500  bits per byte 1.8034  (65,536 tokens)" in shown
    assert "bits" not in lines(monkeypatch, row | {"eval_bits_per_byte": None}, terminal=terminal)


def test_piped_output_is_plain_lines(monkeypatch):
    shown = lines(monkeypatch, TRAINING)
    assert shown == "step 20/100  loss 1.5000  4.32k tokens/s  2:40 left\nsaved in runs/[red]x[/red]\n"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_narrow_terminal_keeps_one_line_and_what_is_said_is_no_markup(width, monkeypatch):
    shown = lines(monkeypatch, TRAINING | {"mfu": 0.4}, terminal=True, width=width)
    assert "saved in runs/[red]x[/red]" in shown
    assert max(len(line) for part in shown.split("\n") for line in part.split("\r") if "[2K" not in line) <= width
    assert "loss 1.5000" in shown
