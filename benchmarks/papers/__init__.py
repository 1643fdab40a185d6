"""Published set-ups, run again: `python -m benchmarks.papers PAPER [--full]`.

h3: H3's two synthetic tasks (arXiv:2212.14052) at full budget: 5,000 training and 500 test rows, 2 layers of width 32,
  400 and 200 epochs, a tenth of them warm-up. As in the released code: LayerNorms, biases, MLPs without a gate (a gate
  is a product, the thing that S4D lacks), one A for all channels of S4D, initial matrices of std 0.02, weight decay on
  all but A, B and dt. Not as there: no dropout in attention, whose initial matrices are the model's own (std
  1 / sqrt(inputs)): from 0.02 it did not find induction heads in 400 epochs (one seed).
mamba_copying, mamba_induction: Mamba's tasks (arXiv:2312.00752) in reduced forms for a CPU: copying from 128 tokens
  (published: from 4096), 8 of them in width 32, or as published 16 in width 64; induction heads trained at 64 and
  tested up to 4096 (published: 256 and 2^20) in width 64. Fresh data, 2 layers without MLPs.
state_tracking: parity (arXiv:2411.12537) and word problems of S3, A5 and S5 (arXiv:2502.10297), in reduced forms for
  a CPU: trained on 32 and 16 tokens (published: up to 40, and 128) and tested there and at 4 times the length, on the
  state after the last token. One layer of width 64 with an MLP, fresh data, every token's state a target.
mqar: Zoology's multi-query associative recall (arXiv:2312.04927), every family by the size of its state.
mad: the six tasks of the MAD suite (arXiv:2403.17844), every family.
extrapolation: induction heads beyond the length of training (arXiv:2312.00752), every family.
encoders: classes of rows and series by softmax attention, its approximations and recurrences, both ways.

mqar, mad and extrapolation have a reduced form for a CPU, and the published one with --full; their modules say what
differs.

The test rows choose nothing: the last step's weights are tested, once. Where several learning rates are tried, seed 0
tries them all, rows of their own choose among them, and the other seeds have the one that was chosen. Medians over
seeds, with the range.

Each run is kept in benchmarks/results/ when it ends, with its date and machine, and is not repeated by the same command
(--again does): a table may be made in parts. Runs go side by side, one a core of those that the process may use; of
fewer runs than cores, each shares out its rows over several. A run's seconds are those of its group, divided among it.

    set_up          what is run
    h3, mamba ...   one module a paper
    row_task        a source of rows as a task
    models          the model and the optimizer of a set-up
    training        programs that train and test; synthetic_rows, source_rows: what on
    kept            runs that stand in benchmarks/results/
    report          tables, a plot and a page; encoder_report: of encoders
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

from benchmarks.papers import encoder_report, encoders, extrapolation, h3, mad, mamba, mqar, report, state_tracking
from benchmarks.papers.set_up import Setup


class Paper(NamedTuple):
    setups: Callable[[], Iterator[Setup]]
    full: Callable[[], Iterator[Setup]] | None = None  # as published, where `setups` are reduced
    report: ModuleType = report


PAPERS = {
    "h3": Paper(h3.setups),
    "mamba_copying": Paper(mamba.copying_setups),
    "mamba_induction": Paper(mamba.induction_setups),
    "state_tracking": Paper(state_tracking.setups),
    "mqar": Paper(mqar.setups, mqar.full_setups),
    "mad": Paper(mad.setups, mad.full_setups),
    "extrapolation": Paper(extrapolation.setups, extrapolation.full_setups),
    "encoders": Paper(encoders.setups, report=encoder_report),
}
