"""Ops without a TPU kernel compile ahead of time for TPUs, forward and backward; the others have their own tests."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from kernels import cross_entropy, dispatch
from tests.kernels.conformance import BATCH, CASES, TIME, cotangents
from tests.kernels.tpu import compile_for_tpu, devices

CHIPS = ["v5e", pytest.param("v5p", marks=pytest.mark.slow), pytest.param("v6e", marks=pytest.mark.slow)]


def compile_on(device, function, *args):
    """`function` of arrays like `args` (arrays, or their shapes and dtypes) on `device`."""
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with dispatch.use_device(device):
        return compile_for_tpu(jax.jit(function).lower(*args))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "mosaic_tpu" not in case.implementations])
def test_an_op_compiles(name, chip):
    case, device = CASES[name], devices(chip)[0]
    inputs = case.make()

    def values_and_gradients(inputs, segment_ids, cotangents):
        values, pull = jax.vjp(lambda inputs: case.run(inputs, segment_ids), inputs)
        return values, pull(cotangents)[0]

    compile_on(
        device,
        values_and_gradients,
        inputs,
        jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32),
        cotangents(name, inputs),
    )


@pytest.mark.parametrize("chip", CHIPS)
def test_cross_entropy_compiles(chip):
    shapes = [((64, 32), jnp.bfloat16), ((32, 384), jnp.bfloat16), ((64,), jnp.int32), ((64,), jnp.float32)]
    gradients = jax.grad(lambda *args: cross_entropy(*args).sum(), argnums=(0, 1))
    compile_on(devices(chip)[0], gradients, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
