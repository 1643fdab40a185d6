"""What every op refuses, before anything is traced: one line that names the argument, what it is and what was expected.

Shapes of single arguments: test_dispatch.py.
"""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from kernels import attention, cross_entropy, dispatch, fast_weights, linear_attention
from tests.kernels.conformance import BATCH, CASES, TIME

OPS = {name.split("-")[0]: name for name in reversed(CASES)}  # one case each
STATEFUL = [name for name in OPS.values() if CASES[name].state]
DECAYS = {"selective_scan": "A", "diagonal_ssm": "log_a", "fast_weights": "value_log_decay"}


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch):
    """Annotations are not checked, and no implementation is reached."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(dispatch, "call", lambda *args, **kwargs: pytest.fail("not refused"))


def refused(name, inputs, *parts, segment_ids=None):
    op = next(op for op, case in OPS.items() if case == name)
    with pytest.raises(ValueError) as error:
        CASES[name].run(inputs, segment_ids)
    message = str(error.value)
    assert message.startswith(f"{op}: ") and "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("name", OPS.values(), ids=OPS)
def test_empty_axes(name):
    inputs = CASES[name].make(length=1)
    first = "v" if name.startswith(("linear_attention", "delta_rule", "dplr")) else CASES[name].over_time[0]
    for letter, here in (("B", (slice(0, 0),)), ("T", (slice(None), slice(0, 0)))):
        empty = {key: value[here] if key in CASES[name].over_time else value for key, value in inputs.items()}
        refused(name, empty, f"{first} has shape {empty[first].shape}", f"expected at least 1 along {letter}")


@pytest.mark.parametrize("name", OPS.values(), ids=OPS)
def test_segment_ids(name):
    inputs = CASES[name].make()
    refused(name, inputs, "segment_ids", f"({BATCH}, 7)", segment_ids=jnp.zeros((BATCH, 7), jnp.int32))
    refused(name, inputs, "segment_ids is float32, expected integers", segment_ids=jnp.zeros((BATCH, TIME)))


@pytest.mark.parametrize("name", OPS.values(), ids=OPS)
def test_dtypes(name):
    """Results are in the inputs' dtype: of integers they would be rounded."""
    for key, value in (inputs := CASES[name].make(length=1)).items():
        refused(name, inputs | {key: value.real.astype(jnp.int32)}, f"{key} is int32, expected", "floating point")


@pytest.mark.parametrize("name", STATEFUL)
def test_states(name):
    case, inputs = CASES[name], CASES[name].make(length=1)
    state = inputs.pop(case.state)
    refused(name, inputs | {case.state: state[..., :-1]}, case.state, str(state[..., :-1].shape), str(state.shape))
    token = {key: value[:, 0] if key in case.over_time else value for key, value in inputs.items()}
    for wrong, reason in ((state[:1], str(state[:1].shape)), (state.real.astype(jnp.int32), "is int32")):
        with pytest.raises(ValueError, match="state") as error:
            case.step(token, wrong)
        assert reason in str(error.value)


@pytest.mark.parametrize("name", [name for name in OPS.values() if CASES[name].gates or "ssm" in name or "sel" in name])
def test_growth_where_it_can_be_seen(name, monkeypatch):
    case, inputs = CASES[name], CASES[name].make(length=1)
    decay = DECAYS.get(name.split("-")[0], "log_decay")
    growing = inputs | {decay: inputs[decay].at[-1].set(0.125)}
    refused(name, growing, f"{decay} is up to 0.125, expected at most 0")
    with pytest.raises(ValueError, match="up to 0.125"):  # a constant of a traced function
        jax.eval_shape(lambda: case.run(growing))
    token = {key: value[:, 0] if key in case.over_time else value for key, value in growing.items()}
    state = token.pop(case.state)
    with pytest.raises(ValueError, match="up to 0.125"):
        case.step(token, state)
    for rate in {"dt", "beta"} & inputs.keys():
        refused(name, inputs | {rate: inputs[rate] - 100}, f"{rate} is down to -", "expected at least 0")
    monkeypatch.undo()
    jax.eval_shape(case.run, growing)  # cannot be seen: the caller's promise
    jax.eval_shape(lambda: case.run(inputs | {decay: inputs[decay].at[-1].set(3e-7)}))  # 0, rounded on the way


x, ids = jnp.zeros((1, 2, 2, 3)), jnp.zeros(2, jnp.int32)
OPTIONS = {
    "chunk_size": (lambda value: linear_attention(x, x, x, chunk_size=value), (0, -1, 2.5, True)),
    "window": (lambda value: attention(x, x, x, window=value), (0, 1.5)),
    "softcap": (lambda value: attention(x, x, x, softcap=value), (0.0, -1.0, float("nan"))),
    "scale": (lambda value: attention(x, x, x, scale=value), (float("nan"), float("inf"))),
    "scale of linear_attention": (lambda value: linear_attention(x, x, x, scale=value), (float("nan"),)),
    "scale of fast_weights": (lambda value: fast_weights(x, x, x, x, x, scale=value), (float("nan"),)),
    "softcap of cross_entropy": (
        lambda value: cross_entropy(x[0, 0], x[0, 0].T, ids, jnp.ones(2), softcap=value),
        (0.0, float("inf")),
    ),
    "chunk_size of cross_entropy": (
        lambda value: cross_entropy(x[0, 0], x[0, 0].T, ids, jnp.ones(2), chunk_size=value),
        (0, 1.0),
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    call, values = OPTIONS[option]
    for value in values:
        with pytest.raises(ValueError, match=f"{option.split()[0]} is {value}, expected"):
            call(value)


def test_dtypes_of_targets_and_positions():
    with pytest.raises(ValueError, match="targets is float32, expected integers"):
        cross_entropy(x[0, 0], x[0, 0].T, jnp.zeros(2), jnp.ones(2))
    with pytest.raises(ValueError, match="q_positions is float32, expected integers"):
        attention(x, x, x, q_positions=jnp.zeros((1, 2)))
