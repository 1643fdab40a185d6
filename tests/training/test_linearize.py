"""Runs that start from the weights of a run with other mixers, and learn from it."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tests.conftest import XLA_FLAGS
from tests.interop import tiny
from zoo import checkpoints, interop, memory, sharding
from zoo import config as zoo_config
from zoo.errors import UsageError
from zoo.evaluate.__main__ import main as evaluate
from zoo.linearize.__main__ import main as importance
from zoo.training import train
from zoo.training.step import build

SOFTMAX = {"model.mixer": "attention", "model.num_layers": 4, "model.attention.num_heads": 2, "train.steps": 1}
HYBRID = SOFTMAX | {"model.mixer": "gla,attention", "model.gla.expand_k": 1.0}
SPREAD = {} if jax.device_count() == 1 else {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}


def leaves(workdir):
    params = nnx.state(checkpoints.load_run(workdir).model, nnx.Param)
    return {name: np.asarray(x) for name, x in checkpoints.named_leaves(params).items()}


def same_on_eight_devices(test, found, tmp_path):
    """Where there is one device: `test`, again in a process that has eight, finds what this one did. Devices are made
    once a process."""
    if SPREAD:
        np.savez(tmp_path / "found.npz", **found)
        return
    eight, itself = tmp_path / "eight", f"{__file__}::test_{test}"
    environment = os.environ | {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow", f"--basetemp={eight}", itself]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    [path] = {path.resolve() for path in eight.glob("*/found.npz")}  # pytest links to the newest folder too
    for name, of_eight in np.load(path).items():
        np.testing.assert_allclose(of_eight, found[name], rtol=2e-4, err_msg=name)


def test_a_hybrid_takes_over_softmax_attention_and_its_mixers_learn_alone(make_config, tmp_path, losses, capsys):
    teacher, workdir = tmp_path / "teacher", tmp_path / "hybrid"
    train(make_config(**SOFTMAX), teacher)
    config = make_config(**HYBRID | {"optimizer.learning_rate": 1e-6})
    config.train.distill.teacher, config.train.distill.stage = str(teacher), "mixers"
    capsys.readouterr()
    train(config, workdir, init_from=str(teacher))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line for line in lines if line and line[0].startswith("units.")}
    assert shown["units.blocks.0.mixer.q.kernel"][1:] == "[2, 16, 16] q, 2 heads of 8".split()
    assert shown["units.blocks.1.mixer.q.kernel"][-1] == "kept"
    assert "fresh:" in shown["units.blocks.0.mixer.output_gate.kernel"]
    # Of the layers of attention the first and third became GLA; nothing else has moved, by weight decay either.
    theirs, found = leaves(teacher), leaves(workdir)
    for name, x in found.items():
        if name.startswith("units.blocks.0.mixer."):
            continue
        place = int(name.split(".")[2]) if name.startswith("units.") else 0
        wanted = theirs[name.replace("blocks.1", "blocks.0")]
        np.testing.assert_array_equal(x, wanted[place::2] if name.startswith("units.") else wanted, name)
    for name in ("q", "k", "v", "out"):
        x, wanted = (of[f"units.blocks.0.mixer.{name}.kernel"] for of in (found, theirs))
        np.testing.assert_allclose(x, wanted[::2], atol=1e-4)
        assert (x != wanted[::2]).any()
    # Repeated, with a step more: it goes on from its own checkpoint, and MLPs are as wide as the teacher's.
    config.train.steps = 2
    train(config, workdir, init_from=str(tmp_path / "gone"))
    assert list(losses(workdir)) == [1, 2]
    with pytest.raises(UsageError, match="gla has nothing that another family takes over"):
        train(make_config(**SOFTMAX | {"model.mixer": "retnet"}), tmp_path / "none", init_from=str(workdir))
    with pytest.raises(UsageError, match="train.distill.rank: got 2, which is of a teacher's logits"):
        make_config(**{"train.distill.rank": 2})
    config.model.d_model = 32
    with pytest.raises(UsageError, match="train.distill.teacher=.*its model.d_model is 16, and 32 here"):
        build(config, sharding.make_mesh(config.mesh))


@pytest.mark.slow
def test_logits_are_learnt_alike_in_pieces_and_after_a_stop(make_config, tmp_path, losses, monkeypatch):
    """Those of low rank with less memory than moments of whole matrices would take."""
    teacher = tmp_path / "teacher"
    train(make_config(**SOFTMAX), teacher)
    found = {}
    runs = (
        ("whole", [4], {}, 0),
        ("pieces", [4], {"train.accumulate_steps": 2}, 0),
        ("whole, of low rank", [4], {}, 2),
        ("resumed, of low rank", [2, 4], {}, 2),
    )
    for name, steps, settings, rank in runs:
        settings = HYBRID | {"model.gla.num_heads": 2, "optimizer.schedule": "constant"} | settings
        settings["optimizer.warmup_steps"] = 0  # of the number of steps, which a stopped run does not know
        for last in steps:
            config = make_config(**settings | {"train.steps": last, "checkpoint.every": 2})
            config.train.distill.teacher, config.train.distill.tokens_weight = str(teacher), 0.25
            config.train.distill.temperature, config.train.distill.teacher_dtype = 2.0, "bfloat16"
            config.train.distill.rank = rank
            if rank:
                whole = zoo_config.read_json(tmp_path / "whole" / "config.json")
                with_moments = sum(memory.training(whole)) + sum(x.nbytes for x in leaves(teacher).values())
                monkeypatch.setattr(memory, "host_memory", lambda with_moments=with_moments: with_moments - 1)
            train(config, tmp_path / name, init_from=str(teacher))
        found[name] = np.asarray(list(losses(tmp_path / name).values()))
    np.testing.assert_array_equal(found["resumed, of low rank"], found["whole, of low rank"])
    np.testing.assert_allclose(found["pieces"], found["whole"], rtol=2e-4)


@pytest.mark.slow
def test_both_stages_on_eight_devices_are_those_on_one(make_config, tmp_path, losses):
    """With updates of low rank, too. With a teacher in float32: rounded to bfloat16 it moves the norm of the fourth
    step's gradient by 4%."""
    softmax = SOFTMAX | {"train.batch_size": 8}
    hybrid = softmax | HYBRID | {"model.gla.num_heads": 2, "train.steps": 3, "train.batch_size": 8}
    train(make_config(**softmax | SPREAD), tmp_path / "teacher")
    found = {}
    for stage, rank in (("mixers", 0), ("logits", 0), ("logits", 2)):
        config, name = make_config(**hybrid | SPREAD), f"{stage}{rank or ''}"
        config.train.distill.teacher, config.train.distill.stage = str(tmp_path / "teacher"), stage
        config.train.distill.rank = rank
        train(config, tmp_path / name, init_from=str(tmp_path / "teacher"))
        found[name] = list(losses(tmp_path / name).values())
    # Of low rank: what the teacher has moves by that, or not at all.
    before, after = leaves(tmp_path / "teacher"), leaves(tmp_path / "logits2")
    for name in ("embed.embedding", "norm.scale"):
        np.testing.assert_array_equal(after[name], before[name])
    moved = after["units.blocks.1.mlp.up.kernel"] - before["units.blocks.0.mlp.up.kernel"][1::2]
    sizes = np.linalg.svd(moved, compute_uv=False)
    assert (sizes[:, 1] > 1e-4).all() and (sizes[:, 2] < 1e-2 * sizes[:, 1]).all()
    same_on_eight_devices("both_stages_on_eight_devices_are_those_on_one", found, tmp_path)


IMPORTED = {  # with grouped heads, and what its family has beside them
    "llama": ({"model.mixer": "gla", "model.gla.expand_k": 1.0}, "gla"),
    "qwen2": (
        {
            "model.mixer": "mamba2,attention", "model.attention.biases": "q,k,v,out",
            "model.mamba2.expand": 1, "model.mamba2.head_dim": 4, "model.mamba2.state_dim": 4,
            "model.mamba2.biases": "in_xBC,in_dt,in_z,out",
        },
        "bamba",
    ),
}  # fmt: skip


@pytest.mark.slow
def test_an_imported_model_is_linearized_and_exported_on_eight_devices_as_on_one(make_config, tmp_path, losses):
    """Transfer, both stages, evaluation, and export in a format that has the new mixers. Llama's has 4 heads of q on 2
    of k and v, Qwen2's the same with biases."""
    (tmp_path / "text").mkdir()
    for i, words in enumerate(np.random.default_rng(0).geometric(0.2, (40, 150)).clip(max=39)):
        (tmp_path / "text" / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    found = {}
    for name, (mixers, model_type) in IMPORTED.items():
        teacher = tmp_path / name
        interop.import_model(str(tiny.folder(tmp_path / f"{name}-theirs", name)), str(teacher))
        source = str(teacher)
        for stage in ("mixers", "logits"):
            config = make_config(
                **{
                    "data.source": f"{tmp_path}/text/*.txt", "data.cache_dir": f"{tmp_path}/cache",
                    "train.steps": 20, "train.batch_size": 8, "checkpoint.every": 20, "optimizer.learning_rate": 1e-3,
                }
                | SPREAD
            )  # fmt: skip
            imported = zoo_config.read_json(teacher / "config.json")
            config.model, config.data.tokenizer = imported.model, imported.data.tokenizer
            for setting, value in mixers.items():
                *path, field = setting.split(".")
                setattr(functools.reduce(getattr, path, config), field, value)
            config.train.distill.teacher, config.train.distill.stage = str(teacher), stage
            workdir = tmp_path / f"{name}-{stage}"
            train(config, workdir, init_from=source)
            found[f"{name} {stage}"] = list(losses(workdir).values())
            source = str(workdir)
        assert np.asarray(found[f"{name} mixers"])[-5:, 0].mean() < np.asarray(found[f"{name} mixers"])[0, 0]
        evaluate([f"--workdir={source}", "--tasks=perplexity"])
        tasks = json.loads((tmp_path / f"{name}-logits" / "evaluate.json").read_text())["tasks"]
        found[f"{name} evaluated"] = [tasks["perplexity"]["by_context_length"][0]["loss"]]
        out = interop.export_run(source, str(tmp_path / f"{name}-out"))
        assert out.model_type == model_type
        again = interop.import_model(str(tmp_path / f"{name}-out"), str(tmp_path / f"{name}-again"))
        for parameter, x in leaves(source).items():
            np.testing.assert_array_equal(leaves(again.workdir)[parameter], x)
    same_on_eight_devices("an_imported_model_is_linearized_and_exported_on_eight_devices_as_on_one", found, tmp_path)


@pytest.mark.slow
def test_the_layers_that_a_run_can_spare_are_named_by_one_command(make_config, tmp_path, capsys):
    train(make_config(**SOFTMAX), tmp_path / "run")
    command = ["importance", f"--workdir={tmp_path}/run", "--batches=1", "--recall=mqar?pairs=2&vocab_size=64"]
    found = []
    for steps in (0, 2):
        capsys.readouterr()
        importance([*command, "--mixer=gla@num_heads=2", f"--steps={steps}", "--budget=2", "--by=recall_loss"])
        path = tmp_path / "run" / "importance-gla-num-heads-2.json"
        found.append(json.loads(path.read_text()))
        assert path.with_suffix(".png").stat().st_size > 1000
        assert f"--config.model.mixer={found[-1]['pattern']}\n" in capsys.readouterr().out
        assert found[-1]["none"].keys() == {"loss", "bits_per_byte", "recall_loss", "recall"}
        assert [row["layer"] for row in found[-1]["layers"]] == [0, 1, 2, 3]
        kept = found[-1]["pattern"].split(",") * 4
        assert [layer for layer in range(4) if kept[layer] == "attention"] == sorted(found[-1]["order"][:2])
    assert found[0]["none"] == found[1]["none"] and found[0]["layers"] != found[1]["layers"]
    with pytest.raises(SystemExit, match="2"):
        importance([*command, "--mixer=gla", "--budget=5"])
    assert "--budget: got 5, and the run has 4 layers" in capsys.readouterr().err
