"""The benchmark of decoding: which families it measures, and what it says a token must move."""

import jax
import pytest
from flax import nnx

from benchmarks import decode
from zoo import flops
from zoo.mixers import CAUSAL_MIXERS


def test_every_family_that_decodes_is_measured(monkeypatch, tmp_path):
    asked = []

    def family_rows(family, size, behind, batches, rounds, largest):
        asked.append(family)
        assert flops.state_bytes(decode.family_config(family, size).model, max(behind)) > 0
        return []

    monkeypatch.setattr(decode, "family_rows", family_rows)
    monkeypatch.setattr(decode.compile_cache, "enable", lambda: None)
    monkeypatch.setattr(decode.record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["decode"])
    decode.main()
    assert asked == list(CAUSAL_MIXERS)


def test_the_table_has_a_row_a_family_and_what_was_left_out():
    def row(family, batch, behind, times):
        return {"family": family, "batch": batch, "behind": behind, "seconds": 2e-3 * times, "floor_seconds": 2e-3}

    rows = [row("gla", batch, behind, 1 + batch / 100) for batch in (1, 8) for behind in (128, 1024)]
    rows += [row("attention", 1, 128, 2), row("attention", 1, 1024, 4), row("attention", 8, 128, 3)]
    assert decode.table(rows).splitlines()[4:] == [
        "| gla | 495 | 495 | 1.01, 1.01 | 1.08, 1.08 |",
        "| attention | 250 | 125 | 2.00, 4.00 | 3.00, - |",
    ]


@pytest.mark.parametrize(("family", "kept"), [("gla", 3 * 4 * 32 * 64), ("attention", 3 * 2 * 256)])
def test_a_token_moves_the_parameters_and_a_recurrent_state_twice_or_the_cache_so_far(family, kept):
    """`kept`: numbers of a sequence's state, or of a token's keys and values, in 3 layers."""
    model, _ = decode.build(family, "tiny")
    batch, behind = 8, 24
    state = jax.eval_shape(lambda: decode.state_at(model, batch, behind, room=40))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    counts = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == "int32")
    numbers = batch * kept * (2 if family == "gla" else behind)
    found = decode.bytes_of_a_step(model, _with_bytes(state), behind)
    assert found == 4 * (parameters + numbers + 2 * counts)


def test_of_a_state_counts_what_its_layer_uses():
    """TransNormer's lower two layers of three have keys and values, the upper one S; Longformer's slots may be gaps."""
    behind, found = 1000, {}
    for family in ("transnormer", "longformer"):
        model, _ = decode.build(family, "tiny")
        state = jax.eval_shape(lambda model=model: decode.state_at(model, 1, behind, room=40))
        parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        counts = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == "int32")
        found[family] = (decode.bytes_of_a_step(model, _with_bytes(state), behind) - parameters) / 4 - 2 * counts
    of_blocks, of_norm, of_windows = 2 * 64 * 256, 2 * 4 * 64 * 64, 2 * 256 * (64 + 128 + 256)
    assert found == {"transnormer": 2 * of_blocks + of_norm, "longformer": pytest.approx(of_windows, abs=1)}


def _with_bytes(state):
    class Leaf:
        def __init__(self, of):
            self.shape, self.ndim, self.nbytes = of.shape, of.ndim, of.size * of.dtype.itemsize

    return jax.tree.map(Leaf, state)
