"""What the conformance suite does not see of linear_attention: memory, precision over long rows, choices, blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import chunks, linear_attention
from kernels.chunks import decay_sums, join
from kernels.dispatch import Device
from kernels.linear_attention import specs


def gradients(implementation, time, log_decay_size, dtype=np.float32, heads=1, key_dim=8, value_dim=8):
    random = np.random.default_rng(0)
    shapes = [(1, time, heads, key_dim), (1, time, heads, key_dim), (1, time, heads, value_dim)]
    q, k, v, weights = (random.normal(size=shape).astype(dtype) for shape in (*shapes, shapes[2]))
    log_decay = (-log_decay_size * np.abs(random.normal(size=shapes[0]))).astype(dtype)

    def loss(q, k, v, log_decay):
        return jnp.sum(weights * linear_attention(q, k, v, log_decay, implementation=implementation)[0])

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, k, v, log_decay).compile(), (q, k, v, log_decay)


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
@pytest.mark.parametrize("log_decay_size", [0.01, 5.0])
def test_gradient_of_log_decay_keeps_its_digits_over_4096_tokens(implementation, log_decay_size):
    compiled, arrays = gradients(implementation, 4096, log_decay_size)
    with jax.enable_x64(True):
        exact, exact_arrays = gradients("recurrent", 4096, log_decay_size, np.float64)
        expected = np.asarray(exact(*exact_arrays)[3])
    error = np.asarray(compiled(*arrays)[3], np.float64) - expected
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 3e-5


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_backward_memory_is_linear_in_time_and_holds_no_state_per_token(implementation):
    sizes = {}
    for time in (512, 1024):
        compiled, _ = gradients(implementation, time, 0.1, key_dim=32, value_dim=32)
        sizes[time] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[1024] < 2.2 * sizes[512]
    assert sizes[1024] < 4 * 1024 * 32 * 32, "a float32 state a token"


@pytest.mark.parametrize("decay", ["fixed", "scalar", "vector"])
def test_a_long_sequence_in_pieces_is_the_same_with_states_and_segments(monkeypatch, decay):
    random, time = np.random.default_rng(0), 131  # 9 chunks, the last one padded, as 3 pieces
    q, k = (random.normal(size=(2, time, 1, 8)).astype(np.float32) for _ in range(2))
    v = random.normal(size=(2, time, 2, 4)).astype(np.float32)
    shape = {"fixed": (2,), "scalar": (2, time, 2), "vector": (2, time, 2, 8)}[decay]
    log_decay = -np.abs(random.normal(size=shape)).astype(np.float32)
    state = random.normal(size=(2, 2, 8, 4)).astype(np.float32)
    segment_ids = jnp.asarray([[0] * 40 + [1] * 37 + [2] * 54, [0] * 48 + [1] * 83])  # inside a piece, at its start

    def results():
        def loss(*arrays):
            out, last = linear_attention(
                *arrays[:4], initial_state=arrays[4], segment_ids=segment_ids, implementation="chunked", chunk_size=16
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(last))

        return jax.jit(jax.value_and_grad(loss, argnums=range(5)))(q, k, v, log_decay, state)

    expected = jax.tree.leaves(results())
    monkeypatch.setattr(chunks, "PIECE", 4)
    for a, b in zip(jax.tree.leaves(results()), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_memory_of_a_long_sequence_in_pieces_is_what_goes_in_and_out(monkeypatch):
    temporary = {}
    for piece in (4, 64):
        monkeypatch.setattr(chunks, "PIECE", piece)
        compiled, _ = gradients("chunked", 4096, 0.1, key_dim=32, value_dim=32)
        temporary[piece] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[4] < 0.5 * temporary[64]


@pytest.mark.parametrize("keys", [1, 2], ids=["scalar", "per_key"])
def test_sums_of_log_decays_are_exact_beside_a_decay_that_wipes_the_state(keys):
    g = jnp.array([-0.1, -1e4, -0.2, -0.3, 0.0, -jnp.inf, -0.4, -0.5])
    sums = decay_sums(jnp.repeat(g[:, None], keys, axis=1), None)
    levels = [jnp.exp(read2[..., :1] + write1[..., :1].mT) for read2, write1 in sums.levels]
    pairs = sums.pairs if keys == 1 else join(levels)
    expected = np.zeros((8, 8))
    for i in range(8):
        for j in range(i):
            expected[i, j] = np.exp(np.sum(np.asarray(g, np.float64)[j + 1 : i + 1]))
    np.testing.assert_allclose(pairs, expected, rtol=1e-6)


def test_a_cpu_goes_token_by_token_unless_heads_share_keys_and_a_gpu_in_chunks():
    v = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    shared = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.float32)
    scalar = jax.ShapeDtypeStruct((1, 4, 2), jnp.float32)
    cpu, gpu = Device("cpu", "cpu"), Device("gpu", "NVIDIA A100")
    assert specs.order(cpu, v, v, None)[0] == specs.order(cpu, shared, v, v)[0] == "recurrent"
    assert specs.order(cpu, shared, v, scalar)[0] == "chunked"
    assert specs.order(gpu, v, v, v)[0] == "chunked"


@pytest.mark.parametrize("time, wanted, size", [(1, None, 1), (3, None, 4), (64, None, 64), (50, 10, 16)])
@pytest.mark.parametrize("platform, largest", [("cpu", 64), ("gpu", 64), ("tpu", 128)])
def test_chunks_are_powers_of_two_no_longer_than_needed(platform, largest, time, wanted, size):
    device = Device(platform, platform)
    assert specs.chunk_size(device, time, wanted) == size
    assert specs.chunk_size(device, 5000, None) == largest
