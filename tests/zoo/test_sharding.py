"""The mesh, the rule table, and that every parameter of every family has its logical axes in it."""

import jax
import numpy as np
import pytest
from flax import nnx

from zoo.config import preset
from zoo.errors import UsageError
from zoo.mixers import MIXERS
from zoo.model import LanguageModel
from zoo.sharding import MESH_AXES, RULES, MeshConfig, batch_sharding, make_mesh, named_shardings


def test_one_device_makes_a_mesh_of_ones():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (1, 1, 1, 1)
    assert batch_sharding(mesh).spec == jax.sharding.PartitionSpec(("data", "fsdp"), "sequence")


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=2), "data=2.*does not fit 1 devices"),
        (MeshConfig(fsdp=3), "does not fit 1 devices"),
        (MeshConfig(fsdp=-1), "at most one may be -1"),
        (MeshConfig(tensor=0), "at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(config, jax.devices()[:1])


@pytest.mark.parametrize("family", MIXERS)
def test_every_dimension_of_every_parameter_is_named_in_the_rule_table(family):
    config = preset("tiny").model
    config.mixer, config.vocab_size, config.tie_embeddings = family, 64, False
    config.mlp = "channel_mixing" if family == "rwkv6" else "swiglu"
    with nnx.use_eager_sharding(False):
        state = jax.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param))
    names = {name for name, _ in RULES}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("out_sharding")
        assert axes is not None and len(axes) == len(variable.shape), f"{path} has no logical axes"
        assert set(axes) <= names, f"{path}: {axes}"
    shardings = named_shardings(state, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert all(isinstance(leaf, jax.sharding.NamedSharding) for leaf in jax.tree.leaves(shardings))


def test_rules_spread_no_two_dimensions_of_a_parameter_over_one_axis():
    rules = dict(RULES)
    for axes in [("embed", "heads"), ("heads", "embed"), ("embed", "mlp"), ("vocab", "embed"), ("rank", "heads")]:
        used = [axis for name in axes for axis in np.atleast_1d(rules[name]) if axis is not None]
        assert len(used) == len(set(used))
