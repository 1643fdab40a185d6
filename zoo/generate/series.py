"""A series rolled forward: a causal model with the head `values` reads the input once, and goes on from its state.

    block_0 = f(input),   block_i = f(input, block_0, ..., block_{i-1}),   f: the horizon after what was read

A model predicts its horizon at once; as many whole patches of it as there are (all of it, where model.patch divides
model.horizon) are read on, and the next horizon follows them. So a block is what the model predicts of a window that
ends where the block begins, for which it would read all of the window again.
"""

import csv
import functools
import io
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.array_typing import Array, Float
from zoo import files, memory
from zoo.checkpoints import Run
from zoo.data import row_batches
from zoo.errors import UsageError
from zoo.figures import Chart, Line
from zoo.heads import Values
from zoo.model import LanguageModel
from zoo.states import State
from zoo.terminal import one_line

STDOUT = "-"
_MOST_PANELS = 8  # channels that are drawn


def forecast(model: LanguageModel, values: Float[Array, "B T C"], steps: int) -> np.ndarray:
    """The `steps` after `values`, float32 [B, steps, C], in the units of `values`.

    Raises:
      UsageError: the model is not of series, or not causal; T is no number of whole patches; a horizon shorter than a
        patch, or positions that were not learned, do not reach so far; the states do not fit the memory.
    """
    reads = _check(model, values.shape[1], steps)
    head, positions = model.head, values.shape[1] // model.head.patch
    on = head.horizon // head.patch  # patches that are read on
    state = model.init_state(len(values), positions + (reads - 1) * on)
    graphdef, parameters = nnx.split(model)
    read, blocks = jnp.asarray(values, jnp.float32), []
    for i in range(reads):
        block, state = _read(graphdef, parameters, state, read)
        read = block[:, : on * head.patch]
        blocks.append(np.asarray(block if i == reads - 1 else read))
    return np.concatenate(blocks, axis=1)[:, :steps]


def _check(model: LanguageModel, length: int, steps: int) -> int:
    """How often a forecast reads."""
    head = model.head
    if not isinstance(head, Values):
        raise UsageError(f"model.head={head.name}: the model predicts no series; expected model.head=values")
    if not model.causal:
        raise UsageError(
            "model.direction is bidirectional: there is no state to go on from; a series is rolled forward by a model "
            "with model.direction=causal"
        )
    if length == 0 or length % head.patch:
        raise UsageError(f"input: {length} steps are no number of whole patches of {head.patch} (model.patch)")
    on = head.horizon // head.patch * head.patch
    if on == 0 and steps > head.horizon:
        raise UsageError(
            f"--horizon: the model predicts {head.horizon} steps at once and reads patches of {head.patch}, so that it "
            f"cannot go on from its own; use at most {head.horizon}"
        )
    reads = 1 + max(0, -(-(steps - head.horizon) // on)) if on else 1
    positions = length // head.patch + (reads - 1) * (on // head.patch)
    if model.learned_positions and positions > model.max_positions:
        most = head.horizon + (model.max_positions - length // head.patch) // (on // head.patch) * on
        raise UsageError(
            f"--horizon: {steps} steps need {positions} positions, and the model has learned {model.max_positions}; "
            f"use at most {most}"
        )
    return reads


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _read(graphdef: nnx.GraphDef, parameters: nnx.State, state: State, values: jax.Array) -> tuple[jax.Array, State]:
    """The horizon after `values`, which the state takes in."""
    model = nnx.merge(graphdef, parameters)
    hidden, state = model.hidden(model.head.patches(values), state=state)
    return model.head.after(hidden[:, -1], values[:, -1]), state


def command(run: Run, output: str | None, workdir: str, horizon: int | None, window: int) -> None:
    """`zoo.generate` of a run of series: a validation window's input, and what the model says comes after it.

    Writes a csv in the units of the series (a row a step, a column a channel, the truth beside, as far as it is known),
    and a plot beside it.
    """
    config, source = run.config, row_batches.find(run.config)
    steps = horizon or config.model.horizon
    if not -source.validation_rows <= window < source.validation_rows:
        raise UsageError(
            f"--window: got {window}, expected 0 to {source.validation_rows - 1}, the windows that validate, or "
            f"{-source.validation_rows} to -1, from the last"
        )
    window %= source.validation_rows
    length = source.length
    _check(run.model, length, steps)
    memory.check_state(run.model, 1, (length + steps) // config.model.patch + 1, "lower --horizon")
    given = source.validation_batch(window, window + 1)["values"][:, :length]
    units = functools.partial(_in_units, mean=source.mean, deviation=source.deviation)
    predicted = units(forecast(run.model, given, steps)[0])
    truth, read = units(source.after(window, steps)), units(given[0])
    columns = source.columns or tuple(f"channel {i}" for i in range(1, source.channels + 1))
    table = _csv(columns, predicted, truth)
    if output == STDOUT:
        sys.stdout.write(table)
        return
    path = pathlib.Path(output or pathlib.Path(workdir, "forecast.csv"))
    try:
        files.write(path, table)
        with files.replacing(path.with_suffix(".png")) as png:
            _draw(columns, read, predicted, truth, config.model.mixer, png)
    except OSError as error:
        raise UsageError(f"--output: cannot write {one_line(path)} ({error.strerror})") from error
    compared = len(truth)
    error = float(np.mean(((predicted[:compared] - truth) / source.deviation) ** 2))
    about = f"step {run.step}; {steps} steps after window {window}"
    print(f"{about}; mean squared error of {compared} of them, standardised: {error:.4f}", file=sys.stderr)
    print(one_line(f"written: {path}, {path.with_suffix('.png')}"), file=sys.stderr)


def _in_units(values: np.ndarray, *, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64) * deviation + mean


def _csv(columns: tuple[str, ...], predicted: np.ndarray, truth: np.ndarray) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *columns, *(f"{column} (truth)" for column in columns)])
    for step, row in enumerate(predicted):
        known = truth[step].tolist() if step < len(truth) else [None] * len(columns)
        writer.writerow([step + 1, *(f"{x:.6g}" for x in row), *("" if x is None else f"{x:.6g}" for x in known)])
    return text.getvalue()


def _draw(
    columns: tuple[str, ...], read: np.ndarray, predicted: np.ndarray, truth: np.ndarray, mixer: str, path: pathlib.Path
) -> None:
    from zoo import plots  # matplotlib, which few commands need

    panels = []
    for channel, column in enumerate(columns[:_MOST_PANELS]):
        drawn = {
            "truth": (np.concatenate([read, truth])[:, channel], 1),
            "predicted": (predicted[:, channel], 1 + len(read)),
        }
        lines = [Line(name, [*enumerate(y.tolist(), start)], mixer) for name, (y, start) in drawn.items()]
        marked = (len(read), "the input ends")
        panels.append(Chart(column, "step", "value", lines, log_x=False, marked=marked))
    plots.charts(panels, {mixer: mixer}, path)
