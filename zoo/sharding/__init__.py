"""How arrays lie on devices; nothing else knows.

`mesh` is the grid of devices, `rules` the table from an array's dimensions to its axes, `local` runs a function on each
device's part of its arrays, and `sequence` is what devices exchange where the parts are pieces of one sequence. A mesh
of one device is the same program with nothing to spread.
"""

from zoo.sharding.local import axis_size, constrain, on_each_device, use_mesh
from zoo.sharding.mesh import MESH_AXES, MeshConfig, abstract_mesh, axis_sizes, make_mesh
from zoo.sharding.rules import (
    RULES,
    batch_sharding,
    devices_of,
    dotted,
    logical_axes,
    named_shardings,
    parameter_specs,
    parameters,
    partition_spec,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "MeshConfig",
    "abstract_mesh",
    "axis_size",
    "axis_sizes",
    "batch_sharding",
    "constrain",
    "devices_of",
    "dotted",
    "logical_axes",
    "make_mesh",
    "named_shardings",
    "on_each_device",
    "parameter_specs",
    "parameters",
    "partition_spec",
    "use_mesh",
]
