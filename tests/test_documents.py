"""What the documents show is what runs."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from zoo.mixers import Sizes

ROOT = pathlib.Path(__file__).parent.parent
REGISTRY = "zoo/mixers/__init__.py"


def code_blocks(document):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def family_in_contributing():
    """Its four places: path, and what is written there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"`([\w/]+\.\w+)`[^`]*(?:`\w+`[^`]*)?:\n\n```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [path for path, _ in found] == ["zoo/mixers/linear/leaky.py", REGISTRY, "configs/leaky.py", "docs/zoo.md"]
    return dict(found)


def test_the_pieces_of_the_library_page_are_those_of_the_example():
    example = (ROOT / "examples" / "library.py").read_text()
    blocks = code_blocks("docs/library.md")
    assert len(blocks) >= 5
    for block in blocks:
        assert block in example


@pytest.mark.slow
def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, "examples/library.py"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.search(r"losses (.*)", done.stdout)[1].split()]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    assert "step 20 writes" in done.stdout and "in two pieces as in one: True" in done.stdout


def test_the_family_that_contributing_adds_is_a_mixer():
    module = types.ModuleType("leaky")
    exec(family_in_contributing()["zoo/mixers/linear/leaky.py"], module.__dict__)
    config, family = module.LeakyConfig(num_heads=2), module.Leaky
    assert family.check(config, 32) == [] and family.check(module.LeakyConfig(num_heads=3), 32) != []
    mixer = nnx.eval_shape(lambda: family(config, Sizes(d_model=32), layer_index=0, rngs=nnx.Rngs(0)))
    assert family.num_parameters(config, 32) == sum(x.size for x in jax.tree.leaves(nnx.state(mixer, nnx.Param)))

    def call(mixer, x):
        return mixer(x, state=mixer.init_state(3, 0, jnp.float32))

    y, state = nnx.eval_shape(call, mixer, jax.ShapeDtypeStruct((3, 7, 32), jnp.float32))
    assert (y.shape, state.shape) == ((3, 7, 32), (3, 2, 16, 16))


@pytest.mark.slow
def test_its_four_places_are_all_that_its_suite_needs(tmp_path):
    for name in ("kernels", "zoo", "configs", "tests", "docs", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for path, text in family_in_contributing().items():
        file = tmp_path / path
        if path == REGISTRY:
            line, entry = text.splitlines(keepends=True)
            start = "MIXERS: dict[str, type[Mixer]] = {\n"
            assert start in file.read_text()
            text = file.read_text().replace(start, line + start + entry)
        elif file.exists():
            text = file.read_text() + text
        file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/zoo/test_mixers.py", "tests/zoo/test_config.py", "-k", "leaky"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10
