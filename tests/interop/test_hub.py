"""`import hf:NAME`: from a server that speaks as the hub does, from its cache, and what is said without either."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.data.hub_server import COMMIT, serving
from tests.interop import tiny
from zoo.errors import UsageError
from zoo.interop import hub

NAME = "some-group/some.model"
FIND = """
import json, os, sys
from zoo.errors import UsageError
from zoo.interop.hub import folder_of
for spec in sys.argv[1:]:
    try:
        folder, said = folder_of(spec)
        print(json.dumps([str(folder), said, sorted(os.listdir(folder))]))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


def find(*specs, home, **environment):
    environment = os.environ | {"HF_HOME": str(home), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", FIND, *specs], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow  # five processes that import it all
def test_a_model_comes_from_the_hub_and_from_its_cache(tmp_path):
    there = tiny.folder(tmp_path / "there")
    (there / "modeling.py").write_text("raise SystemExit('code of others was run')")
    (there / "pytorch_model.bin").write_bytes(b"a pickle")
    pinned = f"hf:{NAME}?revision={COMMIT}"
    with serving(NAME, there, "models") as address:
        online = {"home": tmp_path / "home", "HF_ENDPOINT": address}
        by_branch, by_commit, unknown = find(f"hf:{NAME}", pinned, "hf:some-group/another", **online)
    folder, said, names = by_branch
    assert by_commit == by_branch and said == pinned
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "the hub has none of that name or revision" in unknown
    offline = {"HF_HUB_OFFLINE": "1"}
    assert find(f"hf:{NAME}", pinned, home=tmp_path / "home", **offline) == [by_branch, by_branch]
    (missing,) = find(f"hf:{NAME}", home=tmp_path / "empty", **offline)
    assert "the hub cannot be reached, and its cache has no main of it" in missing

    (there / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "home")
    with serving(NAME, there, "models") as address:
        (pickled,) = find(f"hf:{NAME}", home=tmp_path / "home", HF_ENDPOINT=address)
    assert "no safetensors there, its weights are pickled (pytorch_model.bin)" in pickled


@pytest.mark.parametrize("spec", ["hf:", "hf:a/../b", "hf:a/b?split=train"])
def test_what_names_no_model_is_refused(spec):
    with pytest.raises(UsageError, match="import: "):
        hub.folder_of(spec)
