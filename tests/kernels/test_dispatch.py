"""Which implementation runs, why one cannot, and what a wrong shape is told."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from kernels import (
    attention,
    cross_entropy,
    dispatch,
    linear_attention,
    linear_scan,
    linear_scan_step,
    short_conv,
    short_conv_step,
)


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def refuse(reason):
    def implementation(*args, **kwargs):
        raise NotImplementedError(reason)

    return implementation


TABLE = {"fast": refuse("too long"), "small": refuse("too wide"), "plain": lambda x: x + 1}


def test_the_first_that_supports_the_call_runs():
    assert dispatch.call("op", TABLE, None, ["fast", "small", "plain"], 1) == 2
    assert dispatch.call("op", TABLE, ["small", "plain"], ["fast"], 1) == 2


def test_a_name_means_this_or_an_error():
    with pytest.raises(NotImplementedError, match="op: no implementation supports this call. fast: too long"):
        dispatch.call("op", TABLE, "fast", ["plain"], 1)


def test_the_reasons_of_all_are_kept():
    with pytest.raises(NotImplementedError, match="fast: too long; small: too wide"):
        dispatch.call("op", TABLE, None, ["fast", "small"], 1)


def test_another_error_is_not_a_reason_to_go_on():
    def broken(x):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        dispatch.call("op", TABLE | {"broken": broken}, None, ["broken", "plain"], 1)


def test_a_package_that_is_not_installed_is_a_reason_that_names_the_extra():
    table = {"theirs": lambda: dispatch.optional("no_such_package.ops", extra="theirs"), "plain": lambda: 1}
    with pytest.raises(NotImplementedError, match=r"theirs: No module .*no_such_package.*sequence-zoo\[theirs\]"):
        dispatch.call("op", table, "theirs", [])
    assert dispatch.call("op", table, ["theirs", "plain"], []) == 1


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="linear_scan: unknown implementation 'mosaic'; expected one of .*chunked"):
        linear_scan(zeros(1, 4, 2), zeros(2), implementation="mosaic")


def test_the_device_is_the_default_or_the_one_set():
    assert dispatch.device().platform == jax.devices()[0].platform
    hopper = dispatch.Device("gpu", "NVIDIA H100 80GB HBM3")
    with dispatch.use_device(hopper):
        assert dispatch.device() == hopper and hopper.is_hopper
    assert not dispatch.Device("gpu", "NVIDIA A100-SXM4-80GB").is_hopper
    assert dispatch.device().platform == jax.devices()[0].platform


qkv = zeros(2, 8, 4, 16), zeros(2, 8, 2, 16), zeros(2, 8, 2, 16)
WRONG_SHAPES = {
    "scan_rank": (lambda: linear_scan(zeros(8, 3), zeros(3)), "x", [(8, 3), "[B T D]"]),
    "scan_decay": (lambda: linear_scan(zeros(2, 8, 3), zeros(2, 8, 4)), "log_decay", [(2, 8, 4), (2, 8, 3)]),
    "scan_state": (
        lambda: linear_scan(zeros(2, 8, 3), zeros(3), initial_state=zeros(3, 2)),
        "initial_state",
        [(3, 2), (2, 3)],
    ),
    "scan_segments": (
        lambda: linear_scan(zeros(2, 8, 3), zeros(3), segment_ids=zeros(2, 7, dtype=jnp.int32)),
        "segment_ids",
        [(2, 7), (2, 8)],
    ),
    "scan_step": (lambda: linear_scan_step(zeros(2, 3), zeros(3), state=zeros(2, 4)), "state", [(2, 4), (2, 3)]),
    "conv_weight": (lambda: short_conv(zeros(2, 8, 3), zeros(4, 3)), "weight", [(4, 3), (2, 8, 3)]),
    "conv_bias": (lambda: short_conv(zeros(2, 8, 3), zeros(3, 4), zeros(4)), "bias", [(4,), (2, 8, 3)]),
    "conv_state": (
        lambda: short_conv(zeros(2, 8, 3), zeros(3, 4), initial_state=zeros(2, 4, 3)),
        "initial_state",
        [(2, 4, 3), (2, 3, 3)],
    ),
    "conv_step": (lambda: short_conv_step(zeros(2, 3), zeros(3, 4), state=zeros(2, 2, 3)), "state", [(2, 2, 3)]),
    "attention_k": (lambda: attention(qkv[0], zeros(2, 8, 2, 8), qkv[2]), "k", [(2, 8, 2, 8), (2, 8, 4, 16)]),
    "attention_v": (lambda: attention(*qkv[:2], zeros(2, 9, 2, 16)), "v", [(2, 9, 2, 16), (2, 8, 2, 16)]),
    "attention_heads": (
        lambda: attention(qkv[0], zeros(2, 8, 3, 16), zeros(2, 8, 3, 16)),
        "k",
        [(2, 8, 3, 16), (2, 8, 4, 16)],
    ),
    "attention_positions": (
        lambda: attention(*qkv, q_positions=zeros(2, 7, dtype=jnp.int32)),
        "q_positions",
        [(2, 7), (2, 8)],
    ),
    "attention_decay": (
        lambda: attention(*qkv, log_decay=zeros(2, 8, 3)),
        "log_decay",
        [(2, 8, 3), (2, 8, 4), (2, 8, 4, 16)],
    ),
    "linear_attention_k": (
        lambda: linear_attention(qkv[0], zeros(2, 8, 4, 5), qkv[0]),
        "k",
        [(2, 8, 4, 5), (2, 8, 4, 16)],
    ),
    "linear_attention_decay": (
        lambda: linear_attention(qkv[0], qkv[0], qkv[0], zeros(2, 8, 3)),
        "log_decay",
        [(2, 8, 3), (2, 8, 4)],
    ),
    "linear_attention_state": (
        lambda: linear_attention(qkv[0], qkv[0], qkv[0], initial_state=zeros(2, 4, 16, 8)),
        "initial_state",
        [(2, 4, 16, 8), (2, 4, 16, 16)],
    ),
    "cross_entropy_head": (
        lambda: cross_entropy(zeros(5, 3), zeros(4, 7), zeros(5, dtype=jnp.int32), zeros(5)),
        "head",
        [(4, 7), (5, 3)],
    ),
    "cross_entropy_targets": (
        lambda: cross_entropy(zeros(5, 3), zeros(3, 7), zeros(4, dtype=jnp.int32), zeros(5)),
        "targets",
        [(4,), (5,)],
    ),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_a_wrong_shape_names_the_argument_and_both_shapes(case, monkeypatch):
    call, argument, shapes = WRONG_SHAPES[case]
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run: annotations are not checked
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert argument in message.split(":", 1)[-1] or message.startswith(argument), message
    assert all(str(shape) in message for shape in shapes), message


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="activation is 'relu', expected one of"):
        short_conv(zeros(2, 8, 3), zeros(3, 4), activation="relu")
    with pytest.raises(ValueError, match="window is 0, expected at least 1"):
        attention(*qkv, window=0)
    with pytest.raises(ValueError, match="chunk_size"):
        linear_scan(zeros(2, 8, 3), zeros(3), chunk_size=0)
    with pytest.raises(ValueError, match="chunk_size"):
        cross_entropy(zeros(5, 3), zeros(3, 7), zeros(5, dtype=jnp.int32), zeros(5), chunk_size=0)
    with pytest.raises(ValueError, match="expected at least 1 along T"):
        linear_scan(zeros(2, 0, 3), zeros(3))
