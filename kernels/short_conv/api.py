"""`short_conv`: a causal depthwise convolution of a few taps."""

import jax
import jax.numpy as jnp

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.checks import check_dtype, check_rank, check_segment_ids, check_shape
from kernels.short_conv.chunked import chunked
from kernels.short_conv.reference import reference

IMPLEMENTATIONS = {"reference": reference, "chunked": chunked}
ACTIVATIONS = (None, "silu")


def short_conv(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    bias: Float[Array, " D"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: dispatch.Implementation = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Causal depthwise convolution over time, with its activation.

        y_t = activation(bias + sum_w weight[:, w] x_{t - (W-1) + w})

    Tap W-1 multiplies x_t. Meant for 2 to 64 taps. Gradients flow to every float argument, from y and the final state.
    `reference` differentiates in every mode, the others once, in reverse (`dispatch.use_implementation`).

    Args:
      x: inputs.
      weight: taps, the oldest input's first.
      bias: added before the activation.
      activation: None or "silu".
      initial_state: the W-1 inputs before token 0, zero by default. They belong to the segment of token 0.
      segment_ids: a token whose id differs from its left neighbour's sees zeros before it.

    Returns:
      y, and the last W-1 inputs of the row's last segment (zeros where it is shorter), both in x's dtype.

    Raises:
      ValueError: a shape or dtype that does not fit, an empty axis, an unknown activation or implementation.
    """
    check_rank("short_conv", "x", x, "B T D")
    B, T, D = x.shape
    taps = _check("short_conv", x, weight, bias, activation, initial_state)
    check_segment_ids("short_conv", segment_ids, like="x", shape=x.shape)
    unused = max(0, taps - 1 - T) if initial_state is None else 0  # taps that reach back before token 0 at every token
    y, final_state = dispatch.call(
        "short_conv",
        IMPLEMENTATIONS,
        implementation,
        ["chunked"],
        x,
        weight[:, unused:],
        bias,
        activation=activation,
        initial_state=None if initial_state is None else initial_state.astype(x.dtype),
        segment_ids=segment_ids,
    )
    return y, jnp.pad(final_state, ((0, 0), (unused, 0), (0, 0)))


def short_conv_step(
    x: Float[Array, "B D"],
    weight: Float[Array, "D W"],
    bias: Float[Array, " D"] | None = None,
    *,
    activation: str | None = None,
    state: Float[Array, "B W-1 D"],
) -> tuple[Float[Array, "B D"], Float[Array, "B W-1 D"]]:
    """One token of `short_conv`: returns y_t and the new state, in x's dtype.

    Raises:
      ValueError: as `short_conv`.
    """
    check_rank("short_conv_step", "x", x, "B D")
    _check("short_conv_step", x, weight, bias, activation, state, state_name="state")
    window = jnp.concatenate([state.astype(x.dtype), x[:, None]], 1)  # [B, W, D]
    y = jnp.einsum("bwd,dw->bd", window, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    y = jax.nn.silu(y) if activation == "silu" else y
    return y.astype(x.dtype), window[:, 1:]


def _check(op, x, weight, bias, activation, state, state_name="initial_state"):
    D = x.shape[-1]
    check_rank(op, "weight", weight, "D W")
    taps = weight.shape[1]
    check_shape(op, "weight", weight, (D, taps), like="x", shape=x.shape)
    if bias is not None:
        check_shape(op, "bias", bias, (D,), like="x", shape=x.shape)
    if state is not None:
        check_shape(op, state_name, state, (x.shape[0], taps - 1, D), like="weight", shape=weight.shape)
    check_dtype(op, jnp.floating, x=x, weight=weight, bias=bias, **{state_name: state})
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}, expected one of {ACTIVATIONS}")
    return taps
