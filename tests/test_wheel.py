"""What `pip install` brings: the wheel's names, and the command in an empty environment, outside the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
    "model.num_layers": 1, "model.d_model": 32, "train.batch_size": 2, "train.context_length": 64, "train.steps": 2,
    "optimizer.name": "adamw", "optimizer.warmup_steps": 1, "data.source": "text.txt",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: what an earlier build left in the checkout would be in it too."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("kernels", "zoo", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={folder}", folder / "source"]
    subprocess.run(build, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_claims_zoo_and_kernels_alone_and_has_all_of_them(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"zoo", "kernels"}
    files = [path for package in ("zoo", "kernels") for path in (ROOT / package).rglob("*.py")]
    expected = {str(path.relative_to(ROOT)) for path in files} | {"zoo/py.typed", "kernels/py.typed"}
    expected |= {"zoo/training/h200.txtpb"}
    expected |= {f"zoo/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert set(names) == expected


@pytest.mark.wheel
def test_the_command_and_the_example_run_from_the_wheel_in_an_empty_environment(wheel, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG", "VIRTUAL"))}
    bin_ = tmp_path / "venv" / "bin"
    venv.create(tmp_path / "venv", with_pip=True)
    subprocess.run([bin_ / "python", "-m", "pip", "install", "-q", wheel], check=True, cwd=tmp_path, env=kept)
    home = tmp_path / "home"
    home.mkdir()
    (home / "text.txt").write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(200)))
    environment = kept | {"HOME": str(home), "JAX_PLATFORMS": "cpu", "PATH": f"{bin_}:/usr/bin:/bin"}

    def run(*command):
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    overrides = [f"--config.{name}={value}" for name, value in SMALL.items()]
    assert "gla" in run("sequence-zoo", "list")
    run("sequence-zoo", "train", "--config=gla:tiny", "--workdir=run", *overrides)
    assert "perplexity" in run("sequence-zoo", "evaluate", "--workdir=run")
    assert run("sequence-zoo", "generate", "--workdir=run", "--prompt=def f", "--max_tokens=8").startswith("def f")
    run("sequence-zoo", "compare", "run")
    run("sequence-zoo", "tokenizer", "--source=text.txt", "--vocab_size=300", "--output=tokenizer.json")
    where = "import zoo, kernels, sys; print(zoo.__file__, kernels.__file__, zoo.__version__)"
    zoo_file, kernels_file, version = run("python", "-c", where).split()
    assert zoo_file.startswith(str(bin_.parent)) and kernels_file.startswith(str(bin_.parent))
    assert run("sequence-zoo", "--version") == f"sequence-zoo {version}\n" and version in wheel.name
    assert "in two pieces as in one: True" in run("python", ROOT / "examples" / "library.py")
