import pytest

from zoo.config import OptimizerConfig
from zoo.training.schedules import schedule, shortening

STEPS = 100


def rate(name, update, **settings):
    """The factor on the learning rate at the `update`-th update, counted from 1."""
    config = OptimizerConfig(schedule=name, learning_rate=1.0, warmup_steps=10, final_fraction=0.2, **settings)
    return float(schedule(config, STEPS)(update - 1))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_learning_rate(name):
    assert [rate(name, n) for n in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    "name, update, expected",
    [
        ("cosine", 55, 0.6),
        ("cosine", 32, 0.2 + 0.8 * 0.8597),  # a little over a quarter of the way: (1 + cos(pi 22 / 90)) / 2
        ("cosine", 100, 0.2),
        ("linear", 55, 0.6),
        ("linear", 100, 0.2),
        ("wsd", 80, 1.0),  # a fifth of the steps decays
        ("wsd", 90, 0.6),
        ("wsd", 100, 0.2),
        ("constant", 100, 1.0),
        ("cosine", 150, 0.2),  # beyond the end it stays
    ],
)
def test_shape(name, update, expected):
    assert rate(name, update) == pytest.approx(expected, abs=1e-4)


def test_wsd_decays_over_decay_steps():
    assert [rate("wsd", n, decay_steps=40) for n in (60, 80, 100)] == pytest.approx([1.0, 0.6, 0.2])


def test_a_warm_up_longer_than_the_run_takes_a_tenth_of_it():
    config = OptimizerConfig(schedule="constant", learning_rate=1.0, warmup_steps=101)
    assert [float(schedule(config, 100)(n - 1)) for n in (5, 10, 11)] == pytest.approx([0.5, 1.0, 1.0])
    assert float(schedule(config, 101)(4)) == pytest.approx(5 / 101)  # as long as the run: as asked for
    assert float(schedule(config, 4)(0)) == 1.0  # a tenth of four steps is none
    assert shortening(config, 101) == "" and "10 steps" in shortening(config, 100)
    assert config.warmup_steps == 101  # what config.json keeps, for when the run is extended


def test_no_warm_up_starts_at_the_learning_rate():
    assert float(schedule(OptimizerConfig(warmup_steps=0, learning_rate=2.0), STEPS)(0)) == pytest.approx(2.0, rel=1e-3)
