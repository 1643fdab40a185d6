"""Means over seeds: what may differ between their runs, and Student's interval."""

import copy

import pytest

from zoo.config import preset
from zoo.errors import UsageError
from zoo.evaluate import seeds, tasks


def configs(**changes):
    """Two runs of seeds 0 and 1, the second with other `changes`."""
    first = preset("tiny")
    second = copy.deepcopy(first)
    second.train.seed = 1
    for name, value in changes.items():
        section, _, field = name.partition("_of_")
        setattr(getattr(second, field), section, value)
    return {"a": first, "b": second}


def test_runs_that_differ_in_more_than_their_seed_are_refused():
    seeds.check(configs())
    seeds.check(configs(cache_dir_of_data="elsewhere"))
    with pytest.raises(UsageError, match="b differs from a in more than train.seed: model.d_model: 256 -> 64; eval"):
        seeds.check(configs(d_model_of_model=64))
    with pytest.raises(UsageError, match="two runs have train.seed = 0; expected another seed in each"):
        seeds.check(configs(seed_of_train=0))


def test_means_over_seeds_have_students_interval():
    result = {"accuracy": 0.9, "loss": 0.5}
    found = seeds.measured(tasks.TASKS["classes"], [result | {"accuracy": 0.9 + x} for x in (-0.01, 0.0, 0.01)])
    mean, half = 0.9, 4.302653 * 0.01 / 3**0.5  # the 97.5 % point of two degrees of freedom
    assert found["accuracy"][1:] == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert seeds.table("classes", found).rows[0] == ["accuracy", "0.9000", "0.8752 to 0.9248", "0.8900 to 0.9100"]
    assert found["loss (nats per row)"][1:] == (0.5, 0.5, 0.5)
    errors = {"mse": 1.0, "mae": 0.5, "mse_by_step": [0.1, 0.2, 0.3]}
    of_values = seeds.measured(tasks.TASKS["values"], [{"model": errors}, {"model": errors | {"mse": 3.0}}])
    assert of_values["mean squared error"].mean == 2 and of_values["mean squared error, step 3"].values == [0.3, 0.3]
