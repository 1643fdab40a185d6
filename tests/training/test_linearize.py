"""Runs that start from the weights of a run with other mixers."""

import numpy as np
import pytest
from flax import nnx

from zoo import checkpoints
from zoo.errors import UsageError
from zoo.training import train


def leaves(workdir, step=None):
    params = nnx.state(checkpoints.load_run(workdir, step).model, nnx.Param)
    return {name: np.asarray(x) for name, x in checkpoints.named_leaves(params).items()}


def test_a_hybrid_starts_from_softmax_attention_and_resumes_by_the_same_command(make_config, tmp_path, losses, capsys):
    settings = {"model.mixer": "attention", "model.num_layers": 4, "train.steps": 1, "model.attention.num_heads": 2}
    train(make_config(**settings), tmp_path / "teacher")
    hybrid = settings | {"model.mixer": "gla,attention", "model.gla.expand_k": 1.0, "optimizer.learning_rate": 0.0}
    config = make_config(**hybrid)
    capsys.readouterr()
    train(config, tmp_path / "hybrid", init_from=str(tmp_path / "teacher"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line for line in lines if line and line[0].startswith("units.")}
    assert shown["units.blocks.0.mixer.q.kernel"][1:] == "[2, 16, 16] q, 2 heads of 8".split()
    assert shown["units.blocks.1.mixer.q.kernel"][-1] == "kept"
    assert "fresh:" in shown["units.blocks.0.mixer.output_gate.kernel"]
    theirs, found = leaves(tmp_path / "teacher"), leaves(tmp_path / "hybrid")
    for name in ("q", "k", "v", "out"):
        layers = theirs[f"units.blocks.0.mixer.{name}.kernel"]
        for place in (0, 1):
            np.testing.assert_array_equal(found[f"units.blocks.{place}.mixer.{name}.kernel"], layers[place::2])
    # Repeated, with a step more: it goes on from its own checkpoint, and MLPs are as wide as the teacher's.
    config.train.steps = 2
    train(config, tmp_path / "hybrid", init_from=str(tmp_path / "gone"))
    assert list(losses(tmp_path / "hybrid")) == [1, 2]
    with pytest.raises(UsageError, match="gla has nothing that another family takes over"):
        train(
            make_config(**settings | {"model.mixer": "retnet"}), tmp_path / "none", init_from=str(tmp_path / "hybrid")
        )
