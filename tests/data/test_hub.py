"""`hf:` sources: what they mean, and that they are read from a server that speaks as the hub does, or its cache."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from tests.data.hub_server import COMMIT, serving
from zoo.data import corpora, hub
from zoo.errors import UsageError

NAME = "some-group/some.texts"
CARD = """---
configs:
- config_name: large
  default: true
  data_files:
  - {split: train, path: large/*.parquet}
  - {split: validation, path: validation.parquet}
- config_name: small
  data_files: small.parquet
---
"""
# What is asked of each source in a process of its own, since the hub's packages read their settings when imported.
READ = """
import json, sys
from zoo.data import corpora
from zoo.errors import UsageError
for spec, field in json.load(sys.stdin):
    try:
        source = corpora.find(spec, field)
        texts = [b"".join(pieces).decode() for _, _, pieces in source.texts(True)]
        print(json.dumps([texts, source.identity(), source.hub.revision]))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    "spec, message",
    [
        ("hf:", "expected hf: and a name of the hub, as in hf:HuggingFaceFW"),
        ("hf:a/b/c", "expected hf: and a name of the hub"),
        ("hf:../b", "expected hf: and a name of the hub"),
        ("hf:a/b?splt=train", "unknown 'splt'; known, nearest first: split"),
        ("hf:a/b?split=", "expected each of config, split, revision, take once, with a value"),
        ("hf:a/b?split=a&split=b", "once"),
        ("hf:a/b?take=0", "take: got '0', expected a number of rows, at least 1"),
        ("hf:a/b?take=many", "take: got 'many'"),
    ],
)
def test_what_is_no_data_set_is_refused(spec, message):
    with pytest.raises(UsageError) as error:
        corpora.find(spec, "text")
    assert message in str(error.value)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    with pytest.raises(UsageError, match=r"pip install 'sequence-zoo\[hf\]'; or download"):
        corpora.find("hf:a/b", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set as it lies on the hub."""
    root = tmp_path_factory.mktemp("data_set")
    (root / "large").mkdir()
    for part in range(2):
        texts = [f"large {part} {row}" for row in range(3)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "row": [0, 1, 2]}), root / f"large/{part}.parquet")
    for name, texts in {"validation": ["of validation"], "small": ["small 0", None]}.items():
        table = pyarrow.table({"text": texts, "row": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, root / f"{name}.parquet")
    (root / "README.md").write_text(CARD)
    return root


def read(specs, home, **environment):
    environment = os.environ | {"HF_HOME": str(home), "JAX_PLATFORMS": "cpu"} | environment
    asked = json.dumps([spec if isinstance(spec, list) else [spec, "text"] for spec in specs])
    done = subprocess.run([sys.executable, "-c", READ], input=asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_rows_come_from_the_hub_and_from_its_cache_where_there_is_none(folder, tmp_path):
    pytest.importorskip("datasets")
    pinned = f"hf:{NAME}?revision={COMMIT}"
    specs = [
        f"hf:{NAME}",
        pinned,
        f"hf:{NAME}?split=validation",
        f"hf:{NAME}?take=4",
        f"hf:{NAME}?config=small",
        f"hf:{NAME}?config=smal",
        f"hf:{NAME}?split=test",
        [f"hf:{NAME}", "content"],
        "hf:some-group/others",
        f"hf:{NAME}?revision=v2",
    ]
    with serving(NAME, folder) as address:
        all_rows, by_commit, validation, four, *refused = read(specs, tmp_path / "online", HF_ENDPOINT=address)
    large = [f"large {part} {row}" for part in range(2) for row in range(3)]
    assert all_rows == by_commit and all_rows[0] == large and all_rows[2] == COMMIT
    assert (validation[0], four[0]) == (["of validation"], large[:4])
    assert len({source[1] for source in (all_rows, validation, four)}) == 3
    for message, expected in zip(refused, ("row 1: 'text' is not a string but null", "no config 'smal'; nearest: small",
                                           "no split 'test'; it has train, validation",
                                           "no column 'content' (it has: row, text)", "the hub has none of that name",
                                           "the hub has none of that name or revision"), strict=True):  # fmt: skip
        assert isinstance(message, str) and expected in message

    cached = tmp_path / "offline/hub" / f"datasets--{NAME.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert read([*specs[:2], "hf:some-group/others"], tmp_path / "offline", **offline)[:2] == [all_rows, all_rows]
    missing, unread = read([f"hf:{NAME}", pinned], tmp_path / "empty", **offline)
    for message in (missing, unread):
        assert "the hub cannot be reached, and its cache has no" in message and "?revision= and 40 digits" in message


def test_a_split_is_read_once(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: True)
    same = f"hf:a/b?revision={COMMIT}"
    with pytest.raises(UsageError, match="read the same text"):
        corpora.find_all(f"{same},{same}&take=3", "text")
    assert len(corpora.find_all(f"{same},{same}&split=validation", "text")) == 2
