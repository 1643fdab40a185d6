"""The ops as the conformance suite sees them: named inputs, one call, and how to compare two results."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import (
    attention,
    delta_rule,
    delta_rule_step,
    diagonal_ssm,
    diagonal_ssm_step,
    dispatch,
    dplr_delta_rule,
    dplr_delta_rule_step,
    fast_weights,
    fast_weights_step,
    linear_attention,
    linear_attention_step,
    linear_scan,
    linear_scan_step,
    selective_scan,
    selective_scan_step,
    short_conv,
    short_conv_step,
)
from kernels.delta_rule.api import IMPLEMENTATIONS as DELTA_RULE
from kernels.diagonal_ssm.api import IMPLEMENTATIONS as DIAGONAL_SSM
from kernels.dplr_delta_rule.api import IMPLEMENTATIONS as DPLR_DELTA_RULE
from kernels.fast_weights.api import IMPLEMENTATIONS as FAST_WEIGHTS
from kernels.linear_attention.api import IMPLEMENTATIONS as LINEAR_ATTENTION
from kernels.linear_scan.api import IMPLEMENTATIONS as LINEAR_SCAN
from kernels.selective_scan.api import IMPLEMENTATIONS as SELECTIVE_SCAN
from kernels.short_conv.api import IMPLEMENTATIONS as SHORT_CONV
from tests.kernels import races

BATCH = 2  # sequences with segments of their own
TIME = 36  # tokens: two chunks and a part of one
CUT = TIME - 1  # where tests cut: one token is left, and no whole chunks before it
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one small shape, with one set of options.

    Attributes:
      op: calls the op: (inputs by name, segment_ids, implementation) -> (out, final state or None).
      inputs: (random generator, length) -> float inputs by name.
      implementations: the names to hold against `reference`.
      over_time: the inputs that have a time axis, axis 1.
      gates: the inputs whose bf16 gradients have the wider bound; they stay float32.
      state: name of the initial state among the inputs, or None.
      step: (inputs of one token, state) -> (out, state).
    """

    op: Callable
    inputs: Callable
    implementations: tuple[str, ...]
    over_time: tuple[str, ...]
    gates: tuple[str, ...] = ()
    state: str | None = None
    step: Callable | None = None
    float32_inputs: tuple[str, ...] = ()

    def make(self, length=TIME, seed=0):
        return self.inputs(np.random.default_rng(seed), length)

    def run(self, inputs, segment_ids=None, implementation=None):
        return self.op(inputs, segment_ids, implementation)


def here(table, interpreted=("mosaic_tpu",)):
    """The implementations in an op's table to hold against its reference on this device: `interpreted` are the kernels
    that a CPU can run."""
    device = dispatch.device()
    run = {"cpu": interpreted, "tpu": ("mosaic_tpu",), "gpu": ("mosaic_gpu",) if device.is_hopper else ()}
    elsewhere = {"mosaic_tpu", "mosaic_gpu"} - set(run[device.platform])
    return tuple(name for name in table if name not in elsewhere | {"reference"})


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def complex_normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape), jnp.complex64)


def log_gate(rng, *shape):
    """Log-decays from a strong to almost none."""
    return -jnp.exp(1.5 * normal(rng, *shape) - 1)


def _linear_attention(log_decay_dims, *, groups=2, with_bonus=False, heads=2, key_dim=5, value_dim=3):
    dims = {"H": heads, "K": key_dim, "B": BATCH}

    def inputs(rng, length):
        arrays = {
            "q": normal(rng, BATCH, length, groups, key_dim),
            "k": normal(rng, BATCH, length, groups, key_dim),
            "v": normal(rng, BATCH, length, heads, value_dim),
            "initial_state": normal(rng, BATCH, heads, key_dim, value_dim),
        }
        if log_decay_dims:
            arrays["log_decay"] = log_gate(rng, *(length if d == "T" else dims[d] for d in log_decay_dims))
        if with_bonus:
            arrays["bonus"] = normal(rng, heads, key_dim)
        return arrays

    def op(inputs, segment_ids, implementation):
        return linear_attention(**inputs, segment_ids=segment_ids, chunk_size=CHUNK, implementation=implementation)

    def step(inputs, state):
        return linear_attention_step(**inputs, state=state)

    gates = ("log_decay",) if log_decay_dims else ()
    return Case(
        op,
        inputs,
        here(LINEAR_ATTENTION),
        over_time=("q", "k", "v") + (gates if "T" in log_decay_dims else ()),
        gates=gates,
        state="initial_state",
        step=step,
        float32_inputs=("log_decay", "bonus", "initial_state"),
    )


def unit(rng, *shape):
    x = normal(rng, *shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _delta_rule(log_decay_dims, *, groups=2, heads=2, key_dim=5, value_dim=3):
    dims = {"H": heads, "K": key_dim, "B": BATCH}
    gates = ("beta", "log_decay") if log_decay_dims else ("beta",)

    def inputs(rng, length):
        arrays = {
            "q": normal(rng, BATCH, length, groups, key_dim),
            "k": unit(rng, BATCH, length, groups, key_dim),
            "v": normal(rng, BATCH, length, heads, value_dim),
            "beta": 2 * jax.nn.sigmoid(normal(rng, BATCH, length, heads)),
            "initial_state": normal(rng, BATCH, heads, key_dim, value_dim),
        }
        if log_decay_dims:
            arrays["log_decay"] = log_gate(rng, *(length if d == "T" else dims[d] for d in log_decay_dims))
        return arrays

    def op(inputs, segment_ids, implementation):
        return delta_rule(**inputs, segment_ids=segment_ids, chunk_size=CHUNK, implementation=implementation)

    return Case(
        op,
        inputs,
        here(DELTA_RULE),
        over_time=("q", "k", "v", *gates),
        gates=gates,
        state="initial_state",
        step=lambda inputs, state: delta_rule_step(**inputs, state=state),
        float32_inputs=(*gates, "initial_state"),
    )


def _dplr_delta_rule(heads=2, key_dim=5, value_dim=3):
    def inputs(rng, length):
        shape = (BATCH, length, heads, key_dim)
        kappa, rate = unit(rng, *shape), jax.nn.sigmoid(normal(rng, *shape))
        return {
            "q": normal(rng, *shape),
            "k": normal(rng, *shape),
            "v": normal(rng, BATCH, length, heads, value_dim),
            "a": -kappa,
            "b": kappa * rate,
            "log_decay": log_gate(rng, *shape),
            "initial_state": normal(rng, BATCH, heads, key_dim, value_dim),
        }

    def op(inputs, segment_ids, implementation):
        return dplr_delta_rule(**inputs, segment_ids=segment_ids, chunk_size=CHUNK, implementation=implementation)

    return Case(
        op,
        inputs,
        here(DPLR_DELTA_RULE),
        over_time=("q", "k", "v", "a", "b", "log_decay"),
        gates=("log_decay",),
        state="initial_state",
        step=lambda inputs, state: dplr_delta_rule_step(**inputs, state=state),
        float32_inputs=("log_decay", "initial_state"),
    )


def _fast_weights(heads=2, key_dim=5, value_dim=3):
    gates = ("key_log_decay", "value_log_decay")

    def inputs(rng, length):
        return {
            "q": normal(rng, BATCH, length, heads, key_dim),
            "k": normal(rng, BATCH, length, heads, key_dim),
            "v": normal(rng, BATCH, length, heads, value_dim),
            "key_log_decay": log_gate(rng, BATCH, length, heads, key_dim),
            "value_log_decay": log_gate(rng, BATCH, length, heads, value_dim),
            "initial_state": normal(rng, BATCH, heads, key_dim, value_dim),
        }

    def op(inputs, segment_ids, implementation):
        return fast_weights(**inputs, segment_ids=segment_ids, chunk_size=CHUNK, implementation=implementation)

    return Case(
        op,
        inputs,
        here(FAST_WEIGHTS),
        over_time=("q", "k", "v", *gates),
        gates=gates,
        state="initial_state",
        step=lambda inputs, state: fast_weights_step(**inputs, state=state),
        float32_inputs=(*gates, "initial_state"),
    )


def _linear_scan(x_normal, complex_decay, over_time, chunk_size=None, channels=4):
    def inputs(rng, length):
        shape = (BATCH, length, channels) if over_time else (channels,)
        log_decay = log_gate(rng, *shape)
        if complex_decay:
            log_decay = log_decay + 1j * normal(rng, *shape)
        state = (complex_normal if complex_decay else normal)(rng, BATCH, channels)
        return {"x": x_normal(rng, BATCH, length, channels), "log_decay": log_decay, "initial_state": state}

    def op(inputs, segment_ids, implementation):
        return linear_scan(**inputs, segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)

    return Case(
        op,
        inputs,
        here(LINEAR_SCAN),
        over_time=("x", "log_decay") if over_time else ("x",),
        gates=("log_decay",),
        state="initial_state",
        step=lambda inputs, state: linear_scan_step(**inputs, state=state),
        float32_inputs=("log_decay", "initial_state"),
    )


def _selective_scan(with_skip, channels=6, state_size=3, chunk_size=CHUNK):
    def inputs(rng, length):
        arrays = {
            "x": normal(rng, BATCH, length, channels),
            "dt": jnp.exp(normal(rng, BATCH, length, channels) - 1),
            "A": -jnp.exp(normal(rng, channels, state_size)),
            "B": normal(rng, BATCH, length, state_size),
            "C": normal(rng, BATCH, length, state_size),
            "initial_state": normal(rng, BATCH, channels, state_size),
        }
        return arrays | ({"D": normal(rng, channels)} if with_skip else {})

    def op(inputs, segment_ids, implementation):
        return selective_scan(**inputs, segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)

    return Case(
        op,
        inputs,
        here(SELECTIVE_SCAN, interpreted=("mosaic_tpu", "mosaic_gpu")),
        over_time=("x", "dt", "B", "C"),
        state="initial_state",
        step=lambda inputs, state: selective_scan_step(**inputs, state=state),
        float32_inputs=("dt", "A", "D", "initial_state"),
    )


def _diagonal_ssm(with_skip, channels=4, state_size=3, chunk_size=CHUNK):
    def inputs(rng, length):
        arrays = {
            "x": normal(rng, BATCH, length, channels),
            "log_a": log_gate(rng, channels, state_size) + 1j * normal(rng, channels, state_size),
            "b": complex_normal(rng, channels, state_size),
            "c": complex_normal(rng, channels, state_size),
            "initial_state": complex_normal(rng, BATCH, channels, state_size),
        }
        return arrays | ({"d": normal(rng, channels)} if with_skip else {})

    def op(inputs, segment_ids, implementation):
        return diagonal_ssm(**inputs, segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)

    return Case(
        op,
        inputs,
        here(DIAGONAL_SSM),
        over_time=("x",),
        state="initial_state",
        step=lambda inputs, state: diagonal_ssm_step(**inputs, state=state),
        float32_inputs=("d",),
    )


def _short_conv(taps, activation, with_bias, channels=4):
    def inputs(rng, length):
        arrays = {
            "x": normal(rng, BATCH, length, channels),
            "weight": normal(rng, channels, taps),
            "initial_state": normal(rng, BATCH, taps - 1, channels),
        }
        return arrays | ({"bias": normal(rng, channels)} if with_bias else {})

    def op(inputs, segment_ids, implementation):
        return short_conv(**inputs, activation=activation, segment_ids=segment_ids, implementation=implementation)

    return Case(
        op,
        inputs,
        here(SHORT_CONV),
        over_time=("x",),
        state="initial_state",
        step=lambda inputs, state: short_conv_step(**inputs, activation=activation, state=state),
    )


def _attention(heads=4, kv_heads=2, decay=False, **options):
    gates = ("log_decay",) if decay else ()

    def inputs(rng, length):
        arrays = {
            "q": normal(rng, BATCH, length, heads, 8),
            "k": normal(rng, BATCH, length, kv_heads, 8),
            "v": normal(rng, BATCH, length, kv_heads, 6),
        }
        return arrays | {gate: log_gate(rng, BATCH, length, heads) for gate in gates}

    def op(inputs, segment_ids, implementation):
        return attention(**inputs, **options, segment_ids=segment_ids, implementation=implementation), None

    # splash and cudnn need their devices: test_attention.py
    return Case(op, inputs, ("chunked",), over_time=("q", "k", "v", *gates), gates=gates, float32_inputs=gates)


CASES = {
    "linear_attention-no_decay": _linear_attention(""),
    "linear_attention-fixed": _linear_attention("H", groups=1),
    "linear_attention-scalar": _linear_attention("BTH", groups=1),
    "linear_attention-vector": _linear_attention("BTHK"),
    "linear_attention-scalar-bonus": _linear_attention("BTH", with_bonus=True),
    "linear_attention-vector-bonus": _linear_attention("BTHK", groups=1, with_bonus=True),
    "delta_rule-scalar": _delta_rule("BTH", groups=1),
    "delta_rule-no_decay": _delta_rule(""),
    "delta_rule-vector": _delta_rule("BTHK"),
    "dplr_delta_rule": _dplr_delta_rule(),
    "fast_weights": _fast_weights(),
    "linear_scan-real": _linear_scan(normal, complex_decay=False, over_time=True),
    "linear_scan-real-chunks": _linear_scan(normal, complex_decay=False, over_time=True, chunk_size=CHUNK),
    "linear_scan-fixed": _linear_scan(normal, complex_decay=False, over_time=False),
    "linear_scan-complex": _linear_scan(complex_normal, complex_decay=True, over_time=True),
    "linear_scan-complex-fixed-chunks": _linear_scan(normal, complex_decay=True, over_time=False, chunk_size=CHUNK),
    "selective_scan": _selective_scan(with_skip=False),
    "selective_scan-skip": _selective_scan(with_skip=True),
    "diagonal_ssm": _diagonal_ssm(with_skip=False),
    "diagonal_ssm-skip": _diagonal_ssm(with_skip=True),
    "short_conv-2": _short_conv(2, None, with_bias=False),
    "short_conv-4-silu": _short_conv(4, "silu", with_bias=True),
    "attention-causal": _attention(),
    "attention-window": _attention(window=5),
    "attention-softcap": _attention(kv_heads=4, softcap=2.0, scale=1.0),
    "attention-decay": _attention(decay=True),
}
if dispatch.device().is_hopper:  # `mosaic_gpu` has these widths only, and bfloat16 only: the other tests skip it
    CASES["linear_attention-scalar-wide"] = _linear_attention("BTH", groups=1, key_dim=64, value_dim=64)
    CASES["linear_attention-vector-wide"] = _linear_attention("BTHK", key_dim=64, value_dim=128)
    CASES["delta_rule-scalar-wide"] = _delta_rule("BTH", groups=1, key_dim=64, value_dim=64)
    CASES["delta_rule-vector-wide"] = _delta_rule("BTHK", key_dim=64, value_dim=128)
    CASES["dplr_delta_rule-wide"] = _dplr_delta_rule(key_dim=64, value_dim=128)
# With the slow tests: forms that no family runs, a bonus beside a decay a head and Mamba without its skip; and no
# decay, which most forms of the delta rule take for one of 0.
RARE = {"linear_attention-scalar-bonus", "selective_scan", "delta_rule-no_decay"}
OPTIONAL = {"jla"}  # not installed everywhere; all others are held to all of their cases
RACES = "mosaic_tpu-races"  # the kernels for TPUs, interpreted as `races.checked` says


@functools.cache
def supported(name, implementation):
    """Whether `implementation` takes the case on this machine. What it refuses, it refuses while it is traced."""
    if implementation not in OPTIONAL:
        return True
    try:
        jax.eval_shape(lambda: CASES[name].run(CASES[name].make(), None, implementation))
    except NotImplementedError:
        return False
    return True


def pairs(keep=lambda case: True):
    """(case, implementation) as parameters of a test."""
    for name, case in CASES.items():
        if keep(case):
            for each in filter(functools.partial(supported, name), case.implementations):
                interpreted = each == "mosaic_gpu" and not dispatch.device().is_hopper
                yield pytest.param(name, each, marks=[pytest.mark.slow] * (interpreted or name in RARE))
            if "mosaic_tpu" in case.implementations:
                yield pytest.param(name, RACES, marks=pytest.mark.slow)


PAIRS = list(pairs())
STATEFUL = list(pairs(lambda case: case.state))
GATED = list(pairs(lambda case: case.gates))


@functools.cache
def compiled(name, implementation):
    """(inputs, segment_ids, cotangents) -> (out, final state), gradients by name. One jit for all tests of a shape."""
    case = CASES[name]

    @jax.jit
    def results(inputs, segment_ids, cotangents):
        called = "mosaic_tpu" if implementation == RACES else implementation
        values, pull = jax.vjp(lambda inputs: case.run(inputs, segment_ids, called), inputs)
        return values, pull(cotangents)[0]

    def results_without_races(*args):
        with races.checked():
            return jax.block_until_ready(results(*args))

    def results_or_skip(*args):
        try:
            return results(*args)
        except NotImplementedError as error:
            pytest.skip(str(error))

    return {RACES: results_without_races, "mosaic_gpu": results_or_skip}.get(implementation, results)


def results(name, implementation, inputs, segment_ids=None, seed=1):
    """Values and gradients of `implementation`, against random cotangents of the output and the final state.

    Without ids all tokens are one segment, by ids that say so: the program is that of packed rows. Calls without ids
    (`compiled`) are held to it by `test_a_long_call_and_one_token_more_are_one_call`.
    """
    length = inputs[CASES[name].over_time[0]].shape[1]
    segment_ids = jnp.ones((BATCH, length), jnp.int32) if segment_ids is None else segment_ids
    return compiled(name, implementation)(inputs, segment_ids, cotangents(name, inputs, seed))


def cotangents(name, inputs, seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda inputs: CASES[name].run(inputs, None, "reference"), inputs)

    def draw(x):
        values = (
            complex_normal(rng, *x.shape) if jnp.issubdtype(x.dtype, jnp.complexfloating) else normal(rng, *x.shape)
        )
        return values.astype(x.dtype)

    return jax.tree.map(draw, shapes)


def error_ratio(actual, expected):
    """Root mean square of the difference over that of what was expected."""
    actual, expected = (np.asarray(x).astype(np.complex128) for x in (actual, expected))
    assert actual.shape == expected.shape
    difference = np.sqrt(np.mean(np.abs(actual - expected) ** 2)) if actual.size else 0.0
    scale = np.sqrt(np.mean(np.abs(expected) ** 2)) if actual.size else 0.0
    return difference / scale if scale else difference


def assert_close(actual, expected, *, values=1e-6, gradients=1e-5):
    """Compare what `results` returns: every output and every gradient."""
    ratios = {"out": error_ratio(actual[0][0], expected[0][0])}
    if expected[0][1] is not None:
        ratios["final_state"] = error_ratio(actual[0][1], expected[0][1])
    assert all(ratio < values for ratio in ratios.values()), ratios
    ratios = {name: error_ratio(actual[1][name], gradient) for name, gradient in expected[1].items()}
    assert all(ratio < gradients for ratio in ratios.values()), ratios


def random_segments(length=TIME, seed=2):
    """Ids of segments of random lengths, 1 among them; an id comes back later in the row. Row 0 ends in 2 tokens."""
    starts = np.random.default_rng(seed).random((BATCH, length)) < 0.25
    starts[0, -2:] = True, False
    return jnp.asarray(np.cumsum(starts, axis=1) % 3, jnp.int32)
