"""The call around the kernels: padding, sums of log-decays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import mosaic_gpu as hopper
from kernels.array_typing import Array, Float, Int
from kernels.delta_rule.mosaic_gpu.keys import gated
from kernels.delta_rule.mosaic_gpu.op import SMALLEST, WIDEST_KEYS, WIDEST_VALUES
from kernels.dplr_delta_rule.mosaic_gpu import gradients, keys, sweeps
from kernels.linear_attention.mosaic_gpu.blocks import Plan
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK
from kernels.linear_attention.mosaic_gpu.op import SEGMENT_START, decays, pad
from kernels.segments import segment_starts


def mosaic_gpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    log_decay: Float[Array, "B T H K"],
    *,
    initial_state: Float[Array, "B H K V"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Arguments as in `reference`. Chunks have 64 tokens, whatever `chunk_size`; T, K and V are padded to multiples.
    A CPU interprets it inside of `mosaic_gpu.use_interpret`.

    Raises:
      NotImplementedError: another device, inputs that are not bfloat16, K not from 64 to 128 or V not from 64 to 256,
        or more than 65535 sequences or chunks.
    """
    how = hopper.interpret()
    batch, time, heads, value_dim = v.shape
    key_dim = q.shape[3]
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v, a, b)):
        dtypes = ", ".join(str(x.dtype) for x in (q, k, v, a, b))
        raise NotImplementedError(f"q, k, v, a and b are {dtypes}, expected bfloat16")
    if not (SMALLEST <= key_dim <= WIDEST_KEYS and SMALLEST <= value_dim <= WIDEST_VALUES):
        wanted = f"K from {SMALLEST} to {WIDEST_KEYS}, V from {SMALLEST} to {WIDEST_VALUES}"
        raise NotImplementedError(f"K {key_dim}, V {value_dim}: expected {wanted}")
    chunks, key_tiles, value_tiles = (-(-size // CHUNK) for size in (time, key_dim, value_dim))
    if max(batch * heads, chunks) > 65535:
        raise NotImplementedError(f"{batch * heads} sequences of {chunks} chunks: more than 65535 of either")
    sizes = batch, chunks * CHUNK, heads, heads, key_tiles * CHUNK, value_tiles * CHUNK
    plan = Plan(*sizes, scale, per_key=True, parts=1, interpret=how, op="dplr_delta_rule")

    g = log_decay.astype(jnp.float32)
    if segment_ids is not None:  # a segment's first token finds nothing, before its decay and after it
        starts = segment_starts(segment_ids)[:, :, None, None]
        a, g = jnp.where(starts, 0, a), jnp.where(starts, SEGMENT_START, g)
    later, more_keys, more_values = plan.time - time, plan.key_dim - key_dim, plan.value_dim - value_dim
    q, a, b, k, g = (pad(x, later, more_keys) for x in (q, a, b, k, g))
    state = pad(initial_state.reshape(-1, key_dim, value_dim), more_keys, more_values)
    out, state = correct(plan, q, a, b, k, pad(v, later, more_values), g, state)
    return out[:, :time, :, :value_dim], state[:, :key_dim, :value_dim].reshape(initial_state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def correct(
    plan: Plan, q: Array, a: Array, b: Array, k: Array, v: Array, g: Array, initial_state: Array
) -> tuple[Array, Array]:
    """q, a, b, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H, K] float32; initial_state [B H, K, V] float32."""
    return correct_forward(plan, q, a, b, k, v, g, initial_state)[0]


def correct_forward(
    plan: Plan, q: Array, a: Array, b: Array, k: Array, v: Array, g: Array, initial_state: Array
) -> tuple[Any, ...]:
    decay, totals = decays(plan, g)
    swept = gated(plan, sweeps.GATED, {"q": q, "a": a, "b": b, "k": k}, decay)
    scores = keys.scores(plan, q, b, k, decay)
    inverses, a_k = keys.system(plan, a, b, k, decay)
    u, states, final_state = sweeps.sweep(plan, swept, v, a_k, inverses, totals, initial_state)
    out = sweeps.read(plan, False, swept["q_read"], scores, (u, v), states)
    return (out, final_state), ((q, a, b, k), v, decay, totals, scores, inverses, a_k, u, states)


def correct_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    of_keys, v, decay, totals, scores, inverses, a_k, u, states = residuals
    d_out, d_final_state = cotangents[0].astype(jnp.bfloat16), cotangents[1].astype(jnp.float32)
    swept = gated(plan, sweeps.GATED, dict(zip("qabk", of_keys, strict=True)), decay)
    e, d_states, d_state = sweeps.pull(plan, swept, d_out, scores[0], inverses, totals, d_final_state)
    dv = sweeps.read(plan, True, swept["k_write"], (scores[1], a_k), (d_out, e), d_states)
    pairs = gradients.pair_products(plan, u, v, d_out, e)
    products, of_states = gradients.state_products(plan, u, v, d_out, e, states, d_states)
    dq, da, changes = gradients.reader_gradients(plan, of_keys, decay, pairs, products)
    db, dk, d_g = gradients.writer_gradients(plan, of_keys, decay, pairs, products, totals * of_states, changes)
    return dq, da, db, dk, dv, d_g, d_state


correct.defvjp(correct_forward, correct_backward)
