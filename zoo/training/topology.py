"""Accelerators that are not there: compilers work for them on any x86-64 Linux machine.

    v5e:4x4   sixteen TPUs, laid out four by four: a name of `zoo.chips`, and the sides of the torus
    h200:8    eight GPUs, all in reach of one another

Programs for them are compiled and never run.
"""

import importlib.util
import os
import pathlib
import re

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from zoo.chips import CHIPS
from zoo.errors import UsageError
from zoo.settings import shown

# Shapes by the number of sides.
EXAMPLES = {0: ("1", "8"), 2: ("2x2", "4x4", "8x8", "16x16"), 3: ("2x2x1", "2x2x2", "4x4x4", "8x8x8")}
# libtpu makes two devices of a v4 that is not there, and jax lays such on no mesh.
TPUS = {name: chip for name, chip in CHIPS.items() if chip.sides and name != "v4"}
GPUS = {"h200": pathlib.Path(__file__).with_name("h200.txtpb")}  # what the compiler asks a GPU for
# libtpu looks for its machine, and locks it; several processes may compile at a time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str) -> list[jax.Device]:
    """The devices of a topology such as "v5p:4x4x4" or "h200:8".

    Raises:
      UsageError: what compiles for it is not installed, or knows no such topology.
    """
    family, _, shape = name.partition(":")
    if family not in TPUS and family not in GPUS:
        raise UsageError(f"--aot={shown(name)}: no such topology; {_known()}")
    sides = CHIPS[family].sides
    if not re.fullmatch(r"[1-9]\d{0,3}" + r"x[1-9]\d{0,3}" * (sides - 1), shape):
        expected = f"{sides} sides" if sides else "a number of GPUs"
        raise UsageError(f"--aot={shown(name)}: expected {expected}, as {family}:{EXAMPLES[sides][1]}; {_known()}")
    return _gpus(name, family, int(shape)) if family in GPUS else _tpus(name)


def _gpus(name: str, family: str, count: int) -> list[jax.Device]:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        advice = "`make build/gpu-compile` fetches them without a GPU; then put that folder on PYTHONPATH"
        raise UsageError(f"--aot={name} needs jax's CUDA plugin and ptxas: {advice}")
    options = {"target_config": GPUS[family].read_text(), "topology": f"1x1x{count}"}
    return list(topologies.get_topology_desc(platform="cuda", topology_name=family, **options).devices)


def _tpus(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(f"--aot={name} needs libtpu, for x86-64 Linux: pip install 'jax[tpu]'")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        hosts = re.search(r'chips_per_host_bounds "([\dx]+)"', str(error))
        why = f"a host has {hosts[1]} chips, and the sides are no multiples of it" if hosts else str(error)
        raise UsageError(f"--aot={name}: libtpu knows no such topology ({why}); {_known()}") from error


def _known() -> str:
    families = (f"{name}:{', '.join(EXAMPLES[CHIPS[name].sides])}" for name in (*TPUS, *GPUS))
    return f"known ones, and shapes of theirs: {'; '.join(families)}"


def compile_for(platform: str, traced: jax.stages.Traced) -> jax.stages.Compiled:
    """Without the persistent cache: jax can write such programs to it, but not read them without the device."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax remembers whether it had one
    try:
        return traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)).compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
