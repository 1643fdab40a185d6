"""`attention`: softmax attention with grouped heads, windows, packing, positions and decays."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.array_typing import Array, Bool, Float, Int
from kernels.attention.chunked import chunked
from kernels.attention.cudnn import cudnn
from kernels.attention.decay import sums
from kernels.attention.reference import reference
from kernels.attention.splash import splash
from kernels.attention.step import step, step_reference
from kernels.checks import (
    check_count,
    check_dtype,
    check_not_above_zero,
    check_number,
    check_rank,
    check_segment_ids,
    check_shape,
)
from kernels.segments import segment_numbers

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked, "cudnn": cudnn, "splash": splash}
ORDER = {"tpu": ["splash", "chunked"], "gpu": ["cudnn", "chunked"]}
OP = "attention"


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B L"] | tuple[Int[Array, "B T"], Int[Array, "B L"]] | None = None,
    q_start: int | Int[Array, ""] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B L"] | None = None,
    log_decay: Float[Array, "B L H"] | tuple[Float[Array, "B T H 2"], Float[Array, "B L H 2"]] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: dispatch.Implementation = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention.

        o_t = sum_s p_ts v_s,   p_t = softmax over the visible s of z_ts,   z_ts = scale q_t . k_s,
        or z_ts = softcap tanh(scale q_t . k_s / softcap), and with decays z_ts + sum of log_decay over s < u <= t

    Key s is visible to query t if they are of one segment, and (causal) kv_positions_s <= q_positions_t, and
    (window) |q_positions_t - kv_positions_s| < window. A query that sees no key gives 0.
    Memory is linear in T and L, also for the gradients of q, k and v.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      q: queries, H heads.
      k, v: keys and values, G heads; query head h reads head h // (H // G).
      causal: whether a query sees only keys that are not after it.
      window: how many positions back a query sees, its own included, and unless causal as many ahead; None: all.
      segment_ids: of the keys, and of the queries where T = L or q_start is given: a token whose id differs from its
        left neighbour's starts a new segment. Or a pair, of q and of k, that may stand in any order: a query and a key
        are of one segment if their ids are equal.
      q_start: the queries are those of the keys' tokens q_start, q_start + 1, ..., a part of the sequence; where it is
        traced, it and L are multiples of T. With it, causality and windows count by the tokens' own indices.
      q_positions, kv_positions: positions in tokens; 0, 1, 2, ... by default.
      log_decay: what each token leaves of the keys before it, at most 0 (forgetting attention, arXiv:2503.02130). Of
        the keys' tokens, each for its query head, where the queries are among them (T = L, or q_start). Or a pair,
        `kernels.attention.sums` of it at each query and at each key, for a cache.
      scale: None is K^-0.5.
      softcap: bound of the logits' magnitude.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, a window below 1, a scale that is not finite, a
        log_decay above 0 that is known or without causality, a softcap that is not above 0, a q_start beside positions
        or a pair of segment_ids or of which the keys lack some, or an unknown implementation.
      NotImplementedError: the implementation asked for does not support the call; the message says why.
    """
    check_rank(OP, "q", q, "B T H K")
    check_rank(OP, "k", k, "B L G K")
    B, T, H, K = q.shape
    L, G = k.shape[1:3]
    check_shape(OP, "k", k, (B, L, G, K), like="q", shape=q.shape)
    check_rank(OP, "v", v, "B L G V")
    check_shape(OP, "v", v, (B, L, G, v.shape[3]), like="k", shape=k.shape)
    if G == 0 or H % G:
        raise ValueError(f"{OP}: k has {G} heads (shape {k.shape}), expected a divisor of the {H} of q ({q.shape})")
    if q_start is not None:
        _check_part(q_start, T, L, segment_ids, q_positions, kv_positions)
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        if q_start is None:
            check_segment_ids(OP, segment_ids, like="q", shape=q.shape)
        check_segment_ids(OP, segment_ids, like="k", shape=k.shape)
        numbers = segment_numbers(segment_ids)
        of_queries = numbers if q_start is None else lax.dynamic_slice_in_dim(numbers, q_start, T, axis=1)
        segment_ids = (of_queries, numbers)
    elif segment_ids is not None:
        check_segment_ids(OP, segment_ids[0], like="q", shape=q.shape, name="segment_ids of q")
        check_segment_ids(OP, segment_ids[1], like="k", shape=k.shape, name="segment_ids of k")
    if q_positions is not None:
        check_shape(OP, "q_positions", q_positions, (B, T), like="q", shape=q.shape)
    if kv_positions is not None:
        check_shape(OP, "kv_positions", kv_positions, (B, L), like="k", shape=k.shape)
    if log_decay is not None:
        if not causal:
            raise ValueError(f"{OP}: log_decay counts from a key to a later query, expected causal=True")
        log_decay = _sums_at(log_decay, q, k, q_start, positions=q_positions is not None or kv_positions is not None)
    if q_start is not None:
        q_positions = jnp.broadcast_to(q_start + jnp.arange(T), (B, T))
    check_dtype(OP, jnp.floating, q=q, k=k, v=v)
    check_dtype(OP, jnp.integer, q_positions=q_positions, kv_positions=kv_positions)
    check_count(OP, "window", window, "position")
    check_number(OP, "scale", scale)
    check_number(OP, "softcap", softcap, positive=True)
    return dispatch.call(
        OP,
        IMPLEMENTATIONS,
        implementation,
        ORDER.get(dispatch.device().platform, ["chunked"]),
        q,
        k,
        v,
        causal=causal,
        window=window,
        segment_ids=segment_ids,
        q_start=q_start,
        q_positions=q_positions,
        kv_positions=kv_positions,
        log_decay=log_decay,
        scale=K**-0.5 if scale is None else scale,
        softcap=softcap,
    )


def _sums_at(log_decay, q, k, q_start, positions):
    """`sums` at the queries and at the keys."""
    (B, T, H, _), L = q.shape, k.shape[1]
    if isinstance(log_decay, tuple):
        for name, array, length in zip(("of q", "of k"), log_decay, (T, L), strict=True):
            check_shape(OP, f"log_decay {name}", array, (B, length, H, 2), like="q", shape=q.shape)
            check_dtype(OP, jnp.floating, **{f"log_decay {name}": array})
        return log_decay
    if positions or (q_start is None and T != L):
        raise ValueError(f"{OP}: log_decay is one array, expected a pair of sums for {T} queries among {L} keys")
    check_shape(OP, "log_decay", log_decay, (B, L, H), like="q", shape=q.shape)
    check_dtype(OP, jnp.floating, log_decay=log_decay)
    check_not_above_zero(OP, log_decay=log_decay)
    of_keys = sums(log_decay)
    return (of_keys if q_start is None else lax.dynamic_slice_in_dim(of_keys, q_start, T, axis=1)), of_keys


def _check_part(q_start, T, L, segment_ids, q_positions, kv_positions):
    """Raise ValueError unless the T queries at `q_start` are a part of the L keys, known by that alone."""
    if q_positions is not None or kv_positions is not None or isinstance(segment_ids, tuple):
        raise ValueError(f"{OP}: q_start says where the queries are; give no positions, and segment_ids as one array")
    known = not isinstance(q_start, jax.core.Tracer)
    if T > L or (known and not (0 <= int(q_start) <= L - T)):
        raise ValueError(f"{OP}: q_start is {q_start if known else 'given'}, expected {T} queries within the {L} keys")
    if not known and L % T:
        raise ValueError(f"{OP}: {L} keys are no multiple of the {T} queries, and q_start is traced: make it a number")


def attention_step(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B G L K"],
    v: Float[Array, "B G L V"],
    visible: Bool[Array, "B T L"],
    *,
    stop: int | Int[Array, ""] | None = None,
    sums: tuple[Float[Array, "B T H 2"], Float[Array, "B H L 2"]] | None = None,
    implementation: dispatch.Implementation = None,
) -> Float[Array, "B T H V"]:
    """`attention` of a few tokens to a cache, which lies heads first.

    o_t = sum_s p_ts v_s,   p_t = softmax over the visible s of q_t . k_s / sqrt(K)

    A query that sees no key gives 0.

    Args:
      q: queries, H heads.
      k, v: keys and values, G heads; query head h reads head h // (H // G).
      visible: which keys each query sees.
      stop: no query sees a key from here on, and they are not read where that is cheaper; None: L.
      sums: `kernels.attention.sums` of the decays at each query and at each key; see `attention`.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, or an unknown implementation.
    """
    op = "attention_step"
    check_rank(op, "q", q, "B T H K")
    check_rank(op, "k", k, "B G L K")
    (B, T, H, K), (G, L) = q.shape, k.shape[1:3]
    check_shape(op, "k", k, (B, G, L, K), like="q", shape=q.shape)
    check_rank(op, "v", v, "B G L V")
    check_shape(op, "v", v, (B, G, L, v.shape[3]), like="k", shape=k.shape)
    if H % G:
        raise ValueError(f"{op}: k has {G} heads (shape {k.shape}), expected a divisor of the {H} of q ({q.shape})")
    check_shape(op, "visible", visible, (B, T, L), like="k", shape=k.shape)
    check_dtype(op, jnp.floating, q=q, k=k, v=v)
    if sums is not None:
        check_shape(op, "sums of q", sums[0], (B, T, H, 2), like="q", shape=q.shape)
        check_shape(op, "sums of k", sums[1], (B, H, L, 2), like="k", shape=k.shape)
    stop = jnp.asarray(L if stop is None else stop, jnp.int32)
    table = {"reference": step_reference, "chunked": step}
    return dispatch.call(op, table, implementation, ["chunked"], q, k, v, sums, visible, stop)
