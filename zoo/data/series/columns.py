"""Columns of csv and parquet files as series.

    series?path=load.csv&time=date&columns=demand+temperature
    series?path=sensors/*.parquet

Each file is a series of its own; all have the same columns. With `time` a gap is where the next step is more than 1.5
times the usual distance away, the median; without, rows are taken for evenly spaced.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from zoo import files, lists
from zoo.data import corpora
from zoo.data.readers import read_errors
from zoo.data.series.windows import Series, Windows
from zoo.data.stored import source
from zoo.errors import UsageError
from zoo.settings import nearest, setting, shown
from zoo.terminal import one_line

GAP = 1.5  # times the usual distance


@dataclasses.dataclass
class Options:
    path: str = setting("", "the path or glob of .csv and .parquet")
    time: str = setting("", "the column of timestamps, or of numbers that grow")
    columns: str = setting(
        "", "those to predict, as in demand+temperature; empty: all that hold numbers", parse=lists.names
    )


@source("series", Options)
def series(config, options):
    if not options.path:
        raise UsageError("data.source: series needs a file, as in series?path=load.csv")
    paths = corpora.regular_files(options.path, "data.source", "the path or glob of .csv or .parquet files").values()
    return of_files("series", list(paths), options.columns, options.time, config)


def of_files(name: str, paths: list[str], columns: str, time: str, config) -> Windows:
    """The windows of some files' columns."""
    found = [read(path, lists.names(columns), time) for path in paths]
    length, horizon = config.train.context_length, config.model.horizon
    return Windows(name, found, length, horizon, config.data.validation_fraction)


def read(path: str, columns: list[str], time: str) -> Series:
    """One file.

    Raises:
      UsageError: it cannot be read, has no such columns, or a cell that is missing, or is no number; names its row (the
        first after the header is 1) and column.
    """
    name = one_line(path)
    table = _table(path)
    for column in [*columns, *filter(None, [time])]:
        if column not in table.column_names:
            near = nearest(column, table.column_names, 5)
            raise UsageError(f"{name}: no column {shown(column)}; nearest: {near}")
    if twice := {c for c in table.column_names if table.column_names.count(c) > 1}:
        raise UsageError(f"{name}: two columns are named {shown(min(twice))}; rename one")
    if table.num_rows == 0:
        raise UsageError(f"{name}: no rows; expected one for each step")
    chosen = columns or [c for c in table.column_names if c != time and _holds_numbers(table.column(c).type)]
    if not chosen:
        raise UsageError(f"{name}: no column holds numbers; name those to predict by the option columns=")
    values = np.stack([_numbers(name, column, table.column(column)) for column in chosen], axis=1)
    gaps = _gaps(name, time, _times(name, time, table.column(time))) if time else ()
    return Series(name, values, tuple(chosen), gaps)


def _table(path: str) -> pyarrow.Table:
    ending = path.lower().rpartition(".")[2]
    if ending not in ("csv", "parquet"):
        raise UsageError(f"{one_line(path)}: series are read from .csv and .parquet; convert it")
    with read_errors(path), files.open_regular(path) as file:
        if ending == "parquet":
            return pyarrow.parquet.ParquetFile(file).read()
        strings_too = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
        return pyarrow.csv.read_csv(file, convert_options=strings_too)


def _holds_numbers(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_decimal(kind)


def _numbers(name: str, column: str, cells: pyarrow.ChunkedArray) -> np.ndarray:
    """float64 [T]."""
    if not _holds_numbers(cells.type):
        row, value = next(_no_numbers(cells), (1, cells[0].as_py()))
        raise UsageError(f"{name}: row {row}, column {column!r}: got {shown(value)}, expected a number")
    if cells.null_count:
        row = pyarrow.compute.index(pyarrow.compute.is_null(cells), True).as_py() + 1
        raise UsageError(
            f"{name}: row {row}, column {column!r}: no number; fill it in, or leave the row out (with the option "
            "time=, what is missing is a gap that no window crosses)"
        )
    return cells.cast(pyarrow.float64(), safe=False).to_numpy()


def _no_numbers(cells: pyarrow.ChunkedArray) -> Iterator[tuple[int, object]]:
    """Rows, from 1, whose cell is no number."""
    for row, cell in enumerate(cells, 1):
        value = cell.as_py()
        with contextlib.suppress(TypeError, ValueError):
            float(value)
            continue
        yield row, value


def _times(name: str, column: str, cells: pyarrow.ChunkedArray) -> np.ndarray:
    """Numbers that grow with time, [T]."""
    kind = cells.type
    if not (pyarrow.types.is_timestamp(kind) or pyarrow.types.is_date(kind) or _holds_numbers(kind)):
        raise UsageError(
            f"{name}: row 1, column {column!r}: got {shown(cells[0].as_py())}, expected times as in 2012-01-31 or "
            "2012-01-31 13:30:00 in every row, or numbers"
        )
    if _holds_numbers(kind):
        return _numbers(name, column, cells)
    if cells.null_count:
        row = pyarrow.compute.index(pyarrow.compute.is_null(cells), True).as_py() + 1
        raise UsageError(f"{name}: row {row}, column {column!r}: no time; fill it in, or leave the row out")
    return cells.cast(pyarrow.timestamp("us", getattr(kind, "tz", None))).cast(pyarrow.int64()).to_numpy()


def _gaps(name: str, column: str, times: np.ndarray) -> tuple[int, ...]:
    """The steps before which others are missing."""
    distances = np.diff(times)
    if (distances <= 0).any():
        row = int(np.flatnonzero(distances <= 0)[0]) + 2
        raise UsageError(
            f"{name}: row {row}, column {column!r}: not later than the row before it; sort the file, and split one "
            "that holds several series, a file each"
        )
    usual = np.median(distances) if len(distances) else 0
    return tuple(int(row) + 1 for row in np.flatnonzero(distances > GAP * usual))
