"""A synthetic task has no bytes of text: no bits per byte anywhere."""

import os
import types

from zoo.config import preset
from zoo.data import corpus_info, validation_batches
from zoo.training.loop import _Loop
from zoo.training.progress import ProgressLine


def test_an_evaluation_without_bytes_writes_no_bits_per_byte(capsys):
    config = preset("tiny")
    config.data.source, config.train.context_length, config.eval.batches = "associative_recall", 16, 1
    rows = []
    programs = types.SimpleNamespace(
        evaluate=lambda params, batch: {"nats": 8.0, "tokens": 4.0, "bytes": 0.0, "right": 3.0}, put=lambda b, _: b
    )
    writer = types.SimpleNamespace(plot=lambda: None)
    loop = types.SimpleNamespace(
        validation=validation_batches(config), config=config, programs=programs, step=3,
        state=types.SimpleNamespace(params=None), tokens_per_step=10, seconds=1.0, writer=writer,
        _write=rows.append, progress=ProgressLine(0, 5),
    )  # fmt: skip
    assert _Loop._evaluate(loop, 1) == 2.0
    common = {"step": 3, "tokens": 30, "seconds": 1.0}
    assert rows == [common | {"eval_loss": 2.0, "eval_accuracy": 0.75, "eval_tokens": 4}]
    assert capsys.readouterr().out == "step 3  validation loss 2.0000  accuracy 75.00%  (4 tokens)\n"
    info = corpus_info(config)
    assert (info["validation_bytes"], info["gzip_bits_per_byte"]) == (0, None)


def test_what_the_console_says_is_neither_markup_nor_obeyed(capsys):
    ProgressLine(0, 5).say("corpus [red]:bug:\x1b[31m")
    assert capsys.readouterr().out == "corpus [red]:bug:\\x1b[31m\n"


def test_the_end_of_a_run_needs_no_metrics_jsonl(tmp_path):
    """Its last rows are known, whatever became of the file."""
    loop = types.SimpleNamespace(last_rows={"loss": {}, "eval_loss": {}})
    for row in ({"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": None}):
        _Loop._remember(loop, row)
    assert loop.last_rows == {"loss": {"step": 1, "loss": 2.0}, "eval_loss": {"step": 1, "eval_loss": 3.0}}


def test_a_summary_that_is_a_fifo_is_replaced_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "summary.json")
    _Loop.note(types.SimpleNamespace(workdir=tmp_path, step=1), {"step": 1})
    assert (tmp_path / "summary.json").is_file()
