"""The benchmark of linearized models: which runs make one, what is kept, what did not come out as it should."""

import json

import pytest

from benchmarks import linearize, record
from zoo.config import preset


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")
    record.RESULTS.parent.mkdir()
    monkeypatch.setattr(linearize.compile_cache, "enable", lambda: None)
    return record.RESULTS


def test_a_model_is_made_of_its_stages_and_kept_until_they_change(monkeypatch, results, tmp_path, capsys):
    asked = []

    def trained(config, workdir, init_from=""):
        asked.append((config, workdir, init_from))
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "summary.json").write_text('{"seconds": 2.0}')
        bits = {"scratch": 3.0, "logits": 2.02, "mixers": 9.0, "teacher": 2.0}[workdir.name.split("_")[0]]
        if str(init_from).find("mixers") > 0 and config.train.seed:  # after the mixers, of the second seed
            bits = 2.5
        return {"eval_bits_per_byte": bits, "parameters": 1, "tokens": 2}

    monkeypatch.setattr(linearize, "trained", trained)
    flags = ["text", "--budgets=1", "--seeds=2", "--mixers=gla,gla,attention", f"--workdir={tmp_path}/runs"]
    linearize.main(flags)
    steps = preset("tiny").train.steps
    (teacher, of_teacher, _), *_ = asked
    assert teacher.model.mixer == "attention" and teacher.train.steps == steps
    both = [entry for entry in asked if entry[1].parent.name == "text_1x_gla-gla-attention_both_0"]
    mixers, logits = both
    assert mixers[2] == str(of_teacher) and logits[2] == str(mixers[1])
    for config, _, _ in both:
        assert config.train.distill.teacher == str(of_teacher) and config.model.mixer.endswith(
            "biases=output_gate,attention"
        )
    assert [config.train.distill.stage for config, _, _ in both] == ["mixers", "logits"]
    fifth = 0.2 * steps * teacher.train.batch_size
    assert sum(config.train.steps * config.train.batch_size for config, _, _ in both) == pytest.approx(fifth, abs=1)
    assert {config.eval.batch_size for config, _, _ in both} == {teacher.train.batch_size}  # the same rows
    (alone,) = (entry for entry in asked if entry[1].parent.name.endswith("logits_1"))
    assert alone[0].train.steps == round(fifth) and alone[2] == str(
        linearize.teacher("text", 1, 1, of_teacher.parent)[1]
    )
    (scratch,) = (entry for entry in asked if entry[1].parent.name.endswith("scratch_0"))
    assert scratch[2] == scratch[0].train.distill.teacher == "" and scratch[0].train.steps == round(fifth)
    assert scratch[0].model.d_ff == mixers[0].model.d_ff > 0  # the same model
    # Medians of 2.02 and 2.5 are more than 3 % beside the teacher's, and no better than the logits alone.
    printed = capsys.readouterr().out
    assert "| 1x | gla,gla,attention | 2.000 (2.000 - 2.000) | 2.260 (2.020 - 2.500) | 2.020" in printed
    assert "gla,gla,attention: +13.0% of the teacher's bits per byte, more than 3%" in printed
    assert "the logits alone are no worse" in printed and "from scratch it is no worse" not in printed
    assert not both[0][1].exists() and of_teacher.exists()
    # What is kept is not run again, but for what is made of other settings now.
    asked.clear()
    other = linearize.RECIPES["text", "mixers"]._replace(rate=0.5)
    monkeypatch.setattr(linearize, "RECIPES", linearize.RECIPES | {("text", "mixers"): other})
    linearize.main(flags)
    assert {entry[1].parent.name for entry in asked if "teacher" not in entry[1].name} == {
        "text_1x_gla-gla-attention_both_0", "text_1x_gla-gla-attention_both_1",
    }  # fmt: skip
    assert len([entry for entry in asked if "teacher" in entry[1].name]) == 2  # theirs, in case it is gone
    asked.clear()
    linearize.main([*flags, "--kept"])
    assert not asked and "+13.0%" in capsys.readouterr().out


def test_recall_is_drawn_by_the_layers_that_stay_as_they_stand_or_as_they_were_chosen(
    monkeypatch, results, tmp_path, capsys
):
    def trained(config, workdir, init_from=""):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "summary.json").write_text('{"seconds": 2.0}')
        if config.model.mixer == "attention":
            return {"eval_accuracy": 0.9 if config.train.seed == 0 else 0.96}
        stay = config.model.mixer.split(",").count("attention")
        return {"eval_accuracy": stay / 4 + 0.1 * config.model.mixer.startswith("attention,")}

    def command(flags):
        (output,) = (flag.removeprefix("--output=") for flag in flags if flag.startswith("--output="))
        with open(output, "w") as file:
            json.dump({"order": [0, 2, 3, 1]}, file)

    monkeypatch.setattr(linearize, "trained", trained)
    monkeypatch.setattr(linearize, "command", command)
    linearize.main(["mqar", "--seeds=1", "--mixers=gla", f"--workdir={tmp_path}/runs"])
    runs = json.loads(record.path("linearize").read_text())["runs"]
    patterns = {name: [layer.split("@")[0] for layer in run["pattern"].split(",")] for name, run in runs.items()}
    assert patterns["mqar 2 gla chosen 1"] == ["attention", "gla", "attention", "gla"]
    assert patterns["mqar 2 gla spaced 1"] == ["gla", "attention", "gla", "attention"]
    assert len(runs) == 2 + 4 + 3  # seed 0's teacher does not recall
    # Models that start with attention recall more; of 3 layers those that stand evenly do, too.
    printed = capsys.readouterr().out
    assert "left out: of seeds 0\n" in printed
    missed = [line for line in printed.splitlines() if "recall no more" in line]
    assert missed == ["gla, 3 layers: the chosen ones recall no more than evenly spaced ones"]
    assert (results / "linearize_mqar.png").stat().st_size > 1000
