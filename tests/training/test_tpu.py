"""The training step of the larger presets, compiled for TPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.tpu import compile_for_tpu, devices
from zoo import config, sharding
from zoo.training import step


@pytest.mark.slow  # tests/training/test_aot.py compiles a step for four chips too
@pytest.mark.parametrize("mixer", ["attention", "gla,attention"])
def test_the_step_with_softmax_attention_compiles_for_four_chips(mixer):
    chips = devices("v5e")
    c = config.preset("tiny")
    c.model.mixer, c.model.vocab_size, c.model.dtype, c.model.num_layers = mixer, 512, "bfloat16", 2
    c.train.batch_size, c.train.context_length, c.mesh.data, c.mesh.tensor = 4, 256, 2, 2
    programs = step.build(c, sharding.make_mesh(c.mesh, chips))
    batch = {name: jnp.int32 for name in ("tokens", "targets", "segment_ids")} | {"weights": jnp.float32}
    batch = {n: jax.ShapeDtypeStruct((4, 256), dtype, sharding=programs.batch_sharding) for n, dtype in batch.items()}
    compiled = compile_for_tpu(programs.train.lower(programs.abstract_state, batch))
    assert compiled.as_text().count("tpu_custom_call") >= 3  # splash attention: forward, dq, dk and dv


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gla", "retnet"])
def test_the_step_of_340m_compiles_with_the_kernels_in_it(mixer):
    chips = devices("v5e")
    c = config.preset("340m")
    c.model.mixer, c.model.vocab_size, c.model.dtype, c.model.remat = mixer, 32000, "bfloat16", "minimal"
    c.train.batch_size, c.train.context_length, c.mesh.fsdp = 8, 2048, 4
    programs = step.build(c, sharding.make_mesh(c.mesh, chips))
    rows = (c.train.batch_size, c.train.context_length)
    batch = {name: jnp.int32 for name in ("tokens", "targets", "segment_ids")} | {"weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(rows, dtype, sharding=programs.batch_sharding) for name, dtype in batch.items()}
    compiled = compile_for_tpu(programs.train.lower(programs.abstract_state, batch))
    text = compiled.as_text()
    family = {"gla": "per_key", "retnet": "scalar"}[mixer]
    assert f"linear_attention_{family}_forward" in text and f"linear_attention_{family}_backward" in text
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 16 * 2**30  # a v5e's
