"""benchmarks.approximation: mixers read what they are given, bounds are bounds, a trained layer is read as it is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import record
from benchmarks.approximation import __main__ as command
from benchmarks.approximation import forms, inputs, ranks, report
from tests.zoo.cases import error_ratio
from zoo.checkpoints import Checkpointer, load_run
from zoo.config import preset, to_json
from zoo.errors import UsageError
from zoo.mixers import BIDIRECTIONAL, CAUSAL
from zoo.model import LanguageModel


class State(NamedTuple):
    params: nnx.State
    opt: dict


OF = inputs.gaussian(length=12, heads=2, width=4, scale=1.0, seed=0)


def test_the_mixers_read_the_given_arrays():
    phi_q, phi_k = ranks.phi(OF.q), ranks.phi(OF.k) * ranks.token_weights(OF)[..., None]
    scores = np.einsum("thk,shk->hts", phi_q, phi_k)
    expected = np.einsum("hts,shv->thv", scores / scores.sum(-1, keepdims=True), OF.v)
    assert error_ratio(forms.mixed("rala", OF, BIDIRECTIONAL), expected) < 1e-5
    assert forms.error(forms.FORMS["longformer"].outputs(OF, CAUSAL, 12, 0), forms.softmax(OF, CAUSAL)) < 1e-5


def test_bounds_are_softmax_itself_at_full_size_and_the_nearest_below():
    of_rank, exact = forms.FORMS["softmax of rank k"].outputs, forms.softmax(OF, BIDIRECTIONAL)
    errors = [forms.error(of_rank(OF, BIDIRECTIONAL, k, 0), exact) for k in (1, 4, 12)]
    assert errors[0] > errors[1] > 1e-2 and errors[2] < 1e-12

    logits = np.einsum("thk,shk->hts", OF.q.astype(np.float64), OF.k) / 4**0.5
    narrow = forms._narrowed(OF, 2)
    found = np.einsum("thk,shk->hts", narrow.q.astype(np.float64), narrow.k) / 2**0.5
    left = np.linalg.svd(logits, compute_uv=False)[:, 2:]
    np.testing.assert_allclose(np.linalg.norm(found - logits, axis=(1, 2)), np.linalg.norm(left, axis=1), rtol=1e-5)


def test_an_effective_rank_counts_equal_singular_values():
    np.testing.assert_allclose(ranks.effective(np.array([[2.0, 2, 2, 0], [5, 0, 0, 0]])), [3, 1])


def test_the_slope_is_that_of_the_median_over_sequences():
    rows = [{"size": m, "errors": [9.0, 3 * m**-0.5, 0.0]} for m in (16, 64, 256)]
    assert report.slope(rows) == pytest.approx(-0.5)


@pytest.mark.slow
def test_a_quick_run_prints_each_form_and_keeps_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    command.main(["--quick"])
    printed = capsys.readouterr().out
    assert all(f"| {form} |" in printed for form in forms.FORMS) and "| output, with both |" in printed
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="--table: nothing is kept"):
        command.main(["--table"])


@pytest.mark.slow
def test_of_a_trained_layer_that_is_read_which_it_compares(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(2000)))
    config = preset("tiny")
    model, config.data.source = config.model, str(tmp_path / "text.txt")
    model.num_layers, model.d_model, model.vocab_size, model.attention.num_kv_heads = 3, 32, 320, 2
    model.mixer, config.data.cache_dir = "attention,gla,attention", str(tmp_path / "cache")
    config.train.batch_size, config.train.context_length = 2, 16
    (tmp_path / "config.json").write_text(to_json(config))
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    params = nnx.state(LanguageModel(model, rngs=nnx.Rngs(0)), nnx.Param)
    checkpointer.save(1, State(params, {"count": jnp.zeros(())}))
    checkpointer.close()

    found, what = inputs.trained(str(tmp_path), layer=2, sequences=2)
    assert len(found) == 2 and what == "layer 2 of 3, attention,gla,attention, step 1"
    graphdef, parameters = nnx.split(load_run(tmp_path).model.units.blocks[2].mixer)
    mixer = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], parameters))
    for of in found:
        expected, _ = mixer(of.x[None])
        o = forms.softmax(of, CAUSAL).reshape(16, 32) @ np.asarray(mixer.out.kernel[...], np.float64)
        assert error_ratio(o[None], expected) < 1e-5
    assert not np.array_equal(found[0].q, found[1].q)
    with pytest.raises(UsageError, match="--layer=1: expected one of softmax attention in a causal model"):
        inputs.trained(str(tmp_path), layer=1, sequences=1)
