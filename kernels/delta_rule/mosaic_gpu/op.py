"""The call around the kernels: padding, sums of log-decays, gradients of decays and of beta.

With U, the corrections, in place of the values the rest is linear attention, and its kernels do it: the output of all
chunks at once, the states again for the backward pass, and the gradients of q, k and the decay that do not come by U.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import mosaic_gpu as hopper
from kernels.array_typing import Array, Float, Int
from kernels.delta_rule.mosaic_gpu import gradients, keys, sweeps
from kernels.linear_attention.mosaic_gpu import launch as linear_attention
from kernels.linear_attention.mosaic_gpu.blocks import Plan
from kernels.linear_attention.mosaic_gpu.chunk import CHUNK, FASTEST
from kernels.linear_attention.mosaic_gpu.op import SEGMENT_START, decays, log_decay_gradient, pad, sum_shared
from kernels.segments import segment_starts

SMALLEST = 64  # K and V
WIDEST_KEYS, WIDEST_VALUES = 128, 256  # a sweep has a state of all keys in registers


def mosaic_gpu(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H K"] | Float[Array, "B T H 1"] | None,
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
    groups, key_dim = q.shape[2:]
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        raise NotImplementedError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, expected bfloat16")
    if not (SMALLEST <= key_dim <= WIDEST_KEYS and SMALLEST <= value_dim <= WIDEST_VALUES):
        wanted = f"K from {SMALLEST} to {WIDEST_KEYS}, V from {SMALLEST} to {WIDEST_VALUES}"
        raise NotImplementedError(f"K {key_dim}, V {value_dim}: expected {wanted}")
    chunks, key_tiles, value_tiles = (-(-size // CHUNK) for size in (time, key_dim, value_dim))
    if max(batch * heads, chunks) > 65535:
        raise NotImplementedError(f"{batch * heads} sequences of {chunks} chunks: more than 65535 of either")
    per_key = log_decay is not None and log_decay.shape[-1] > 1
    sizes = batch, chunks * CHUNK, groups, heads, key_tiles * CHUNK, value_tiles * CHUNK
    plan = Plan(*sizes, scale, per_key, parts=1, interpret=how, op="delta_rule")

    g = jnp.zeros((batch, time, heads, 1), jnp.float32) if log_decay is None else log_decay.astype(jnp.float32)
    if segment_ids is not None:
        g = jnp.where(segment_starts(segment_ids)[:, :, None, None], SEGMENT_START, g)
    later, more_keys, more_values = plan.time - time, plan.key_dim - key_dim, plan.value_dim - value_dim
    state = pad(initial_state.reshape(-1, key_dim, value_dim), more_keys, more_values)
    out, state = correct(
        plan,
        pad(q, later, more_keys),
        pad(k, later, more_keys),
        pad(v, later, more_values),
        pad(beta.astype(jnp.float32)[..., None], later, 0),
        pad(g, later, more_keys if per_key else 0),
        state,
    )
    return out[:, :time, :, :value_dim], state[:, :key_dim, :value_dim].reshape(initial_state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def correct(
    plan: Plan, q: Array, k: Array, v: Array, beta: Array, g: Array, initial_state: Array
) -> tuple[Array, Array]:
    """q, k [B, T, G, K]; v [B, T, H, V]; float32: beta [B, T, H, 1], g [B, T, H, K|1], initial_state [B H, K, V]."""
    return correct_forward(plan, q, k, v, beta, g, initial_state)[0]


def correct_forward(
    plan: Plan, q: Array, k: Array, v: Array, beta: Array, g: Array, initial_state: Array
) -> tuple[Any, ...]:
    decay, totals = decays(plan, g)
    beta = beta[..., 0].transpose(0, 2, 1).reshape(plan.sequences, plan.time)
    inverses = keys.inverse(plan, k, beta, decay)
    if plan.per_key:
        swept, gates = keys.gated(plan, ("k_read", "k_write"), {"k": k}, decay), None
    else:
        swept, gates = {"k": k}, decay
    u, states, final_state = sweeps.sweep(plan, swept, v, beta, gates, totals, inverses, initial_state)
    scores = linear_attention.scores(plan, q, k, decay) if plan.per_key else None
    out = linear_attention.read(plan, False, q, scores if plan.per_key else k, u, decay, states)
    residuals = q, k, v, beta, decay, None if plan.per_key else g, totals, inverses, u, scores, initial_state
    return (out, final_state), residuals


def correct_backward(plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    q, k, v, beta, decay, g, totals, inverses, u, scores, initial_state = residuals
    d_out, d_final_state = cotangents[0].astype(jnp.bfloat16), cotangents[1].astype(jnp.float32)
    states, _ = linear_attention.sweep(plan, False, k, u, decay, totals, initial_state, keep=True)
    if plan.per_key:
        swept, gates = keys.gated(plan, ("k_read", "k_write", "q_read"), {"q": q, "k": k}, decay), None
    else:
        swept, gates, scores = {"q": q, "k": k}, decay, keys.scores(plan, q, k, decay)
    d_y, dv, d_states, d_state = sweeps.pull(plan, swept, d_out, beta, gates, totals, inverses, scores, d_final_state)
    if plan.per_key:
        pairs, dq, dk, of_states = linear_attention.products(plan, u, d_out, states, d_states)
        dq, dk, d_g = linear_attention.key_gradients(plan, q, k, pairs, dq, dk, decay, totals * of_states)
        pairs, read, of_values = gradients.products(plan, v, d_y, u, states)
        dk, d_g, d_beta = gradients.key_gradients(plan, k, beta, decay, pairs, read, dk, d_g)
        d_beta = of_values + jnp.sum(d_beta, axis=0)
    else:
        dq, dk, from_here_on, before, of_states = linear_attention.gradients(
            plan, q, k, u, d_out, decay, states, d_states
        )
        dk, d_beta, changes = gradients.gradients(plan, k, v, beta, decay, d_y, u, states, dk)
        d_g = log_decay_gradient(plan, from_here_on + changes, before, totals * of_states)
        d_g, d_beta = jnp.where(g > FASTEST, d_g, 0.0), jnp.sum(d_beta, axis=0)
    d_beta = d_beta.reshape(plan.batch, plan.heads, plan.time).transpose(0, 2, 1)[..., None]
    return sum_shared(plan, dq), sum_shared(plan, dk), dv, d_beta, d_g, d_state


correct.defvjp(correct_forward, correct_backward)
