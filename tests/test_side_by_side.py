"""The benchmark of all families: its decoding starts where it says, and a repeated command does not train again."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import decode, record
from benchmarks import zoo as side_by_side
from zoo.config import preset
from zoo.model import LanguageModel


@pytest.mark.parametrize("mixer", ["attention", "retnet", "longformer"])
def test_a_state_at_a_position_has_the_shapes_and_counts_of_a_prefilled_one(mixer):
    config = preset("tiny").model
    config.mixer, config.vocab_size, config.num_layers, config.d_model = mixer, 64, 2, 32
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = np.zeros((1, 24), np.int32)
    _, prefilled = jax.jit(lambda state: model(tokens, state=state))(model.init_state(1, 24 + 8))
    placed = decode.state_at(model, 1, 24, 8)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), placed) == jax.tree.map(lambda x: (x.shape, x.dtype), prefilled)
    counts = [leaf for leaf in jax.tree.leaves(prefilled) if np.issubdtype(leaf.dtype, np.integer) and leaf.any()]
    ours = [leaf for leaf in jax.tree.leaves(placed) if np.issubdtype(leaf.dtype, np.integer) and leaf.any()]
    assert all((a == b).all() for a, b in zip(counts, ours, strict=True))


def test_positions_take_turns_and_the_first_round_does_not_count(monkeypatch):
    monkeypatch.setattr(side_by_side, "POSITIONS", (16, 32))
    for module in (side_by_side, decode):
        monkeypatch.setattr(module, "STEPS", 2)
    ends = iter([90, 80, 1, 10, 4, 30, 2, 20])  # seconds of the calls: the warm-up's, then three rounds
    clock = [0.0]

    def perf_counter():
        clock.append(clock[-1] + (next(ends) if len(clock) % 2 == 0 else 0))
        return clock[-1]

    monkeypatch.setattr(side_by_side.time, "perf_counter", perf_counter)
    config = small("gla", "tiny", 1).model
    config.vocab_size = 16
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    assert side_by_side.decode_speeds(model, rounds=3) == {"16": 2 / 2, "32": 2 / 20}


def test_a_repeated_command_reads_what_was_measured_and_measures_decoding_where_it_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "POSITIONS", (16, 32))
    monkeypatch.setattr(side_by_side, "config_of", small)
    monkeypatch.setattr(side_by_side, "decode_speeds", lambda model: dict.fromkeys(map(str, side_by_side.POSITIONS), 5))
    for _ in range(2):
        side_by_side.side_by_side(["gla"], "tiny", 2, tmp_path)
        monkeypatch.setattr(side_by_side, "train", None)  # the second time nothing is trained
    row = json.loads((tmp_path / "gla" / "row.json").read_text())
    assert row["tokens"] == 2 * 2 * 16 and set(row["decode_tokens_per_second"]) == {"16", "32"}
    assert (tmp_path / "zoo.png").stat().st_size > 1000

    def again(speed, positions, **options):
        monkeypatch.setattr(side_by_side, "POSITIONS", positions)
        monkeypatch.setattr(side_by_side, "decode_speeds", lambda model: dict.fromkeys(map(str, positions), speed))
        found = side_by_side.measure("gla", "tiny", 2, tmp_path / "gla", **options)
        assert found == json.loads((tmp_path / "gla" / "row.json").read_text())
        assert {key: found[key] for key in row if key[:6] not in ("decode", "state_")} == {
            key: row[key] for key in row if key[:6] not in ("decode", "state_")
        }
        return found["decode_tokens_per_second"]

    assert again(6, (16, 32)) == {"16": 5, "32": 5}
    assert again(7, (16, 32), decode_again=True) == {"16": 7, "32": 7}
    assert again(8, (16, 32, 64)) == {"16": 8, "32": 8, "64": 8}  # a row of other positions


def small(family, size, steps, config_of=side_by_side.config_of):
    config = config_of(family, size, steps)
    config.model.num_layers, config.model.d_model, config.eval.batches, config.eval.final_batches = 1, 32, 1, 1
    config.train.batch_size, config.train.context_length = 2, 16
    config.model.gla.num_heads = 2
    return config


def test_the_kin_of_softmax_are_trained_over_seeds(tmp_path, monkeypatch, capsys):
    asked = []

    def trained(config, workdir):
        asked.append((config.model.mixer.split("@")[0], config.train.seed, config.train.steps, workdir.name))
        return {"parameters": 1000, "eval_bits_per_byte": [2.0, 4.0, 2.5][config.train.seed]}

    monkeypatch.setattr(side_by_side, "trained", trained)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    record.RESULTS.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["zoo", "--kin", "--steps=7", f"--workdir={tmp_path}"])
    monkeypatch.setattr(side_by_side.compile_cache, "enable", lambda: None)
    side_by_side.main()
    assert asked[:4] == [
        *(("attention", seed, 7, f"family_attention_{seed}") for seed in range(3)),
        ("forgetting_attention", 0, 7, "family_forgetting_attention_0"),
    ]
    assert len({name for *_, name in asked}) == len(asked) == 3 * len(side_by_side.KIN)
    printed = capsys.readouterr().out
    assert re.search(r"^performer +1,000 +2\.5000 +2\.0000 - 4\.0000$", printed, re.MULTILINE)
    (kept,) = record.RESULTS.glob("kin_tiny.*.json")
    assert [row["family"] for row in json.loads(kept.read_text())["rows"]] == list(side_by_side.KIN)
