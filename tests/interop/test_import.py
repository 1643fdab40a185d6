"""An imported run is a run: types of the files, parts read alone, tied heads, other names, what is carried."""

import contextlib
import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from tests.interop import tiny
from zoo import checkpoints, interop
from zoo import config as zoo_config
from zoo.errors import UsageError
from zoo.interop import exporting, families, family, importing
from zoo.interop.files import open_folder, write_shards
from zoo.interop.table import SAME, table
from zoo.model import LanguageModel
from zoo.training import step


def rewritten(folder, **changes):
    path = folder / "model.safetensors"
    held = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(held | changes, path)


def test_bfloat16_stays_what_it_is_and_is_restored_as_float32(tmp_path):
    folder = tiny.folder(tmp_path / "theirs")
    narrow = {
        name: x.astype(ml_dtypes.bfloat16)
        for name, x in safetensors.numpy.load_file(folder / "model.safetensors").items()
    }
    safetensors.numpy.save_file(narrow, folder / "model.safetensors")
    made = interop.import_model(str(folder), str(tmp_path / "run"))
    assert made.dtypes == ["BF16"]
    run = checkpoints.load_run(made.workdir)
    named = checkpoints.named_leaves(nnx.state(run.model, nnx.Param))
    assert {x.dtype.name for x in named.values()} == {"float32"}
    theirs = narrow["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(named["units.blocks.0.mlp.up.kernel"][1], theirs.T)
    stored = sum(path.stat().st_size for path in (made.workdir / "checkpoints/0/params").rglob("*") if path.is_file())
    assert stored < 3 * sum(x.nbytes for x in narrow.values())  # and a few kilobytes a parameter of Orbax's own
    interop.export_run(str(made.workdir), str(tmp_path / "out"), dtype="bfloat16", shard_bytes=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert (safetensors.numpy.load_file(tmp_path / "out" / file)[name] == narrow[name]).all()
    again = interop.import_model(str(tmp_path / "out"), str(tmp_path / "again"))
    assert again.config.model == made.config.model


def test_a_part_is_read_alone(tmp_path):
    """What each device is handed is what `transform` makes of the whole, for every parameter."""
    weights = open_folder(tiny.folder(tmp_path / "theirs", "phi3"))
    about, _ = tiny.golden("phi3")
    of_model = families.FAMILIES["phi3"]
    model, _ = family.to_model(of_model, about["config"])
    abstract = nnx.state(step.abstract_model(zoo_config.Config(model=model)), nnx.Param)
    places = table(of_model.rules_of(model), ["attention"], checkpoints.named_leaves(abstract))
    for name, shape in checkpoints.shapes(abstract).items():
        read = importing._reader(places.of_parameter()[name], weights, set())
        whole = read(tuple(slice(None) for _ in shape))
        assert whole.shape == tuple(shape)
        part = tuple(slice(size // 2, None) for size in shape)
        np.testing.assert_array_equal(read(part), whole[part], err_msg=name)
        assert read(part).base is None or read(part).base.nbytes <= read(part).nbytes


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    folder = tiny.folder(tmp_path / "theirs", "llama_tied")
    embedding = safetensors.numpy.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewritten(folder, **{"lm_head.weight": embedding.copy()}, **buffer)
    interop.import_model(str(folder), str(tmp_path / "run"))
    embedding[1, 1] = np.nan
    rewritten(folder, **{"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.copy()})
    interop.import_model(str(folder), str(tmp_path / "strange"))
    rewritten(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(UsageError, match="lm_head.weight differs from model.embed_tokens.weight"):
        interop.import_model(str(folder), str(tmp_path / "other"))


def test_layers_of_two_types_are_float32_together(tmp_path):
    folder, name = tiny.folder(tmp_path / "theirs"), "model.layers.{}.self_attn.q_proj.weight"
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    mixed = {name.format(0): held[name.format(0)].astype(ml_dtypes.bfloat16)}
    mixed[name.format(1)] = held[name.format(1)].astype(np.float16)
    rewritten(folder, **mixed)
    made = interop.import_model(str(folder), str(tmp_path / "run"))
    assert made.dtypes == ["BF16", "F16", "F32"]
    for i, x in enumerate(mixed.values()):
        got = _parameters(made.workdir)["units.blocks.0.mixer.q.kernel"][i]
        np.testing.assert_array_equal(got, x.astype(np.float32).T)


@pytest.mark.parametrize("golden, layer", [("mamba", "Mamba1"), ("mamba2", "Mamba2")])
def test_the_authors_own_folder(golden, layer, tmp_path):
    """Their names and fields, and their vocabulary: 40 rows for 37 tokens."""
    folder, theirs = tiny.folder(tmp_path / "theirs", golden), tiny.golden(golden)[0]["config"]
    ssm = {"d_state": 8} | ({"layer": "Mamba2", "headdim": 8} if layer == "Mamba2" else {})
    fields = {"d_model": 16, "n_layer": 2, "vocab_size": 37, "ssm_cfg": ssm, "rms_norm": True, "residual_in_fp32": True}
    fields |= {"pad_vocab_size_multiple": 8, "fused_add_norm": True, "tie_embeddings": theirs["tie_word_embeddings"]}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text(tiny.tokenizer(37))
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    renamed = {name.replace("backbone.embeddings", "backbone.embedding"): x for name, x in held.items()}
    safetensors.numpy.save_file(renamed, folder / "model.safetensors")
    made = interop.import_model(str(folder), str(tmp_path / "run"))
    assert made.model_type == f"state-spaces {golden}" and made.config.model.vocab_size == 40
    interop.export_run(str(made.workdir), str(tmp_path / "out"))  # in transformers' names, which say more
    back = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == held.keys() and all((back[name] == held[name]).all() for name in held)


def test_what_stands_beside_the_weights_is_carried(tmp_path):
    said = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "eos_token_id": [{}], "pad_token_id": 3}
    folder = tiny.folder(tmp_path / "theirs", custom_field=None, initializer_range=float("nan"), **said)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    made = interop.import_model(str(folder), str(tmp_path / "run"))
    assert made.ignored == ["custom_field"]
    path = made.workdir / "origin/origin.json"
    origin = json.loads(path.read_text())
    path.write_text(json.dumps(origin | {"folder": "x`[y](z)|"}))
    assert origin["model_type"] == "llama" and len(origin["sha256"]["model.safetensors"]) == 64
    interop.export_run(str(made.workdir), str(tmp_path / "out"))
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    assert origin["sha256"]["model.safetensors"] in card and "`x''y'(z)'`" in card
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, 3)
    assert "auto_map" not in config and "initializer_range" not in config


def test_what_a_format_cannot_say_is_named():
    model = zoo_config.ModelConfig(mixer="attention", num_layers=2, d_model=64, vocab_size=64)
    assert exporting.choose(model, "", "")[0].name == "llama"
    model.attention.qk_norm = True
    assert exporting.choose(model, "", "")[0].name == "qwen3"
    with pytest.raises(UsageError, match="llama, .* model.attention.qk_norm: True, of which it has False"):
        exporting.choose(model, "llama", "")
    model.attention.qk_norm, model.attention.rotary_fraction = False, 0.5
    assert exporting.choose(model, "", "")[0].name == "phi3"  # whose package reads it
    with pytest.raises(UsageError, match="partial_rotary_factor: got 0.5, which the package does not read"):
        exporting.choose(model, "llama", "")
    # Of formats of these mixers alone, what the nearest lacks; not of hybrids.
    model.attention.rotary_fraction, model.mlp, model.d_ff, model.tie_embeddings = 1.0, "gelu", 64, False
    with pytest.raises(UsageError, match="^llama, the nearest format, .* model is: model.mlp: 'gelu', of which it has"):
        exporting.choose(model, "", "")
    one = zoo_config.ModelConfig(mixer="mamba2", num_layers=2, d_model=64, vocab_size=64)
    assert exporting.choose(one, "", "")[0].name == "bamba"  # a hybrid without layers of attention
    # What a linearized run is: GLA, and some layers as they were, with settings in the pattern.
    sizes = {"num_layers": 4, "d_model": 64, "d_ff": 64, "vocab_size": 64, "positions": "rope"}
    hybrid = zoo_config.ModelConfig(mixer="gla@expand_k=1,attention@window=8@biases=q+k+v", **sizes)
    found, model = exporting.choose(hybrid, "", "")
    assert found.name == "gla" and family.to_fields(found, model)["attn"] == {
        "layers": [1, 3], "num_heads": 4, "num_kv_heads": 4, "qkv_bias": True, "window_size": 8, "rope_theta": 1e4
    }  # fmt: skip
    hybrid.mixer = "gla,attention@window=8,gla,attention"
    with pytest.raises(UsageError, match="^gla, the nearest format, .* model.mixer: 'gla,attention@window=8,gla,att"):
        exporting.choose(hybrid, "", "")
    with pytest.raises(UsageError, match="^gla, .*: all layers are softmax attention, and none is gla"):
        exporting.choose(zoo_config.ModelConfig(mixer="attention", num_layers=2, d_model=64, vocab_size=64), "gla", "")
    with pytest.raises(UsageError, match="has the mixers of this run, gateloop"):
        exporting.choose(zoo_config.ModelConfig(mixer="gateloop", vocab_size=64), "", "")  # no model is made
    with pytest.raises(UsageError, match="--format: got 'x'"):
        exporting.choose(hybrid, "x", "")


def test_shards_hold_what_they_should(tmp_path):
    shapes = {f"t{i}": (4, 4) for i in range(5)}
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    write_shards(tmp_path, shapes, iter(arrays.items()), np.dtype(np.float32), 130)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    found = open_folder(tmp_path)
    assert all((found.tensors[name].view() == arrays[name]).all() for name in shapes)


def test_numbers_that_are_none(tmp_path, capsys):
    """Of weights: said by name; that another type would make: refused."""
    folder = tiny.folder(tmp_path / "theirs")
    up = np.full((24, 16), np.inf, np.float32)
    norm = np.asarray([1e5] * 15 + [np.nan], np.float32)
    rewritten(folder, **{"model.norm.weight": norm, "model.layers.1.mlp.up_proj.weight": up})
    made = interop.import_model(str(folder), str(tmp_path / "run"))
    said = "2 tensors hold NaN or infinity: model.layers.1.mlp.up_proj.weight, model.norm.weight"
    assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match="model.norm.weight: it has values that float16 cannot hold"):
        interop.export_run(str(made.workdir), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()


def test_a_table_that_misses_a_parameter_is_a_fault():
    parameters = {"a": jax.ShapeDtypeStruct((2,), np.float32), "b": jax.ShapeDtypeStruct((2,), np.float32)}
    rules = [families.llama.rule("x", "a", SAME)]
    with pytest.raises(AssertionError, match="without one rule: .'b'."):
        table(rules, [], parameters)


@pytest.mark.slow
def test_a_run_goes_on_from_what_was_imported(tmp_path):
    """Resumed where it stands and started elsewhere with --init_from; both export, with a card of what was done."""
    from zoo.training import train

    folder = tiny.folder(tmp_path / "theirs", "mamba")
    made = interop.import_model(str(folder), str(tmp_path / "run"), asked_tokenizer="")
    config = made.config
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n" * 200)
    config.data.source = str(tmp_path / "text.txt")
    config.train.steps, config.train.batch_size, config.train.context_length = 2, 2, 16
    for workdir, init_from in (("tuned", str(made.workdir)), ("tuned", "")):
        summary = train(config, tmp_path / workdir, init_from=init_from)
        assert summary["step"] == 2
    assert (tmp_path / "tuned/origin/origin.json").read_bytes() == (made.workdir / "origin/origin.json").read_bytes()
    out = interop.export_run(str(tmp_path / "tuned"), str(tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text()
    assert out.step == 2 and "| steps | 2 |" in text and "| data | text.txt (" in text
    assert f"{summary['eval_loss']:.4f} nats" in text
    assert train(config, made.workdir)["step"] == 2  # where it stands, with its own data and optimizer
    assert checkpoints.complete_steps(made.workdir / "checkpoints") == [0, 2]
    config.model.norm_epsilon = 1e-3
    with pytest.raises(UsageError, match="model.norm_epsilon: 1e-05 -> 0.001"):
        interop.import_model(str(folder), str(tmp_path / "third"))
        train(config, tmp_path / "third")


def test_a_checkpoint_of_parameters_alone(tmp_path):
    """Restored, it has no optimizer's state; one that lost its folder of it is damaged, not such a one."""

    class State(NamedTuple):
        params: dict
        opt: dict | None

    params, opt = {"w": jnp.arange(3, dtype=jnp.bfloat16)}, {"m": jnp.ones(3)}
    abstract = State({"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, jax.eval_shape(lambda: opt))
    with contextlib.closing(checkpoints.Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(0, State(params, None))
        checkpointer.wait()
        found = checkpointer.restore(abstract).state
        assert found.opt is None and found.params["w"].dtype == jnp.float32 and (found.params["w"] == params["w"]).all()
        checkpointer.save(1, State(params, opt))
        checkpointer.wait()
        assert checkpointer.restore(abstract).state.opt is not None
        shutil.rmtree(tmp_path / "1" / "opt")
        assert checkpointer.restore(abstract).step == 0


def test_numbers_that_a_run_leaves_to_defaults_are_written(tmp_path):
    """Heads, widths of MLPs; and a head of its own, where the format ties none."""
    for mixer, name in (("attention", "phi3"), ("mlstm", "xlstm")):
        sizes = {"num_layers": 1, "d_model": 32, "vocab_size": 320, "logit_softcap": 30.0 if name == "xlstm" else 0.0}
        config = zoo_config.Config(model=zoo_config.ModelConfig(mixer=mixer, **sizes))
        _run_of(config, tmp_path / name)
        out = interop.export_run(str(tmp_path / name), str(tmp_path / f"{name}_out"), model_type=name)
        again = interop.import_model(str(out.folder), str(tmp_path / f"{name}_again"))
        assert again.config.model.d_ff and getattr(again.config.model, mixer).num_heads == 4
        one, other = (_parameters(path) for path in (tmp_path / name, again.workdir))
        assert name == "phi3" or (other.pop("head.kernel") == one["embed.embedding"].T).all()
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def _parameters(workdir):
    return checkpoints.named_leaves(nnx.state(checkpoints.load_run(workdir).model, nnx.Param))


def _run_of(config, workdir):
    """Of step 0, with bytes for tokens."""
    params = nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(0)), nnx.Param)
    with contextlib.closing(checkpoints.Checkpointer(workdir / "checkpoints")) as checkpointer:
        checkpointer.save(0, importing._State(checkpoints.named_leaves(params)))
    (workdir / "config.json").write_text(zoo_config.to_json(config))
