"""The mesh, the rule table, and that every parameter of every family has its logical axes in it."""

import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx

from tests.kernels.tpu import torus
from zoo.config_files import family_config
from zoo.errors import UsageError
from zoo.mixers import MIXERS
from zoo.model import LanguageModel
from zoo.sharding import (
    MESH_AXES,
    RULES,
    MeshConfig,
    axis_sizes,
    batch_sharding,
    make_mesh,
    named_shardings,
    parameter_specs,
)


def test_one_device_makes_a_mesh_of_ones():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (1, 1, 1, 1)
    assert batch_sharding(mesh).spec == jax.sharding.PartitionSpec(("data", "fsdp"), "sequence")


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=2), "data=2.*does not fit 1 devices; use mesh.data=1"),
        (MeshConfig(fsdp=3), "does not fit 1 devices; use mesh.fsdp=1"),
        (MeshConfig(fsdp=-1), "at most one may be -1"),
        (MeshConfig(tensor=0), "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(config, jax.devices()[:1])


def test_sizes_that_would_fit_the_devices_are_named():
    def problem(devices, **sizes):
        return axis_sizes(MeshConfig(**sizes), devices)[1][0].partition("; ")[2]

    assert problem(8, data=1, fsdp=3) == "use mesh.fsdp=8"
    assert problem(8, data=2, fsdp=2) == "use mesh.data=4, mesh.fsdp=4, mesh.tensor=2 or mesh.sequence=2"
    assert problem(512, fsdp=24, tensor=4) == "use mesh.fsdp=16 or mesh.fsdp=32"
    assert problem(8, data=3, fsdp=3) == "sizes that fit divide it: 1, 2, 4, 8"


def test_a_torus_side_is_split_where_the_mesh_needs_it():
    """128 x 4 is no product of whole sides of 8 x 8 x 8; neighbours along `tensor` stay neighbours in the torus."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=128, tensor=4), torus("v5p:8x8x8"))
    assert mesh.devices.shape == (1, 128, 4, 1) and len({d.id for d in mesh.devices.flat}) == 512
    rows = np.array([[device.coords for device in row] for row in mesh.devices[0, :, :, 0]])
    assert (np.abs(np.diff(rows, axis=1)).sum(-1) == 1).all()


def test_a_mesh_that_no_torus_side_can_be_split_into_names_one_that_can():
    with pytest.raises(UsageError, match="torus of 4 x 4 x 20 chips; the nearest that can: data=1, fsdp=40, tensor=8"):
        make_mesh(MeshConfig(data=1, fsdp=32, tensor=10), torus("v5p:4x4x20"))


@pytest.mark.parametrize("family", MIXERS)
def test_every_dimension_of_every_parameter_is_named_in_the_rule_table(family):
    config = family_config(family).model
    config.vocab_size, config.tie_embeddings = 64, False
    state = jax.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param))
    names = {name for name, _ in RULES}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("out_sharding")
        assert axes is not None and len(axes) == len(variable.shape), f"{path} has no logical axes"
        assert set(axes) <= names, f"{path}: {axes}"
    shardings = named_shardings(state, make_mesh(MeshConfig(), jax.devices()[:1]), parameter_specs(state))
    assert all(isinstance(leaf, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(shardings))


def test_rules_spread_no_two_dimensions_of_a_parameter_over_one_axis():
    rules = dict(RULES)
    for axes in [("embed", "heads"), ("heads", "embed"), ("embed", "mlp"), ("vocab", "embed"), ("rank", "heads")]:
        used = [axis for name in axes for axis in np.atleast_1d(rules[name]) if axis is not None]
        assert len(used) == len(set(used))


def test_linear_attention_on_eight_devices_is_that_on_one():
    """Batch and heads spread, with q and k of their own, shared by all heads, and by some; XLA's form and a kernel."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from kernels.dispatch import use_implementation
        from zoo import ops, sharding
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))

        def draw(i, *shape):
            return jax.random.normal(jax.random.key(i), shape)

        for groups, decay, names in ((4, (2, 9, 4, 3), ("mosaic_tpu", "recurrent")), (1, (4,), ("chunked",)),
                                     (2, (2, 9, 4), ("chunked",)), (1, (3, 9, 4), ("recurrent",))):
            batch = decay[0] if len(decay) > 1 else 2
            args = [draw(0, batch, 9, groups, 3), draw(1, batch, 9, groups, 3), draw(2, batch, 9, 4, 5)]
            args.append(-jnp.exp(draw(3, *decay)))
            segment_ids = jnp.repeat(jnp.array([[0, 1, 2]]), 3, axis=1).repeat(batch, 0)

            def run(args):
                out, pull = jax.vjp(lambda args: ops.linear_attention(*args, segment_ids=segment_ids), args)
                return out, pull(out)

            for name in names:
                with use_implementation(name):
                    alone = jax.jit(run)(args)
                    with sharding.use_mesh(mesh):
                        spread = jax.jit(lambda args: run(args))(args)
                assert len(spread[0][0].sharding.device_set) == 8
                for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
                    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    """
    _run(program)


@pytest.mark.slow
def test_linear_scan_on_eight_devices_is_that_on_one():
    """Batch and channels spread, real and complex; a fixed decay gets the sum over the sequences of all devices."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from kernels.dispatch import use_implementation
        from zoo import ops, sharding
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))

        def draw(i, *shape):
            return jax.random.normal(jax.random.key(i), shape)

        for decay, turn, names in (((2, 9, 8), 0, ("mosaic_tpu", "chunked")), ((8,), 1j, ("mosaic_tpu", "chunked")),
                                   ((3, 9, 8), 1j, ("chunked",)), ((2, 9, 6), 0, ("chunked",))):
            batch, channels = decay[0] if len(decay) > 1 else 2, decay[-1]
            log_decay = -jnp.exp(draw(0, *decay)) + turn * draw(1, *decay)
            args = [draw(2, batch, 9, channels), log_decay, draw(3, batch, channels).astype(log_decay.dtype)]
            segment_ids = jnp.repeat(jnp.array([[0, 1, 2]]), 3, axis=1).repeat(batch, 0)

            def run(args):
                def call(x, log_decay, state):
                    return ops.linear_scan(x, log_decay, initial_state=state, segment_ids=segment_ids)

                out, pull = jax.vjp(call, *args)
                return out, pull(out)

            for name in names:
                with use_implementation(name):
                    alone = jax.jit(run)(args)
                    with sharding.use_mesh(mesh):
                        spread = jax.jit(lambda args: run(args))(args)
                assert len(spread[0][0].sharding.device_set) == 8
                for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
                    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    """
    _run(program)


@pytest.mark.slow
def test_the_selective_scan_on_eight_devices_is_that_on_one():
    """Batch and channels spread; what all sequences share (A, D) and all channels (B, C) gets the sum of its parts."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from kernels.dispatch import use_implementation
        from zoo import ops, sharding
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))

        def draw(i, *shape):
            return jax.random.normal(jax.random.key(i), shape)

        for batch, channels, names in ((2, 8, ("mosaic_tpu", "chunked")), (3, 8, ("chunked",)), (2, 6, ("chunked",))):
            args = {
                "x": draw(0, batch, 9, channels), "dt": jnp.exp(draw(1, batch, 9, channels)),
                "A": -jnp.exp(draw(2, channels, 3)), "B": draw(3, batch, 9, 3), "C": draw(4, batch, 9, 3),
                "D": draw(5, channels), "initial_state": draw(6, batch, channels, 3),
            }
            segment_ids = jnp.repeat(jnp.array([[0, 1, 2]]), 3, axis=1).repeat(batch, 0)

            def run(args):
                out, pull = jax.vjp(lambda args: ops.selective_scan(**args, segment_ids=segment_ids), args)
                return out, pull(out)

            for name in names:
                with use_implementation(name):
                    alone = jax.jit(run)(args)
                    with sharding.use_mesh(mesh):
                        spread = jax.jit(lambda args: run(args))(args)
                assert len(spread[0][0].sharding.device_set) == 8
                for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
                    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    """
    _run(program)


def test_attention_on_eight_devices_is_that_on_one():
    """As on TPUs, whose kernel is not partitioned: heads of k that the devices divide, that they do not, and one."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_num_cpu_devices", 8)
        from kernels import dispatch
        from zoo import ops, sharding
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=4))

        def draw(i, *shape):
            return jax.random.normal(jax.random.key(i), shape)

        for batch, heads, groups, pair in ((2, 8, 4, False), (2, 8, 2, True), (2, 8, 1, False), (3, 6, 6, True)):
            args = draw(0, batch, 9, heads, 4), draw(1, batch, 9, groups, 4), draw(2, batch, 9, groups, 5)
            ids = jnp.repeat(jnp.array([[0, 1, 2]]), 3, axis=1).repeat(batch, 0)
            given = {"segment_ids": (ids, ids) if pair else ids}
            given |= {"q_positions": jnp.arange(9)[None].repeat(batch, 0)} if pair else {}

            def run(args):
                out, pull = jax.vjp(lambda *args: ops.attention(*args, window=3, **given), *args)
                return out, pull(out)

            alone = jax.jit(run)(args)
            with sharding.use_mesh(mesh), dispatch.use_device(dispatch.Device("tpu", "TPU v5 lite")):
                spread = jax.jit(lambda args: run(args))(args)
            assert len(spread[0].sharding.device_set) == 8
            for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    """
    _run(program)


def _run(program):
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
