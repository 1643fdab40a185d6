"""TPUs that are not there: libtpu compiles for them on any x86-64 Linux machine."""

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def devices(chip: str) -> list[jax.Device]:
    """Four devices of a chip by name; skips the test where libtpu is not installed."""
    return torus(TOPOLOGIES[chip])


def torus(topology: str) -> list[jax.Device]:
    """The devices of a topology by name, such as "v5p:8x8x8"; skips as `devices` does."""
    pytest.importorskip("libtpu", reason="ahead-of-time compilation for TPU needs libtpu (pip install 'jax[tpu]')")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_for_tpu(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Without the persistent cache: jax can write such programs to it, but not read them without the device."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax remembers whether it had one
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
