"""Hopper GPUs that are not there: their chunk math on plain arrays, and ahead-of-time compilation.

wgmma cannot be interpreted on a CPU. `sweep`, `read` and `gradients` have the arguments and results of
kernels/linear_attention/mosaic_gpu/launch.py and run the same chunk math, with the same roundings, tile by tile.
"""

import functools
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import topologies

from kernels.linear_attention.mosaic_gpu import chunk
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK

TARGET = pathlib.Path(__file__).with_name("h200.txtpb")  # what the compiler asks a GPU for


def h200() -> jax.Device:
    """An H200 to compile for; skips the test where jax's CUDA plugin is not installed."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin and ptxas: make test-gpu-compile")
    options = {"target_config": TARGET.read_text(), "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", topology_name="h200", **options).devices[0]


class Arrays:
    """The machine of chunk.py on arrays."""

    def index(self, axis):
        return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)

    def load(self, shared):
        assert shared.dtype == jnp.bfloat16
        return shared.astype(jnp.float32)

    def rows(self, vector, width):
        return jnp.broadcast_to(vector[:, None], (CHUNK, width))

    def columns(self, vector):
        return jnp.broadcast_to(vector[None], (CHUNK, CHUNK))

    def half(self, x):  # XLA may leave out a rounding that is only a conversion there and back
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)

    stage = keep = half

    def transposed(self, shared):
        return shared.T

    def dots(self, start, *pairs):
        assert all(x.dtype == jnp.bfloat16 and x.shape[0] % CHUNK == 0 for pair in pairs for x in pair)
        products = [jnp.dot(a, b, preferred_element_type=jnp.float32) for a, b in pairs]
        return sum(products, 0.0 if start is None else start)


M = Arrays()


def by_chunk(plan, x):
    """[B, T, heads, X] -> [B H, N, 64, X]"""
    x = jnp.repeat(x, plan.heads // x.shape[2], axis=2).transpose(0, 2, 1, 3)
    return x.reshape(plan.sequences, plan.chunks, CHUNK, -1)


def by_token(plan, x):
    """The inverse, for H heads."""
    return x.reshape(plan.batch, plan.heads, plan.time, -1).transpose(0, 2, 1, 3)


def tiles(x, axis=-1):
    return jnp.split(x, x.shape[axis] // CHUNK, axis=axis)


def decays_by_chunk(plan, decay):
    if plan.per_key:
        return SimpleNamespace(high=by_chunk(plan, decay[0]), low=by_chunk(plan, decay[1]))
    return SimpleNamespace(vectors=decay.reshape(3, plan.sequences, plan.chunks, CHUNK))


def chunk_decays(plan, arrays, gate):
    """One a key tile; `gate` is 1 for reads and 2 for writes."""
    if plan.per_key:
        return [chunk.PerKey(*pair) for pair in zip(tiles(arrays["high"]), tiles(arrays["low"]), strict=True)]
    return [chunk.Scalar(arrays["vectors"][0], arrays["vectors"][gate])] * plan.key_tiles


def over_chunks(plan, function, decay, *arrays):
    """`function(decays, *arrays)` for each sequence and chunk."""
    named = vars(decays_by_chunk(plan, decay))
    axes = {name: 1 if name == "vectors" else 0 for name in named}
    function = jax.vmap(jax.vmap(function, (axes, *(0 for _ in arrays))), (axes, *(0 for _ in arrays)))
    return function(named, *arrays)


def sweep(plan, reverse, x, y, decay, totals, starts, keep):
    x, y = by_chunk(plan, x), by_chunk(plan, y)
    named = vars(decays_by_chunk(plan, decay))
    totals = totals.reshape(plan.sequences, plan.chunks, plan.key_dim)

    def step(state, n):
        def one(named, x, y, total, state):
            decays = chunk_decays(plan, named, 1 if reverse else 2)
            parts = zip(decays, tiles(x), tiles(total), tiles(state, 0), strict=True)
            return jnp.concatenate(
                [chunk.update(M, d, reverse, plan.scale, xt, y, total, s) for d, xt, total, s in parts]
            )

        axes = {name: 1 if name == "vectors" else 0 for name in named}
        here = {name: value[:, :, n] if name == "vectors" else value[:, n] for name, value in named.items()}
        return jax.vmap(one, (axes, 0, 0, 0, 0))(here, x[:, n], y[:, n], totals[:, n], state), M.half(state)

    starts = starts.reshape(plan.sequences, plan.parts, plan.key_dim, plan.value_dim)
    states, ends = [], []
    for part in range(plan.parts):
        first = part * plan.part_chunks
        numbers = jnp.arange(first, min(first + plan.part_chunks, plan.chunks))
        assert numbers.size
        end, before = lax.scan(step, starts[:, part], numbers, reverse=reverse)
        states.append(jnp.moveaxis(before, 0, 1))
        ends.append(end)
    states = jnp.concatenate(states, axis=1).reshape(plan.states_shape)
    return states if keep else None, jnp.stack(ends, 1).reshape(-1, plan.key_dim, plan.value_dim)


def read(plan, reverse, x, y, w, decay, states):
    def one(named, x, y, w, state):
        decays = chunk_decays(plan, named, 2 if reverse else 1)
        return M.half(chunk.read(M, decays, reverse, plan.scale, tiles(x), tiles(y), w, tiles(state, 0)))

    states = states.reshape(plan.sequences, plan.chunks, plan.key_dim, plan.value_dim)
    return by_token(plan, over_chunks(plan, one, decay, *(by_chunk(plan, a) for a in (x, y, w)), states))


def gradients(plan, q, k, v, d_out, decay, states, d_states):
    def one(named, q, k, v, d_out, state, d_state):
        reads, writes = (chunk_decays(plan, named, gate) for gate in (1, 2))
        results = []
        for i in range(plan.key_tiles):
            q_tile, k_tile = tiles(q)[i], tiles(k)[i]
            gradient = functools.partial(chunk.key_gradient, M)
            dq, part = gradient(reads[i], False, plan.scale, k_tile, d_out, v, tiles(state, 0)[i])
            changes = M.load(q_tile) * part
            dk, part = gradient(writes[i], True, plan.scale, q_tile, v, d_out, tiles(d_state, 0)[i])
            changes = changes - M.load(k_tile) * part
            changes = chunk.sums_of_later(M, changes) if plan.per_key else jnp.sum(changes, axis=1)
            results.append((M.half(dq), M.half(dk), changes))
        return tuple(jnp.stack(x) for x in zip(*results, strict=True))  # [K / 64, 64, 64]

    shape = (plan.sequences, plan.chunks, plan.key_dim, plan.value_dim)
    operands = *(by_chunk(plan, a) for a in (q, k, v, d_out)), states.reshape(shape), d_states.reshape(shape)
    dq, dk, changes = over_chunks(plan, one, decay, *operands)

    def keys_last(x):  # [B H, N, K / 64, 64, 64] -> [B, T, H, K]
        return by_token(plan, x.transpose(0, 1, 3, 2, 4).reshape(plan.sequences, plan.chunks, CHUNK, -1))

    if plan.per_key:
        return keys_last(dq), keys_last(dk), keys_last(changes)
    return keys_last(dq), keys_last(dk), changes.transpose(2, 0, 1, 3).reshape(plan.key_tiles, plan.sequences, -1)
