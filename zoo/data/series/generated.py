"""Two chaotic systems, integrated by the classical Runge-Kutta method of fourth order.

mackey_glass    x' = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x        (Mackey & Glass 1977)
                A step is one unit of time; chaotic from about tau = 17 on.
lorenz          x' = 10 (y - x),  y' = x (28 - z) - y,  z' = x y - 8/3 z     (Lorenz 1963)
                A step is 0.02 units of time; the largest Lyapunov exponent is 0.9 a unit.

The first thousand steps, which depend on where it starts, are left out.
"""

import dataclasses

import numpy as np

from zoo.data.series.windows import Series, Windows
from zoo.data.stored import source
from zoo.settings import setting

TRANSIENT = 1000  # steps


@dataclasses.dataclass
class LorenzOptions:
    steps: int = setting(10_000, "of the series", unit="step", at_most=1_000_000)
    seed: int = setting(0, "of where it starts", at_least=0)


@dataclasses.dataclass
class MackeyGlassOptions(LorenzOptions):
    tau: int = setting(17, "the delay", unit="step", at_most=1000)


@source("mackey_glass", MackeyGlassOptions)
def mackey_glass(config, options):
    values = integrate_mackey_glass(options.steps + TRANSIENT, options.tau, start=_start(options.seed, 1)[0])
    return _windows(config, "mackey_glass", values[TRANSIENT:, None], ("x",))


@source("lorenz", LorenzOptions)
def lorenz(config, options):
    values = integrate_lorenz(options.steps + TRANSIENT, start=_start(options.seed, 3))
    return _windows(config, "lorenz", values[TRANSIENT:], ("x", "y", "z"))


def _windows(config, name, values, columns):
    length, horizon = config.train.context_length, config.model.horizon
    return Windows(name, [Series(name, values, columns)], length, horizon, config.data.validation_fraction)


def _start(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, size)


def integrate_mackey_glass(steps: int, tau: int = 17, *, start: float = 1.2, substeps: int = 10) -> np.ndarray:
    """x at the times 0, 1, ..., float64 [steps]; before 0 it is `start`. Half-way between two points of the grid the
    past is the cubic through both and their slopes."""
    h, delay = 1 / substeps, tau * substeps
    start = float(start)
    xs, slopes = [start] * (delay + 1), [0.0] * (delay + 1)  # up to the time 0

    def slope(x, past):
        return 0.2 * past / (1 + past**10) - 0.1 * x

    x = start
    for _ in range((steps - 1) * substeps):
        before, after = xs[-delay - 1], xs[-delay]
        middle = (before + after) / 2 + h / 8 * (slopes[-delay - 1] - slopes[-delay])
        k1 = slopes[-1] = slope(x, before)
        k2 = slope(x + h / 2 * k1, middle)
        k3 = slope(x + h / 2 * k2, middle)
        k4 = slope(x + h * k3, after)
        x += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        xs.append(x)
        slopes.append(0.0)  # known when the next step begins
    return np.array(xs[delay::substeps])


def integrate_lorenz(steps: int, *, start: np.ndarray, substeps: int = 4, time: float = 0.02) -> np.ndarray:
    """The state at the times 0, `time`, ..., float64 [steps, 3]."""
    h, found = time / substeps, [tuple(map(float, start))]

    def slope(x, y, z):
        return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z

    def moved(state, by, k):
        return tuple(a + by * b for a, b in zip(state, k, strict=True))

    for _ in range(steps - 1):
        state = found[-1]
        for _ in range(substeps):
            k1 = slope(*state)
            k2 = slope(*moved(state, h / 2, k1))
            k3 = slope(*moved(state, h / 2, k2))
            k4 = slope(*moved(state, h, k3))
            state = tuple(
                s + h / 6 * (a + 2 * b + 2 * c + d) for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
            )
        found.append(state)
    return np.array(found)
