"""Series: windows within their part and between gaps, standardised on what trains; files, and what is refused."""

import datetime

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from zoo.config import Config
from zoo.data import rows
from zoo.data.series.generated import integrate_lorenz, integrate_mackey_glass
from zoo.data.series.windows import Series, Windows
from zoo.errors import UsageError


def make(spec, length=4, horizon=2, fraction=0.3):
    config = Config()
    config.train.context_length, config.data.validation_fraction = length, fraction
    config.model.horizon = horizon
    name, _, options = spec.partition("?")
    return rows.SOURCES[name](config, options)


def counting(steps, gaps=(), name="some", start=0):
    """A series whose numbers are its steps."""
    return Series(name, np.arange(start, start + steps, dtype=np.float64)[:, None], ("x",), gaps)


def all_windows(source):
    """The first column of every window of each part, whole numbers, [n, input + horizon]."""
    found = {}
    for part, count in (("train", source.train_rows), ("validation", source.validation_rows)):
        values = source.take(part, range(count))["values"][..., 0].astype(np.float64)
        found[part] = np.rint(values * source.deviation[0] + source.mean[0]).astype(int)
    return found


def test_windows_cross_neither_the_split_nor_a_gap_nor_the_end_of_a_series():
    source = Windows("some", [counting(40, gaps=(9, 33)), counting(20, start=100)], 4, 2, 0.3)
    train, validation = all_windows(source).values()
    spans = [(0, 9), (9, 28), (100, 114)], [(28, 33), (33, 40), (114, 120)]  # 30 % of 40 and of 20 validate
    for windows, parts in zip((train, validation), spans, strict=True):
        expected = [range(at, at + 6) for first, last in parts for at in range(first, last - 5)]
        assert np.array_equal(windows, [list(each) for each in expected])
    assert source.train_rows == len(train) == 4 + 14 + 9
    for row, steps in enumerate((range(37, 40), range(38, 40), range(118, 120))):  # what follows does not, either
        after = source.after(row, 3)[:, 0] * source.deviation[0] + source.mean[0]
        assert np.rint(after).astype(int).tolist() == [*steps]


def test_numbers_are_standardised_on_what_trains():
    draws = np.random.default_rng(0)
    values = np.concatenate([draws.normal(5, 3, (70, 2)), draws.normal(100, 50, (30, 2))])
    source = Windows("some", [Series("some", values, ("a", "b"))], 4, 2, 0.3)
    expected = (values - values[:70].mean(0)) / values[:70].std(0)
    got = source.validation_batch(0, 25)["values"]
    assert got.dtype == np.float32 and got.shape == (25, 6, 2)
    np.testing.assert_allclose(got[3], expected[73:79], rtol=1e-5)
    changed = values.copy()
    changed[70:] *= 3  # what validates moves nothing that trains
    other = Windows("some", [Series("some", changed, ("a", "b"))], 4, 2, 0.3)
    assert np.array_equal(other.train_batch(0, 0, 65)["values"], source.train_batch(0, 0, 65)["values"])


def test_batches_follow_from_seed_and_step():
    source = Windows("some", [counting(40)], 4, 2, 0.3)
    first = source.train_batch(1, 3, 5)["values"]
    assert np.array_equal(first, source.train_batch(1, 3, 5)["values"])
    assert not np.array_equal(first, source.train_batch(2, 3, 5)["values"])
    ten = source.train_batch(1, 1, 10)["values"]
    assert np.array_equal(first, ten[5:])  # rows 15 to 19 of the order, whatever the batch


@pytest.mark.parametrize(
    "series, said",
    [
        ([counting(5)], "some: 5 steps are fewer than one window of 6"),
        ([counting(12)], r"no validation window of 4 \+ 2 steps"),
        ([counting(40, gaps=tuple(range(0, 28, 5)))], r"no train window of 4 \+ 2 steps"),
        ([counting(40), Series("other", np.zeros((40, 1)), ("y",))], "other: columns y, and some has x"),
        ([Series("some", np.ones((40, 1)), ("x",))], "column 'x' is 1 at every step that trains"),
        ([Series("some", np.r_[np.arange(30.0), np.inf, 3][:, None], ("x",))], "some: row 31, column 'x': got inf"),
    ],
)
def test_bad_series_are_refused(series, said):
    with pytest.raises(UsageError, match=said):
        Windows("some", series, 4, 2, 0.3)


def write_csv(path, steps, *, missing=(), cell=None):
    """Half-hours of two columns; `missing`: rows left out; `cell`: the text of `b` in row 7."""
    lines, start = ["date,a,note,b"], datetime.datetime(2020, 2, 28, 22)
    for i in range(steps):
        if i not in missing:
            b = cell if cell is not None and i == 6 else i * i
            lines.append(f"{start + datetime.timedelta(minutes=30 * i)},{i},word,{b}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv_and_parquet_are_read_alike_and_missing_rows_are_gaps(tmp_path):
    path = write_csv(tmp_path / "a.csv", 40, missing=(9, 10))
    source = make(f"series?path={path}&time=date")
    assert source.columns == ("a", "b") and (source.channels, source.input, source.horizon) == (2, 4, 2)
    windows = all_windows(source)
    assert windows["train"][:, 0].tolist() == [0, 1, 2, 3, *range(11, 24)]  # 38 rows, of which 27 train: up to step 28
    assert (np.diff(windows["train"], axis=1) == 1).all()
    table = pyarrow.csv.read_csv(path)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    other = make(f"series?path={tmp_path / 'a.parquet'}&time=date")
    assert np.array_equal(other.validation_batch(0, 5)["values"], source.validation_batch(0, 5)["values"])
    one = make(f"series?path={path}&columns=b")
    assert one.columns == ("b",) and one.train_rows > source.train_rows  # without times no gap is seen


@pytest.mark.parametrize(
    "options, cell, said",
    [
        ("", "", r"a.csv: row 7, column 'b': no number"),
        ("", "NaN", r"a.csv: row 7, column 'b': no number"),
        ("&columns=b", "x7", "a.csv: row 7, column 'b': got 'x7', expected a number"),
        ("&columns=a+c", None, "a.csv: no column 'c'; nearest"),
        ("&columns=note", None, "a.csv: row 1, column 'note': got 'word', expected a number"),
        ("&time=note", None, "a.csv: row 1, column 'note': got 'word', expected times"),
        ("&columns=a,,b", None, "columns: got 'a,,b', expected different names"),
    ],
)
def test_bad_cells_and_columns_are_named(tmp_path, options, cell, said):
    path = write_csv(tmp_path / "a.csv", 40, cell=cell)
    with pytest.raises(UsageError, match=said):
        make(f"series?path={path}{options}")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="series needs a file"):
        make("series")
    (tmp_path / "a.txt").write_text("a\n1\n")
    with pytest.raises(UsageError, match="a.txt: series are read from .csv and .parquet"):
        make(f"series?path={tmp_path / 'a.txt'}")
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(UsageError, match="b.parquet: cannot be read"):
        make(f"series?path={tmp_path / 'b.parquet'}")
    path = write_csv(tmp_path / "back.csv", 40)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], lines[5], *lines[20:]]) + "\n")
    with pytest.raises(UsageError, match="back.csv: row 20, column 'date': not later than the row before it"):
        make(f"series?path={path}&time=date")
    write_csv(tmp_path / "one.csv", 40)
    (tmp_path / "two.csv").write_text("a,c\n" + "1,2\n" * 40)
    with pytest.raises(UsageError, match="two.csv: columns a, c, and .*one.csv has a, b"):
        make(f"series?path={tmp_path}/[ot]*.csv")


def test_shipped_series_are_found_without_importing_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "tsdata" / "fpp3"
    folder.mkdir(parents=True)
    (tmp_path / "tsdata" / "__init__.py").write_text("raise RuntimeError\n")
    times = [f"2012-01-{1 + i // 48:02}T{i % 48 // 2:02}:{i % 2 * 30:02}:00Z" for i in range(96)]
    lines = [f"{time},{i},{i % 7},{time[:10]},TRUE" for i, time in enumerate(times)]
    (folder / "vic_elec.csv").write_text("\n".join(["Time,Demand,Temperature,Date,Holiday", *lines]) + "\n")
    (tmp_path / "tsdata" / "other").mkdir()
    (tmp_path / "tsdata" / "other" / "vic_elec.csv").write_text("ds,y\n2012-01-01,1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = make("tsdata")
    assert source.columns == ("Demand", "Temperature") and source.train_rows == 67 - 5
    with pytest.raises(UsageError, match="ships no 'vic'; nearest: vic_elec"):
        make("tsdata?name=vic")


def test_lorenz_and_mackey_glass_are_integrated_to_their_order():
    """Against far smaller steps, before chaos has its way; half a step of fourth order has a 16th of the error."""
    start = np.array([1.0, 1.0, 1.0])
    exact = integrate_lorenz(40, start=start, substeps=80)
    errors = [np.abs(integrate_lorenz(40, start=start, substeps=n) - exact).max() for n in (2, 4)]
    assert errors[1] < 1e-4 and errors[0] / errors[1] > 12
    exact = integrate_mackey_glass(60, start=0.8, substeps=80)
    errors = [np.abs(integrate_mackey_glass(60, start=0.8, substeps=n) - exact).max() for n in (2, 10)]
    assert errors[1] < 1e-5 and errors[0] > errors[1]


def test_generated_series_stay_on_their_attractors():
    lorenz = make("lorenz?steps=3000", 16, 8)
    assert lorenz.channels == 3 and lorenz.fingerprint != make("lorenz?steps=3000&seed=1", 16, 8).fingerprint
    np.testing.assert_allclose(lorenz.mean, [0, 0, 23.5], atol=2.5)
    np.testing.assert_allclose(lorenz.deviation, [7.9, 9.0, 8.6], atol=0.8)
    glass = make("mackey_glass?steps=2000", 16, 8)
    np.testing.assert_allclose([glass.mean[0], glass.deviation[0]], [0.92, 0.23], atol=0.03)
