"""A strict session: array annotations are checked, warnings are errors (pyproject.toml), compilations are kept."""

import gc
import os
import tempfile
import zlib
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu compiles for TPUs that are not there, in several processes at a time.
for name, value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "sequence-zoo-jax-cache"))
# Compiling is what the tests wait for: a quarter as long without LLVM's optimisations, with XLA's older way to emit
# fusions, and with a program in one piece. Not for timings: `make test-slow` runs what users run.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):  # newer ones have no older way, and end on a flag that they do not know
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["kernels"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--part", default="0/1", help="K/N: one of N parts of the tests; all parts together are all tests")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("--part").split("/"))
    is_chosen = [zlib.crc32(item.nodeid.encode()) % parts == part for item in items]
    config.hook.pytest_deselected(items=[item for item, chosen in zip(items, is_chosen, strict=True) if not chosen])
    items[:] = [item for item, chosen in zip(items, is_chosen, strict=True) if chosen]


def pytest_collection_finish():
    """What was imported stays: looking for garbage, after each module at least, need not walk through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # tracing makes many objects, of which few are in cycles


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs():
    """After each module. A program holds half a dozen memory maps, and a process that has 65,530 of them, as Linux
    allows, ends in a segmentation fault: a thousand tests come to that."""
    yield
    jax.clear_caches()
