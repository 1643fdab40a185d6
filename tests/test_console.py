"""The console command, and what an installation brings."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

import zoo
from zoo import __main__ as console
from zoo.config import SIZES, Config, preset, to_json
from zoo.config_files import load_config, shipped
from zoo.errors import UsageError

ROOT = pathlib.Path(__file__).parent.parent


def refused(spec):
    with pytest.raises(UsageError) as error:
        load_config(spec)
    return str(error.value)


# --- Config files -----------------------------------------------------------------------------------------------------


def test_a_name_is_a_config_of_the_package_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped():
        for size in SIZES:
            assert load_config(f"{name}:{size}") == load_config(f"{ROOT}/configs/{name}.py:{size}")
    assert load_config("gla") == load_config("gla:tiny") == preset("tiny")
    assert len(shipped()) == len(list((ROOT / "configs").glob("*.py"))) - 1


def test_a_name_never_means_a_file_that_lies_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "from zoo.config import preset\ndef get_config(size='340m'):\n    return preset(size)\n"
    (tmp_path / "gla.py").write_text(own)
    (tmp_path / "gla").mkdir()
    assert load_config("gla") == preset("tiny")
    assert load_config("gla.py") == load_config("./gla.py") == preset("340m")
    assert load_config("gla.py:125m") == preset("125m")
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "config.json").write_text(to_json(preset("125m")))
    assert load_config("a:b/config.json") == preset("125m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("~/gla.py:tiny") == preset("tiny")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("glaa", "no config of that name; did you mean gla or "),
        ("glaa:tiny", "no config of that name; did you mean gla or "),
        ("xyz", "known configs: based, conv_linear, "),
        ("", "known configs: based, conv_linear, "),
        ("gla:huge", "unknown size 'huge'; expected one of tiny, "),
        ("gla:", "no size after the colon; expected one of tiny, "),
        ("configs/gla", "expected NAME, NAME:SIZE, FILE.py, "),
        ("elsewhere/gla.py:tiny", "no such file; --config=gla needs none"),
        ("elsewhere/own.py", "no such file; known configs: "),
        ("pyproject.toml", "no config of that name; known configs: "),
        ("~nobody-of-that-name/gla.py", "home directory"),
    ],
)
def test_a_config_that_is_not_there_is_said(spec, message):
    assert message in refused(spec)


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("def get_config(size):\n    return 1 +\n", "", "line 2: SyntaxError: "),
        ("x = 1\n\ny = nowhere\n", "", "line 3: NameError: name 'nowhere' is not defined"),
        ("def get_config(size='tiny'):\n    return {}['x']\n", "", "line 2: KeyError: 'x'"),
        ("def get_config(size):\n    return size\n", "", "missing 1 required positional argument"),
        ("def get_config(size='tiny'):\n    return size\n", ":tiny", "returned str, expected zoo.config.Config"),
        ("def get_config():\n    return None\n", ":tiny", "its get_config takes no size; leave :tiny away"),
        ("CONFIG = 1\n", "", "no function get_config"),
        ("get_config = 3\n", "", "no function get_config"),
        ("\0", "", "null bytes"),
    ],
)
def test_a_config_file_that_fails_shows_its_own_line(text, size, message, tmp_path):
    (tmp_path / "own.py").write_text(text)
    assert message in refused(f"{tmp_path}/own.py{size}")


def test_a_json_config_has_no_sizes_and_is_text(tmp_path):
    (tmp_path / "config.json").write_text(to_json(Config()))
    assert "leave :tiny away" in refused(f"{tmp_path}/config.json:tiny")
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "is no config of a run" in refused(f"{tmp_path}/config.json")


# --- The command ------------------------------------------------------------------------------------------------------


def python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def without_jax(*arguments):
    """The command in a process in which importing jax fails."""
    block = "import sys; sys.modules['jax'] = None; from zoo.__main__ import main; main(sys.argv[1:])"
    done = python(block, *arguments)
    return done.returncode, done.stdout, done.stderr


def test_help_of_the_command_needs_no_jax():
    code, out, err = without_jax("--help")
    assert code == 0 and err == "" and all(name in out for name in console.COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    for arguments, message in (["trian"], "did you mean train?"), (["xyz"], "commands: train, evaluate"):
        with pytest.raises(SystemExit) as exit_:
            console.main(arguments)
        output = capsys.readouterr()
        assert exit_.value.code == 2 and output.out == ""
        assert output.err.startswith(f"error: unknown command {arguments[0]!r}; ") and message in output.err


@pytest.mark.parametrize("command", ["evaluate", "generate", "compare"])
def test_a_command_is_called_what_the_user_typed(command, capsys):
    with pytest.raises(SystemExit):
        console.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: sequence-zoo {command} ")


# --- The package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_else():
    assert python("import sys, zoo; print({'jax', 'numpy', 'kernels'} & {*sys.modules})").stdout == "set()\n"


def test_what_the_package_offers_is_there_and_is_what_type_checkers_see():
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None and name in dir(zoo)
    block = next(node for node in ast.parse(pathlib.Path(zoo.__file__).read_text()).body if isinstance(node, ast.If))
    assert {i.names[0].asname: i.module for i in block.body} == zoo._HOME
    with pytest.raises(AttributeError, match="no attribute 'langauge_model'"):
        zoo.langauge_model  # noqa: B018


def test_packages_are_marked_as_typed_and_the_command_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"sequence-zoo": "zoo.__main__:main"}
    for package in ("zoo", "kernels"):
        assert "py.typed" in project["tool"]["setuptools"]["package-data"][package]
        assert (ROOT / package / "py.typed").exists()
