"""What the conformance suite does not see of the chunked delta rules: memory, pieces, a TPU's rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chunks, delta_rule, dplr_delta_rule
from kernels.delta_rule import specs
from kernels.delta_rule.inverse import unit_lower_inverse
from tests.kernels.conformance import error_ratio
from tests.kernels.test_delta_rule import compiled, exact
from tests.kernels.tpu_rounding import on_a_tpu


def errors_on_a_tpu(name, decays, passes):
    arrays, expected = exact(name, decays, 64)
    results = on_a_tpu(compiled(decays, "chunked"), passes)(*arrays)
    return jax.tree.leaves(jax.tree.map(error_ratio, results, expected))


@pytest.mark.parametrize("decays", [pytest.param("none", marks=pytest.mark.slow), "vector", "general"])
def test_near_parallel_keys_are_right_on_a_tpu_too(decays):
    assert max(errors_on_a_tpu("near_parallel_keys_beta_2", decays, passes=6)) < 1e-4


@pytest.mark.slow
def test_near_parallel_keys_are_wrong_in_one_pass_of_bfloat16():
    assert max(errors_on_a_tpu("near_parallel_keys_beta_2", "none", passes=1)) > 0.1


@pytest.mark.parametrize("size", [1, 64])
def test_the_inverse_of_a_unit_lower_triangular_matrix(size):
    a = np.tril(np.random.default_rng(0).standard_normal((3, 2, size, size)), -1) / size
    inverse = jax.jit(unit_lower_inverse)(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(size) + a), atol=1e-6)
    assert not np.any(np.triu(inverse, 1))


def temporary_bytes(time):
    random = np.random.default_rng(0)
    q, k = (random.normal(size=(1, time, 1, 32)).astype(np.float32) for _ in range(2))
    v = random.normal(size=(1, time, 1, 64)).astype(np.float32)
    beta, log_decay = np.ones(v.shape[:3], np.float32), -0.1 * np.abs(q)

    def loss(*args):
        return jnp.sum(jnp.sin(delta_rule(*args, implementation="chunked")[0]))

    gradients = jax.jit(jax.grad(loss, argnums=range(5))).lower(q, k, v, beta, log_decay)
    return gradients.compile().memory_analysis().temp_size_in_bytes


def test_backward_memory_is_linear_in_time_and_no_state_per_token_and_less_in_pieces(monkeypatch):
    short, long = temporary_bytes(512), temporary_bytes(1024)
    assert long < 2.2 * short
    assert long < 4 * 1024 * 32 * 64, "a float32 state a token"
    monkeypatch.setattr(chunks, "PIECE", 4)
    assert temporary_bytes(1024) < 0.6 * long


@pytest.mark.parametrize("op", [delta_rule, dplr_delta_rule])
def test_a_long_sequence_in_pieces_is_the_same_with_states_and_segments(monkeypatch, op):
    random, time = np.random.default_rng(0), 131  # 9 chunks, the last one padded, as 3 pieces
    q, k, a, b = (random.normal(size=(2, time, 2, 8)).astype(np.float32) / 3 for _ in range(4))
    v = random.normal(size=(2, time, 2, 4)).astype(np.float32)
    beta = random.uniform(0, 2, (2, time, 2)).astype(np.float32)
    log_decay = -np.abs(random.normal(size=(2, time, 2, 8))).astype(np.float32)
    state = random.normal(size=(2, 2, 8, 4)).astype(np.float32)
    segment_ids = jnp.asarray([[0] * 40 + [1] * 37 + [2] * 54, [0] * 48 + [1] * 83])  # inside a piece, at its start
    arrays = (q[:, :, :1], k[:, :, :1], v, beta) if op is delta_rule else (q, k, v, a, b, log_decay)

    def results():
        def loss(state, *arrays):
            options = {"initial_state": state, "segment_ids": segment_ids, "chunk_size": 16}
            out, last = op(*arrays, implementation="chunked", **options)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(last))

        return jax.jit(jax.value_and_grad(loss, argnums=range(1 + len(arrays))))(state, *arrays)

    expected = jax.tree.leaves(results())
    monkeypatch.setattr(chunks, "PIECE", 4)
    for actual, wanted in zip(jax.tree.leaves(results()), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("time, wanted, size", [(1, None, 1), (3, None, 4), (64, None, 64), (50, 10, 16)])
def test_chunks_are_powers_of_two_no_longer_than_needed(time, wanted, size):
    assert specs.chunk_size(time, wanted) == size
    assert specs.chunk_size(5000, None) == 64
