"""Compiled programs are kept between commands, where it can be done, and nothing depends on it."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import pytest

from zoo import compile_cache

PROGRAM = """
import collections, sys, warnings
import jax, jax.numpy as jnp
warnings.simplefilter("error")
import zoo.training, zoo.evaluate, zoo.generate
assert not jax.config.jax_compilation_cache_dir or "JAX_COMPILATION_CACHE_DIR" in __import__("os").environ
from zoo import compile_cache
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
compile_cache.enable()
print(jax.jit(lambda x: jnp.cumsum(jnp.sin(x)))(jnp.arange(9.0)).tobytes().hex())
print(events["cache_hits"], events["cache_misses"], jax.config.jax_compilation_cache_dir)
"""


def run(tmp_path, **variables):
    """What the program computed, programs loaded, programs compiled with a cache in use, and the folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    value, counts = done.stdout.splitlines()
    hits, misses, folder = counts.split()
    return value, int(hits), int(misses), folder


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_computes_the_same(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert first[1] == 0 < first[2] and first[3].startswith(str(tmp_path / "sequence-zoo" / "xla"))
    assert second[:3] == (first[0], first[2], 0)
    for file in (tmp_path / "sequence-zoo" / "xla").glob("*/*-cache"):  # as a full disk or a kill leaves it
        file.write_bytes(file.read_bytes()[:20])
    assert run(tmp_path)[0] == first[0]


@pytest.mark.slow
def test_who_wants_another_folder_or_none_gets_it(tmp_path):
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[3] == str(tmp_path / "own")
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[1:] == (0, 0, "None")
    (tmp_path / "file").write_text("")
    assert run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))[1:] == (0, 0, "None")  # cannot be written
    assert {path.name for path in tmp_path.iterdir()} == {"own", "file"}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """jax as a command finds it, without the tests' own cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    jax.config.update("jax_compilation_cache_dir", None)
    with warnings.catch_warnings():
        yield lambda: tuple(getattr(jax.config, name) for name in names)
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_default_folder_stands_beside_the_token_cache(settings, tmp_path):
    compile_cache.enable()
    folder, seconds = settings()
    assert pathlib.Path(folder).parent == tmp_path / "sequence-zoo" / "xla" and seconds == 0
    assert pathlib.Path(folder).is_dir()


def test_a_folder_that_cannot_be_written_is_no_error(settings, tmp_path):
    (tmp_path / "sequence-zoo").write_text("")
    before = settings()
    compile_cache.enable()
    assert settings() == before and before[0] is None


def test_jax_s_own_settings_win(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compile_cache.enable()
    assert settings()[0] == "/elsewhere"
    assert not list(tmp_path.iterdir())


def test_the_folder_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "LARGEST", 100)
    for i in range(12):
        path = tmp_path / f"{i}-cache"
        path.write_bytes(b"x" * 10)
        os.utime(path, (i, i))
    compile_cache._prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{i}-cache" for i in range(7, 12)}  # the newest 50 bytes
