"""What eight devices, each with a part of the time, send for one mixer's forward and backward pass on packed rows: a
program, as devices are made once a process. It prints a JSON object a length of each family, of bytes that a device
sends.

    python -m tests.zoo.exchanged gla,mamba 4096 32768
"""

import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from zoo import hlo, sharding
from zoo.mixers import MIXERS, Sizes

WIDTH = 64


def compiled_text(family: str, time: int) -> str:
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, sequence=8))
    cls = MIXERS[family]
    mixer = cls(cls.config_class(), Sizes(WIDTH, 1), layer_index=0, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixer, nnx.Param)
    stacked = nnx.merge(graphdef, jax.tree.map(lambda p: p[None], params))
    of_depth = cls.over_depth([stacked], jnp.zeros((1, 1), jnp.int32), 1)
    given = {} if of_depth is None else {"depth": of_depth[0, 0]}

    def loss(params, x, ids):
        y, _ = nnx.merge(graphdef, params)(x, segment_ids=ids, **given)
        return sharding.constrain(y, "batch", "time", None).sum()

    of_x = NamedSharding(mesh, sharding.partition_spec("batch", "time", None))
    x = jax.ShapeDtypeStruct((1, time, WIDTH), jnp.float32, sharding=of_x)
    ids = jax.ShapeDtypeStruct((1, time), jnp.int32, sharding=sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(NamedSharding(mesh, PartitionSpec()), of_x))
        return gradient.lower(params, x, ids).compile().as_text()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for family in sys.argv[1].split(","):
        for time in map(int, sys.argv[2:]):
            found = hlo.collectives(compiled_text(family, time))
            figures = {"bytes": hlo.total_bytes(found), "kinds": hlo.by_kind(found)}
            print(json.dumps({"family": family, "time": time} | figures), flush=True)
