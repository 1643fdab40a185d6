"""What is exported opens in the packages themselves, with our logits; where torch is installed (make.py)."""

import contextlib
import dataclasses
import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
if importlib.util.find_spec("fla") is None:  # not imported yet: it takes `mamba` over from transformers
    pytest.skip("flash-linear-attention is not installed", allow_module_level=True)

from tests.interop import make, tiny  # noqa: E402
from zoo import checkpoints, interop, sharding  # noqa: E402
from zoo import config as zoo_config  # noqa: E402
from zoo.interop import families, family  # noqa: E402
from zoo.training import step  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Those of transformers first.
GOLDEN = sorted(make.CASES, key=lambda name: make.CASES[name][0] in make.FLA_MODELS)
# What runs trained here are exported as: theirs, and settings of ours.
FRESH = {
    "llama": {"mixer": "attention", "norm_epsilon": 1e-4},
    "qwen3": {"mixer": "attention", "attention.qk_norm": True, "tie_embeddings": False},
    "mamba2": {"mixer": "mamba2", "mlp": "none", "mamba2.head_dim": 16, "mamba2.groups": 2},
    "bamba": {"mixer": "mamba2", "mamba2.head_dim": 16},  # without a layer of attention
    "xlstm": {"mixer": "mlstm", "logit_softcap": 30.0},
    "gla": {"mixer": "gla@expand_k=1,attention@window=8"},
    "retnet": {"mixer": "retnet"},
    "delta_net": {"mixer": "delta_net"},
    "rwkv7": {
        "mixer": "rwkv7", "mlp": "channel_mixing_ungated", "norm": "layer_norm", "embedding_norm": True,
        "rwkv7.decay_rank": 3, "rwkv7.gate_rank": 4, "rwkv7.rate_rank": 5, "rwkv7.value_rank": 6,
    },
}  # fmt: skip


def theirs(folder, model_type, tokens):
    if model_type in make.FLA_MODELS:
        make.patch_models()
    if model_type.startswith("qwen3_"):
        make.plain_functions(model_type.removesuffix("_text"))
    with torch.no_grad():
        return make.load(folder)(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


def same(ours, wanted):
    assert np.max(np.abs(np.asarray(ours) - wanted)) < 1e-5 * np.max(np.abs(wanted))


@pytest.mark.parametrize("name", families.exported())
def test_an_absent_field_means_what_it_means_there(name):
    """A config.json that says nothing is the model of the config class' defaults."""
    of_model = families.FAMILIES[name]
    kind = make.class_of(of_model.architecture).config_class
    needed = {"qwen3_next": {"num_experts": 0}, "granitemoehybrid": {"num_local_experts": 0}}
    needed |= {"linear_attn": {"feature_map": "elu"}}
    needed |= {"nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}}
    for heads in ({}, {"num_attention_heads": 64}) if hasattr(kind(), "rope_parameters") else ({},):
        given = needed.get(name, {}) | heads
        said = json.loads(kind(**given).to_json_string(use_diff=False))
        there, here = (family.to_model(of_model, values)[0] for values in (said, {"model_type": name} | given))
        assert family._function(here) == family._function(there)


@pytest.mark.parametrize("name", GOLDEN)
def test_an_import_exported_again(name, tmp_path):
    made = interop.import_model(str(tiny.folder(tmp_path / "theirs", name)), str(tmp_path / "run"))
    out = interop.export_run(str(made.workdir), str(tmp_path / "out"))
    tokens = make.tokens().numpy()
    logits, _ = checkpoints.load_run(made.workdir).model(jnp.asarray(tokens, jnp.int32))
    same(logits, theirs(tmp_path / "out", out.model_type, tokens))


@pytest.mark.parametrize("model_type", FRESH)
def test_a_run_of_ours(model_type, tmp_path):
    """Bytes are its tokens, for which an export makes a tokenizer too."""
    from transformers import AutoTokenizer

    small = {"num_layers": 2, "d_model": 64, "d_ff": 64, "vocab_size": 320, "positions": "rope"}
    model = interop.family.with_settings(zoo_config.ModelConfig(), small | FRESH[model_type])
    config = zoo_config.Config(model=model)
    programs = step.build(config, sharding.make_mesh(config.mesh))
    with contextlib.closing(checkpoints.Checkpointer(tmp_path / "run" / "checkpoints")) as checkpointer:
        checkpointer.save(0, programs.init(), meta={"config": dataclasses.asdict(config)})
    (tmp_path / "run" / "config.json").write_text(zoo_config.to_json(config))
    out = interop.export_run(str(tmp_path / "run"), str(tmp_path / "out"))
    assert out.model_type == model_type
    text = "naïve bytes"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
    assert tokens == list(text.encode())
    run = checkpoints.load_run(tmp_path / "run")
    assert isinstance(run.model, nnx.Module)
    logits, _ = run.model(jnp.asarray([tokens], jnp.int32))
    same(logits, theirs(tmp_path / "out", model_type, [tokens]))
