"""What `races.checked` tells: without these, the checks of the kernels could not fail."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from kernels import mosaic_gpu
from kernels.mosaic_tpu import interpret
from tests.kernels import races

TOLD = AssertionError, jax.errors.JaxRuntimeError


def first_then_second(first, second):
    """Two kernels; each writes a block of its own from each step of a parallel axis, or all the same one."""

    def write(shared):
        def kernel(out):
            out[...] = jnp.full(out.shape, 1.0 + pl.program_id(0))

        return pl.pallas_call(
            kernel,
            grid=(2,),
            out_specs=pl.BlockSpec((8, 128), (lambda i: (0, 0)) if shared else (lambda i: (i, 0))),
            out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            interpret=interpret(),
        )()

    return write(first), write(second)


def copied(wait):
    """A Hopper kernel that reads what it has fetched, after the copy has ended or too soon."""

    def body(refs, i):
        fetches.start(refs, 0, {"tile": refs.x.at[i]})
        tile = fetches.wait(refs, 0)["tile"] if wait else refs.tile.at[0]
        refs.out[i] = tile[...]

    fetches = mosaic_gpu.Fetches()
    fetches.add("tile", plgpu.SMEM((1, 128), jnp.float32))
    inputs, outputs, how = {"x": jnp.ones((2, 128))}, {"out": ((2, 128), jnp.float32)}, mosaic_gpu.interpret()
    return mosaic_gpu.launch("copied", body, inputs, outputs, fetches.scratch(), {"i": 2}, interpret=how)["out"]


def test_a_race_with_a_copy_is_told():
    with pytest.raises(TOLD, match="(?i)a race|race detected"), races.checked_on_gpu():
        jax.block_until_ready(copied(wait=False))
    races.gpu_callbacks.reset_gpu_interpret_mode_state()  # after an error


def test_no_race_is_told_after_a_copy():
    with races.checked_on_gpu():
        assert jnp.all(copied(wait=True) == 1)


@pytest.mark.skipif(races.CORES == 1, reason="two cores cannot be interpreted on one")
@pytest.mark.parametrize("kernels", [(True, False), (False, True)], ids=["in_the_first_kernel", "in_the_second"])
def test_a_race_is_told(kernels):
    with pytest.raises(TOLD, match="(?i)a race|race detected"):
        with races.checked():
            jax.block_until_ready(jax.jit(lambda: first_then_second(*kernels))())
    races.interpret_pallas_call.reset_tpu_interpret_mode_state()  # after an error


def test_no_race_is_told_where_there_is_none():
    with races.checked():
        first, _ = jax.jit(lambda: first_then_second(False, False))()
    assert first[0, 0] == 1 and first[8, 0] == 2


def test_a_call_that_runs_no_kernel_is_told():
    with pytest.raises(AssertionError, match="no kernel"), races.checked():
        jax.block_until_ready(jnp.ones(3) + 1)
