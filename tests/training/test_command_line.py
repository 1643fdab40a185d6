import re
import subprocess
import sys

import pytest
from absl import flags

from zoo import config as zoo_config
from zoo.errors import UsageError
from zoo.mixers import MIXERS
from zoo.training import command_line


def parse(*arguments):
    values = flags.FlagValues()
    command_line.define_and_parse(["train.py", *arguments], values)
    return values["config"].value


def test_size_and_overrides():
    config = parse(
        "--config=configs/gla.py:340m", "--config.model.mixer=retnet", "--config.train.steps=7",
        "--config.optimizer.learning_rate=1e-4", "--noconfig.metrics.tensorboard",
    )  # fmt: skip
    assert (config.model.d_model, config.model.mixer, config.train.steps) == (1024, "retnet", 7)
    assert config.optimizer.learning_rate == 1e-4 and config.metrics.tensorboard is False


def test_a_saved_config_is_a_config_too(tmp_path):
    saved = zoo_config.preset("tiny")
    saved.model.gla.num_heads = 2
    (tmp_path / "config.json").write_text(zoo_config.to_json(saved))
    config = parse(f"--config={tmp_path}/config.json", "--config.train.seed=5")
    assert zoo_config.difference(saved, config) == ["train.seed: 0 -> 5"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=nope.py"], r"--config=nope.py: no such file; known configs: based, conv_linear, "),
        (["--config=glaa"], "--config=glaa: no config of that name; did you mean gla"),
        (["--config=configs/gla.py:huge"], "unknown size 'huge'; expected one of tiny, 10m, 125m"),
        (["--config=configs/gla.py", "--config.model.d_modle=3"], r"'model.d_modle'; did you mean model.d_model"),
        (["--config=configs/gla.py", "--config.steps=3"], r"'steps'; did you mean .*train.steps"),
        (
            ["--config=configs/gla.py", "--config.train.steps=abc"],
            r"--config.train.steps: got .abc., expected a whole number",
        ),
        (
            ["--config=configs/gla.py", "--config.train.steps=2.5"],
            r"--config.train.steps: got .2.5., expected a whole number",
        ),
        (
            ["--config=configs/gla.py", "--config.metrics.wandb=maybe"],
            r"--config.metrics.wandb: got .maybe., expected True or False",
        ),
        (["--config=configs/gla.py", "--workdri=x"], "workdri"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(*arguments)


def test_broken_json_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        parse(f"--config={tmp_path}/config.json")


@pytest.mark.parametrize(
    "line, message",
    [
        ("config.optimizer.lr = 1e-3", "optimizer.lr: unknown setting; did you mean optimizer.learning_rate"),
        ("config.step = 5", "step: unknown setting; did you mean train.steps"),
        ("config.train = None", "train: got None, expected a section"),
        ("config.model.gla = 5", "model.gla: got 5, expected a section"),
        ("config.train.steps = 'abc'", "train.steps: got 'abc', expected a whole number"),
        ("raise SystemExit(3)", "line 4: SystemExit: 3"),
    ],
)
def test_a_mistake_in_a_config_file_is_named(tmp_path, line, message):
    file = tmp_path / "mine.py"
    body = ["from zoo.config import preset", "def get_config():", "    config = preset('tiny')", f"    {line}"]
    file.write_text("\n".join([*body, "    return config"]))
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(f"--config={file}", "--config.train.steps=4", "--config.model.gla.num_heads=2")


def test_a_name_too_long_for_a_file_is_no_traceback(tmp_path):
    for name in ("a" * 300 + ".py", "a" * 300 + "/b.json"):
        with pytest.raises(UsageError, match="cannot be read .File name too long"):
            parse(f"--config={tmp_path}/{name}")


def command(*arguments):
    done = subprocess.run([sys.executable, "train.py", *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--confg=x"], "Unknown command line flag 'confg'"),
        (
            ["--config=configs/gla.py:tiny", "--config.model.mixer=glaa"],
            "unknown mixer 'glaa'; known, nearest first",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(tmp_path, arguments, message):
    code, _, err = command(*arguments, f"--workdir={tmp_path}/run")
    assert code == 2 and message in err and err.startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_list_shows_mixers_sizes_and_every_setting():
    code, out, _ = command("--list")
    assert code == 0
    for name in [*MIXERS, *zoo_config.SIZES, *zoo_config.leaves(zoo_config.Config())]:
        assert name in out


def test_help_needs_no_config():
    code, out, _ = command("--help")
    assert code == 0 and "--workdir" in out and "--init_from" in out
