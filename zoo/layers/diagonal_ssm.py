"""A diagonal state-space model in continuous time, with its parameters (S4D, Gu et al. 2022, arXiv:2206.11893).

    dh/dt = A h + x,   y = 2 Re(c . h) + D x        sampled with a step dt of its own in each channel:

    zero-order hold   a = exp(dt A)                         b = B (a - 1) / A
    bilinear          a = (1 + dt A / 2) / (1 - dt A / 2)   b = B dt / (1 - dt A / 2)

B is 1, which loses nothing, since only B c counts; `train_b` makes it a parameter that starts there, as in H3's code.

A starts, for n = 0 ... N/2 - 1, at   lin: -1/2 + i pi n   inv: -1/2 + i (N / pi) (N / (2 n + 1) - 1)
and, for n = 0 ... N - 1, at   real: -(n + 1).   dt starts log-uniform between dt_min and dt_max, c and D normal.

Each channel has an A of its own, or `n_ssm` of them are shared in turn. With n_ssm=1, as in the authors' code for S4D
alone, channels differ in dt, c and D only.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from zoo import ops
from zoo.layers.parameter import parameter
from zoo.layers.step_size import check_steps, log_uniform
from zoo.settings import setting

INITS = ("lin", "inv", "real")
DISCRETIZATIONS = {"zoh": "zero-order hold", "bilinear": ""}


@dataclasses.dataclass
class DiagonalSSMConfig:
    state_dim: int = setting(64, "N, real numbers a channel, complex in pairs but for init=real", at_most=65_536)
    init: str = setting("lin", "where A starts", choices=INITS)
    discretization: str = setting("zoh", "how steps of dt are taken", choices=DISCRETIZATIONS)
    dt_min: float = setting(1e-3, "the smallest initial step size", at_least=1e-8, at_most=100)
    dt_max: float = setting(1e-1, "the largest initial step size", at_least=1e-8, at_most=100)
    n_ssm: int = setting(0, "different A, a divisor of the channels", zero="one for each channel")
    train_b: bool = setting(False, "B is a parameter beside c, without weight decay")


class DiagonalSSM(nnx.Module):
    """x, y: [B, T, channels]. State: h, complex64 [B, channels, N/2] (N with init=real)."""

    def __init__(self, channels: int, config: DiagonalSSMConfig, *, rngs: nnx.Rngs):
        self.channels, self.size = channels, _state_size(config)
        self.is_complex, self.discretization = config.init != "real", config.discretization
        n = np.arange(self.size)
        if config.init == "real":
            rate, frequency = n + 1.0, None
        elif config.init == "lin":
            rate, frequency = np.full(n.shape, 0.5), np.pi * n
        else:
            total = 2 * self.size
            rate, frequency = np.full(n.shape, 0.5), total / np.pi * (total / (2 * n + 1) - 1)

        different = config.n_ssm or channels

        def rows(values):
            return jnp.broadcast_to(jnp.asarray(values, jnp.float32), (different, self.size))

        of_A = {"axes": ("heads" if different == channels else "state", "state"), "decay": False}
        log_dt = jnp.log(log_uniform(rngs.params(), (channels,), config.dt_min, config.dt_max))
        self.log_dt = parameter(log_dt, ("heads",), decay=False)
        self.log_rate = parameter(rows(np.log(rate)), **of_A)  # Re A = -exp(log_rate)
        of_c = {"axes": ("heads", "state")}  # weight decay holds for c, as in the authors' code
        deviation = math.sqrt(0.5) if self.is_complex else 1.0
        self.c_real = parameter(deviation * jax.random.normal(rngs.params(), (channels, self.size)), **of_c)
        if self.is_complex:
            self.frequency = parameter(rows(frequency), **of_A)  # Im A
            self.c_imag = parameter(deviation * jax.random.normal(rngs.params(), (channels, self.size)), **of_c)
        self.b_real = parameter(rows(np.ones(n.shape)), **of_A) if config.train_b else None
        self.b_imag = parameter(rows(np.zeros(n.shape)), **of_A) if config.train_b and self.is_complex else None
        self.D = parameter(jax.random.normal(rngs.params(), (channels,)), ("heads",), decay=False)

    def __call__(self, x: jax.Array, *, segment_ids=None, state=None):
        log_a, b, c = self.discrete()
        return ops.diagonal_ssm(x, log_a, b, c, self.D[...], initial_state=state, segment_ids=segment_ids)

    def discrete(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """log a, b, c, complex64 [channels, size]."""
        rate, c = self.of_channels(-jnp.exp(self.log_rate[...])), self.c_real[...]
        frequency, c_imag = (0 * rate, 0 * c)
        if self.is_complex:
            frequency, c_imag = self.of_channels(self.frequency[...]), self.c_imag[...]
        A, c = jax.lax.complex(rate, frequency), jax.lax.complex(c, c_imag)
        dt = jnp.exp(self.log_dt[...])[:, None]
        if self.discretization == "zoh":
            log_a, b = dt * A, dt * _mean_of_exp(dt * A)
        else:
            log_a, b = jnp.log((1 + dt * A / 2) / (1 - dt * A / 2)), dt / (1 - dt * A / 2)
        if self.b_real is not None:
            imaginary = 0 if self.b_imag is None else 1j * self.b_imag[...]
            b = b * self.of_channels(self.b_real[...] + imaginary)
        return log_a, b, c

    def of_channels(self, values):
        """[different, size] -> [channels, size]."""
        return jnp.tile(values, (self.channels // len(values), 1))

    def init_state(self, batch_size: int) -> jax.Array:
        return jnp.zeros((batch_size, self.channels, self.size), jnp.complex64)

    @staticmethod
    def check(channels: int, config: DiagonalSSMConfig) -> list[str]:
        problems = check_steps(config)
        if config.n_ssm and channels % config.n_ssm:
            problems.append(f"n_ssm: got {config.n_ssm}, expected a divisor of the {channels} channels, or 0")
        if config.init != "real" and config.state_dim % 2:
            problems.append(f"state_dim: got {config.state_dim}, expected an even number (complex states are pairs)")
        return problems

    @staticmethod
    def num_parameters(channels: int, config: DiagonalSSMConfig) -> int:
        numbers = 1 if config.init == "real" else 2  # of A, of B, of c
        rows = (1 + config.train_b) * (config.n_ssm or channels) + channels
        return numbers * _state_size(config) * rows + 2 * channels

    @staticmethod
    def flops_per_token(channels: int, config: DiagonalSSMConfig) -> float:
        """Write and read of the complex state."""
        return 8.0 * channels * _state_size(config)


def _mean_of_exp(z: jax.Array) -> jax.Array:
    """(exp(z) - 1) / z, which is 1 at 0: of a state that neither decays nor turns."""
    small = jnp.abs(z) < 1e-4
    divisor = jnp.where(small, 1.0, z)
    return jnp.where(small, 1.0 + z / 2, jnp.expm1(divisor) / divisor)


def _state_size(config: DiagonalSSMConfig) -> int:
    return config.state_dim if config.init == "real" else config.state_dim // 2
