"""How a run lies on a mesh: overrides, what is refused before anything is compiled, and the dry run."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from kernels import dispatch
from zoo import config as zoo_config
from zoo import sharding
from zoo.config_files import load_config
from zoo.errors import UsageError
from zoo.mixers import MIXERS, Sizes
from zoo.training import command_line, placement, step
from zoo.training import train as train_run


def config(**settings):
    """A tiny model with its vocabulary settled, on a mesh with one copy, and some settings changed."""
    made = zoo_config.preset("tiny")
    made.model.vocab_size, made.mesh.data, made.optimizer.name = 320, 1, "adamw"
    for name, value in settings.items():
        section = made
        *path, field = name.split("__")
        for part in path:
            section = getattr(section, part)
        setattr(section, field, value)
    return made


def specs(made, sizes):
    """By path, of a whole state on a mesh that is not there."""
    mesh = sharding.abstract_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=True)))
    params = nnx.state(step.abstract_model(made), nnx.Param)
    state = step.abstract_state(made, mesh, params)
    return {name: leaf.sharding.spec for name, leaf in sharding.parameters(state).items() if hasattr(leaf, "sharding")}


# --- Overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_override_moves_a_parameter_with_its_optimizer_state(optimizer):
    moved = r"mixer\.q\.kernel$=none|none|data+fsdp,mixer=none|tensor|none,embedding=none|fsdp"
    with pytest.raises(UsageError, match=r"'mixer' has 3 dimension\(s\), and .* has 2: layers\|heads; write none for"):
        specs(config(mesh__overrides=moved), (2, 2, 2, 1))  # a bias
    moved = moved.replace(",mixer=", r",mixer\.[kv]\.kernel=")
    before = specs(config(optimizer__name=optimizer), (2, 2, 2, 1))
    after = specs(config(optimizer__name=optimizer, mesh__overrides=moved), (2, 2, 2, 1))
    assert before.keys() == after.keys()
    states = 0
    for name, spec in after.items():
        expected = before[name]
        if name.endswith("mixer.q.kernel"):
            expected = P(None, None, ("data", "fsdp"))  # the first match counts
        elif name.endswith(("mixer.k.kernel", "mixer.v.kernel")):
            expected = P(None, ("tensor",), None)
        elif name.endswith("embed.embedding"):
            expected = P(None, ("fsdp",))
        states += name.startswith("opt.") and spec != before[name]
        assert spec == expected, name
    assert states == {"adamw": 8, "muon": 5}[optimizer]  # moments of q, k, v and the embedding


def test_an_override_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(UsageError, match=r"'embde' matches no parameter; nearest: embed.embedding, .*--dry_run"):
        specs(config(mesh__overrides="embde=none|fsdp"), (1, 1, 1, 1))


def test_a_run_with_overrides_is_the_same_run():
    """On four devices: a step's loss and parameters, and where they and their moments are after it."""
    program = """
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 4)
        from zoo import sharding
        from zoo.checkpoints import named_leaves
        from zoo.config import preset
        from zoo.training import placement, step

        c = preset("tiny")
        c.model.mixer, c.model.num_layers, c.model.d_model, c.model.vocab_size = "mlp", 1, 32, 64
        c.train.batch_size, c.train.context_length, c.optimizer.name, c.optimizer.eps = 8, 8, "adamw", 1.0
        c.mesh.fsdp, c.mesh.tensor = 2, 2
        tokens = np.random.default_rng(0).integers(0, 64, (8, 9), dtype=np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        batch |= {"segment_ids": np.ones((8, 8), np.int32), "weights": np.ones((8, 8), np.float32)}
        losses, params = [], []
        for overrides in ("", "up.kernel=none|none|tensor+fsdp"):
            c.mesh.overrides = overrides
            placement.check(c, 4)
            programs = step.build(c, sharding.make_mesh(c.mesh))
            state, metrics = programs.train(programs.init(), programs.put(batch))
            losses.append(float(metrics["loss"]))
            params.append(named_leaves(state.params))
        np.testing.assert_allclose(*losses, rtol=1e-6)
        for name, p in params[0].items():
            np.testing.assert_allclose(p, params[1][name], rtol=1e-5, atol=1e-7)
        moved = {n: x for n, x in named_leaves(state).items() if n.endswith("up.kernel")}
        assert len(moved) == 3, list(moved)
        for x in moved.values():
            assert x.sharding.spec == jax.sharding.PartitionSpec(None, None, ("tensor", "fsdp")), x.sharding
            assert x.addressable_shards[0].data.shape == (1, 32, x.shape[2] // 4)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# --- What does not fit ------------------------------------------------------------------------------------------------

UNEVEN = {
    "batch": (
        {"train__batch_size": 12, "mesh__data": 4, "mesh__fsdp": 2},
        "train.batch_size: 12 sequences do not spread over mesh.data * mesh.fsdp = 8; use 8 or 16, or "
        "mesh.data * mesh.fsdp = 4, 6 or 12",
    ),
    "microbatch": (
        {"train__batch_size": 16, "train__accumulate_steps": 4, "mesh__fsdp": 8},
        "train.batch_size: 16 sequences in 4 microbatches do not spread over mesh.fsdp = 8; use 32, or "
        "mesh.fsdp = 1, 2 or 4",
    ),
    "evaluation": (
        {"eval__batch_size": 6, "mesh__fsdp": 4},
        "eval.batch_size: 6 sequences do not spread over mesh.fsdp = 4; use 4 or 8, or mesh.fsdp = 2, 3 or 6",
    ),
    "tokens": (
        {"train__context_length": 100, "mesh__sequence": 8},
        "train.context_length: 100 tokens do not spread over mesh.sequence = 8; use 96 or 104, or "
        "mesh.sequence = 4, 5 or 10",
    ),
    "heads": (
        {"mesh__tensor": 8},
        "model.gla.num_heads: 4 heads do not spread over mesh.tensor = 8; use 8, or mesh.tensor = 1, 2 or 4",
    ),
    "shared heads": (
        {"model__mixer": "attention", "model__attention__num_kv_heads": 2, "mesh__tensor": 4},
        "model.attention.num_kv_heads: 2 heads do not spread over mesh.tensor = 4",
    ),
    "vocabulary": (
        {"model__vocab_size": 257, "mesh__tensor": 2},
        "embed.embedding: vocab = 257 does not spread over mesh.tensor = 2; use 256 or 258, or mesh.tensor = 1 or 257",
    ),
    "MLP": (
        {"model__d_ff": 101, "mesh__tensor": 2},
        "units.blocks.0.mlp.down.kernel and 2 more: mlp = 101 does not spread over mesh.tensor = 2",
    ),
    "width": (
        {"train__batch_size": 24, "mesh__fsdp": 24},
        "embed.embedding and 9 more: embed = 256 does not spread over mesh.fsdp = 24; use 240 or 264, or "
        "mesh.fsdp = 8, 16 or 32",
    ),
    "override": (
        {"mesh__overrides": "head=fsdp|none,embedding=tensor+fsdp|none", "model__tie_embeddings": False,
         "train__batch_size": 6, "mesh__fsdp": 3, "mesh__tensor": 2},
        "embed.embedding: vocab = 320 does not spread over mesh.tensor * mesh.fsdp = 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("settings, message", UNEVEN.values(), ids=UNEVEN)
def test_what_does_not_spread_is_named_with_sizes_that_do(settings, message):
    made = config(**settings)
    devices = made.mesh.data * made.mesh.fsdp * made.mesh.tensor * made.mesh.sequence
    with pytest.raises(UsageError) as error:
        placement.check(made, devices)
    assert message in str(error.value)


def test_all_that_is_wrong_with_a_mesh_is_said_at_once():
    made = config(mesh__fsdp=3, mesh__tensor=5, mesh__sequence=7, eval__batch_size=7, mesh__overrides="nothing=none")
    with pytest.raises(UsageError) as error:
        placement.check(made, 8)
    starts = ("mesh:", "train.batch_size:", "eval.batch_size:", "train.context_length:", "model.gla.num_heads:")
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert [line.split(" ")[0] for line in lines] == [*starts, "mesh.overrides:"]


def test_training_refuses_a_bad_mesh_before_it_compiles(make_config, tmp_path):
    with pytest.raises(UsageError, match="mesh: data=-1, fsdp=3.*\n *train.batch_size: 4 sequences do not spread"):
        train_run(make_config(**{"mesh.fsdp": 3}), tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("family", MIXERS)
def test_a_family_whose_heads_would_be_on_every_device_says_so(family, monkeypatch):
    """Kernels on a mesh leave heads whole that the devices do not divide: all that pass the check are spread."""
    kept, on_each_device = [], sharding.on_each_device

    def watched(function, arrays, out_axes, **options):
        kept.extend(
            (axis, array.shape)
            for array, axes in arrays.values()
            if array is not None
            for axis, size in zip(axes, array.shape, strict=True)
            if axis == "heads" and size % sharding.axis_size("heads")
        )
        names = {axis for _, axes in arrays.values() for axis in axes}
        kept.extend([] if "heads" in names or "q" not in arrays else [("none", ())])
        return on_each_device(function, arrays, out_axes, **options)

    settings = MIXERS[family].config_class()
    sizes = Sizes(256, direction=MIXERS[family].directions[0])
    made = nnx.eval_shape(lambda: MIXERS[family](settings, sizes, layer_index=0, rngs=nnx.Rngs(0)))
    fields, (graphdef, state) = made.spread_over_tensor(), nnx.split(made)
    assert all(hasattr(settings, name) for name in fields)
    monkeypatch.setattr(sharding, "on_each_device", watched)
    for tensor in (4, 8):
        mesh = sharding.abstract_mesh({"data": 1, "fsdp": 1, "tensor": tensor, "sequence": 1})
        x = jax.ShapeDtypeStruct((2, 256, 256), "float32")
        kept.clear()
        with sharding.use_mesh(mesh), dispatch.use_device(dispatch.Device("tpu", "TPU v5 lite")):
            jax.eval_shape(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        assert not kept or any(heads % tensor for heads in fields.values()), (tensor, kept)


# --- The dry run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gla", "rwkv6", "mamba", "mamba2_hybrid"])
def test_a_dry_run_shows_each_parameter_on_a_line_of_a_hundred_columns(name):
    made = load_config(f"{name}:1.3b")
    made.mesh.fsdp, made.mesh.tensor, made.model.vocab_size = 64, 4, 50304
    before = len(jax.live_arrays())
    text = placement.dry_run(made)
    assert len(jax.live_arrays()) == before
    assert "data=1, fsdp=64, tensor=4, sequence=1: 256 devices" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    params = sharding.parameters(nnx.state(step.abstract_model(made), nnx.Param))
    lines = [line.split(" ")[0] for line in text.splitlines()]
    assert all(lines.count(path) == 1 for path in params)


def test_a_dry_run_adds_up():
    made = config(mesh__fsdp=4, mesh__tensor=2, mesh__overrides="embedding=none|none", model__d_model=128)
    lines = [line.split() for line in placement.dry_run(made).splitlines()]
    table = {line[0]: line[1:] for line in lines if line}
    assert table["embed.embedding"] == ["vocab=320", "embed=128", "164k", "164k"]  # moved: whole everywhere
    assert table["units.blocks.0.mixer.v.kernel"] == [
        "layers=3", "embed=128/fsdp", "heads=128/tensor", "197k", "24.6k",
    ]  # fmt: skip
    assert table["tokens"] == ["batch=8/fsdp", "time=256", "int32", "8.19k", "2.05k"]
    params = sharding.parameters(nnx.state(step.abstract_model(made), nnx.Param))
    everywhere = 4 * sum(p.size for p in params.values())
    rules = dict(sharding.RULES)
    parts = {"fsdp": 4, "tensor": 2, None: 1}
    each = 0
    for path, p in params.items():
        size = 4 * p.size
        for axis in sharding.logical_axes(p) if path != "embed.embedding" else ():
            size //= parts[rules[axis]]
        each += size
    amount = placement.memory.amount
    assert table["parameters"] == table["gradients"] == f"{amount(everywhere)} {amount(each)}".split()
    assert table["optimizer"] == f"{amount(2 * everywhere)} {amount(2 * each)}".split()


def test_a_dry_run_takes_the_devices_that_the_mesh_needs():
    def shape(devices=0, **sizes):
        return placement.dry_run(config(**sizes), devices).splitlines()[0].partition("data=")[2]

    assert shape(mesh__fsdp=8, mesh__data=-1).startswith("1, fsdp=8, tensor=1, sequence=1: 8 devices")
    assert shape(16, mesh__fsdp=-1, mesh__tensor=2).startswith("1, fsdp=8, tensor=2, sequence=1: 16 devices")
    with pytest.raises(UsageError, match="does not fit 12 devices"):
        shape(12, mesh__fsdp=8)


def test_the_command_writes_nothing(tmp_path):
    root = os.getcwd()

    command = [sys.executable, f"{root}/train.py", "--config=gla:tiny", "--dry_run", "--config.mesh.fsdp=4"]
    command += ["--devices=8", f"--workdir={tmp_path}/run"]
    environment = os.environ | {"PYTHONPATH": root, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "data=2, fsdp=4, tensor=1, sequence=1: 8 devices" in shown.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_checks_the_settings_first():
    with pytest.raises(UsageError, match="train.steps: got 0"):
        command_line.dry_run(config(train__steps=0))
