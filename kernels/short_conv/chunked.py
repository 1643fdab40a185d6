"""The convolution as W shifted multiply-adds, which XLA turns into one loop over the data, and so its transpose.

With z the sum before bias and activation, and a tap's lag l = W-1-w: z_t = sum_l weight_l x_{t-l},

    dx_s = sum_l weight_l dz_{s+l},        dweight_l = sum_t dz_t x_{t-l}

A tap reaches only into its token's own segment: its lag is at most the number of tokens since the segment's start.

A row no longer than its many taps reach is a product with their Toeplitz matrix, in each channel: that has no sum of
its own for each tap's gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels import dispatch
from kernels.array_typing import Array, Float, Int
from kernels.precision import narrow
from kernels.segments import tokens_since_start
from kernels.toeplitz import toeplitz

FEW_TAPS = 16  # for which shifts are faster than a product
AT_ONCE = 4  # taps whose gradients accelerators sum up in one kernel


def chunked(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D W"],
    bias: Float[Array, " D"] | None,
    *,
    activation: str | None,
    initial_state: Float[Array, "B W-1 D"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """y [B, T, D] and the final state; see `short_conv`."""
    T, taps = x.shape[1], weight.shape[1]
    from_zero = initial_state is None
    if from_zero:
        initial_state = jnp.zeros((len(x), taps - 1, x.shape[-1]), x.dtype)
    padded = jnp.concatenate([initial_state, x], 1)  # [B, W - 1 + T, D]
    age = None if segment_ids is None else tokens_since_start(segment_ids, before=taps)  # [B, T]
    if from_zero and age is None and FEW_TAPS < T <= taps:
        matrix = toeplitz(jnp.flip(weight, 1)[:, :T].astype(jnp.float32))
        y = jnp.einsum("dut,btd->bud", matrix, x.astype(jnp.float32), precision="highest")
        y = y if bias is None else y + bias.astype(jnp.float32)
    else:
        y = _convolve(padded, weight, bias, age)
    y = jax.nn.silu(y) if activation == "silu" else y

    final_state = padded[:, T:]
    if age is not None:
        behind = jnp.arange(taps - 2, -1, -1)  # of the last token
        final_state = jnp.where((age[:, -1:] >= behind)[..., None], final_state, 0)
    return y.astype(x.dtype), final_state


@jax.custom_vjp
def _convolve(padded, weight, bias, age):
    T = padded.shape[1] - weight.shape[1] + 1
    start = 0.0 if bias is None else bias.astype(jnp.float32)
    return start + sum(
        weight[:, tap].astype(jnp.float32) * _within(lax.slice_in_dim(padded, tap, tap + T, axis=1), age, lag)
        for tap, lag in _taps(weight)
    )


def _forward(padded, weight, bias, age):
    return _convolve(padded, weight, bias, age), (padded, weight, bias, age)


def _backward(residuals, dz):
    padded, weight, bias, age = residuals
    dz = narrow(dz, padded.dtype)  # it is read often; the sums are float32
    length, T, margin = padded.shape[1], dz.shape[1], weight.shape[1] - 1
    wide = jnp.pad(dz, ((0, 0), (margin, margin), (0, 0)))
    wide_age = None if age is None else jnp.pad(age, ((0, 0), (margin, margin)))
    dpadded = 0.0
    for tap, lag in _taps(weight):
        shifted_age = None if age is None else lax.slice_in_dim(wide_age, lag, lag + length, axis=1)
        shifted = _within(lax.slice_in_dim(wide, lag, lag + length, axis=1), shifted_age, lag)
        dpadded = dpadded + weight[:, tap].astype(jnp.float32) * shifted

    def dtap(tap):
        inputs = _within(lax.dynamic_slice_in_dim(padded, tap, T, axis=1), age, margin - tap)
        return jnp.sum(inputs.astype(jnp.float32) * dz, (0, 1))

    if margin < AT_ONCE and dispatch.device().platform != "cpu":
        dweight = jnp.stack([dtap(tap) for tap in range(margin + 1)], 1)  # x and dz are read once
    else:  # fused into one, the reductions of many taps are slow to compile and to run
        dweight = lax.map(dtap, jnp.arange(margin + 1)).T
    dbias = None if bias is None else jnp.sum(dz, (0, 1), dtype=jnp.float32).astype(bias.dtype)
    return dpadded.astype(padded.dtype), dweight.astype(weight.dtype), dbias, None


_convolve.defvjp(_forward, _backward)


def _taps(weight):
    return [(tap, weight.shape[1] - 1 - tap) for tap in range(weight.shape[1])]


def _within(inputs, age, lag):
    return inputs if age is None else jnp.where((age >= lag)[..., None], inputs, 0)
