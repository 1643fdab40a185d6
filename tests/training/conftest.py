"""A corpus of 40 small files, a model of a few thousand parameters, and training in real processes."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from zoo import config as zoo_config
from zoo import metrics

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["def", "return", "yield", "lambda", "import", "while", "None", "x", "y", "(a, b)", ":", "=", "\n"]
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words, 150)))
    return folder


@pytest.fixture
def make_config(corpus):
    """config(**{"train.steps": 3}): the tiny test config with some settings changed."""

    def make(**settings):
        config = zoo_config.preset("tiny")
        defaults = {
            "model.d_model": 16, "model.num_layers": 2, "model.gla.num_heads": 2,
            "data.source": f"{corpus}/*.txt", "data.cache_dir": f"{corpus}/cache", "data.validation_fraction": 0.1,
            "train.steps": 20, "train.batch_size": 4, "train.context_length": 32, "train.log_every": 1,
            "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.warmup_steps": 4,
            "checkpoint.every": 5, "eval.every": 10, "eval.batches": 2, "metrics.tensorboard": False,
        }  # fmt: skip
        for name, value in (defaults | settings).items():
            section = config
            *path, field = name.split(".")
            for part in path:
                section = getattr(section, part)
            setattr(section, field, value)
        zoo_config.validate(config)
        return config

    return make


@pytest.fixture
def losses():
    """losses(workdir): step -> (loss, gradient norm) of the training rows, as they stand in metrics.jsonl."""

    def read(workdir):
        rows = [row for row in metrics.read(workdir) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # no step twice, none missing
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}

    return read


@pytest.fixture
def start(tmp_path):
    """start(config, workdir, *flags): train.py, or another script, on a saved config, as a process of its own."""
    processes = []

    def run(config, workdir, *flags, script=ROOT / "train.py", before=(), environment=None):
        saved = tmp_path / f"{len(processes)}.json"
        saved.write_text(zoo_config.to_json(config))
        # With the XLA_FLAGS of tests/conftest.py: tiny models compile three times faster where nothing is optimised.
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        process = subprocess.Popen(
            [sys.executable, str(script), *map(str, before), f"--config={saved}", f"--workdir={workdir}", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
