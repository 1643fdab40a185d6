"""A synthetic task has no bytes of text: no bits per byte anywhere."""

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
        evaluate=lambda params, batch: {"nats": 8.0, "tokens": 4.0, "bytes": batch["bytes"].sum()}, put=lambda b: b
    )
    writer = types.SimpleNamespace(plot=lambda: None)
    loop = types.SimpleNamespace(
        validation=validation_batches(config), config=config, programs=programs, step=3,
        state=types.SimpleNamespace(params=None), tokens_per_step=10, seconds=1.0, writer=writer,
        _write=rows.append, progress=ProgressLine(0, 5),
    )  # fmt: skip
    assert _Loop._evaluate(loop, 1) == 2.0
    assert rows == [{"step": 3, "eval_loss": 2.0, "eval_tokens": 4, "tokens": 30, "seconds": 1.0}]
    assert capsys.readouterr().out == "step 3  validation loss 2.0000  (4 tokens)\n"
    info = corpus_info(config)
    assert (info["validation_bytes"], info["gzip_bits_per_byte"]) == (0, None)


def test_what_the_console_says_is_neither_markup_nor_obeyed(capsys):
    ProgressLine(0, 5).say("corpus [red]:bug:\x1b[31m")
    assert capsys.readouterr().out == "corpus [red]:bug:\\x1b[31m\n"
