"""Compiled programs kept between processes: what one has compiled, the next one loads, bit for bit the same.

Commands call `enable` before their first program; importing `zoo` changes nothing. The folder stands beside the token
cache, one for each kind of processor, since a program for one is no program for another. jax's own settings win:
JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false switches it off.
"""

import hashlib
import os
import pathlib
import platform
import warnings

import jax

from zoo.data.cache import default_folder

LARGEST = 2 << 30  # bytes; beyond it what was written first goes first


def enable() -> None:
    """Load and keep programs from here on. A folder that cannot be written is no error: then nothing is kept."""
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = default_folder() / "xla" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _prune(folder)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A disk that is full, or a file that another process has not finished: the program is compiled, and that is all.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def _processor() -> str:
    """A name for this machine's kind of processor and what it can do."""
    try:
        about = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        kept = [line for line in about.splitlines() if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        kept = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(os.linesep.join(kept).encode()).hexdigest()[:12]}"


def _prune(folder: pathlib.Path) -> None:
    """Down to half of `LARGEST` where it is more. Another process may do the same."""
    with os.scandir(folder) as entries:
        files = [(entry.stat(), entry.path) for entry in entries if entry.is_file()]
    size = sum(status.st_size for status, _ in files)
    if size > LARGEST:
        for status, path in sorted(files, key=lambda file: file[0].st_mtime):
            pathlib.Path(path).unlink(missing_ok=True)
            size -= status.st_size
            if size <= LARGEST // 2:
                break
