"""Config files: those that come with the package, by name, and a user's own, by path.

    gla, gla:tiny           a name without a folder and without an ending: configs/gla.py, wherever the package lies
    my/gla.py, gla.py:340m  a Python file with get_config(size)
    runs/gla/config.json    a run's
"""

import copy
import difflib
import inspect
import pathlib
import re
import traceback
from types import ModuleType

from zoo import config as zoo_config
from zoo.config import Config
from zoo.errors import UsageError
from zoo.files import expand
from zoo.settings import problems


def shipped() -> list[str]:
    """The names of the configs that come with the package."""
    return sorted(file.stem for file in _folder().glob("*.py") if file.name != "__init__.py")


def family_config(family: str, size: str = "tiny") -> Config:
    """The config that comes with the package of one family in every layer, with the MLP that belongs to it."""
    return load_config(f"{'transformer' if family == 'attention' else family}:{size}")


def load_config(spec: str) -> Config:
    """The config of NAME, NAME:SIZE, FILE.py, FILE.py:SIZE or FILE.json.

    Raises:
      UsageError: there is none, it has no such size, or the file fails.
    """
    path, size = re.fullmatch(r"(.*?)(?::([^:/\\]*))?", spec, re.DOTALL).groups()
    file = pathlib.Path(expand(path))
    if file.name == path and file.suffix not in (".py", ".json"):
        file = _folder() / f"{path}.py"
        if path not in shipped():
            raise UsageError(f"no config of that name; {_known(path)}")
    elif file.suffix not in (".py", ".json"):
        raise UsageError(f"expected NAME, NAME:SIZE, FILE.py, FILE.py:SIZE or FILE.json; {_known(file.stem)}")
    file = _existing(file)
    if size == "":
        raise UsageError(f"no size after the colon; expected one of {', '.join(zoo_config.SIZES)}")
    if file.suffix == ".py":
        return _from_python(file, size)
    if size is not None:
        raise UsageError(f"{path} is one config and has no sizes; leave :{size} away")
    try:
        return zoo_config.read_json(file)
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror})") from error


def _folder() -> pathlib.Path:
    """Beside the package in the repository, in it in a wheel."""
    package = pathlib.Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _known(name: str) -> str:
    names = shipped()
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known configs: {', '.join(names)}"


def _existing(file: pathlib.Path) -> pathlib.Path:
    try:
        file = file.expanduser()
    except RuntimeError as error:  # ~somebody
        raise UsageError(f"{error}") from error
    try:
        found = file.is_file()
    except OSError as error:  # a name too long, a folder that may not be searched
        raise UsageError(f"cannot be read ({error.strerror})") from error
    if not found:
        is_shipped = file.stem in shipped()
        raise UsageError(f"no such file; {f'--config={file.stem} needs none' if is_shipped else _known(file.stem)}")
    return file


def _from_python(file: pathlib.Path, size: str | None) -> Config:
    get_config = _module(file).__dict__.get("get_config")
    if not callable(get_config):
        raise UsageError("the file has no function get_config(size)")
    if size is not None and not inspect.signature(get_config).parameters:
        raise UsageError(f"its get_config takes no size; leave :{size} away")
    config = _run(file, get_config, *([] if size is None else [size]))
    if not isinstance(config, Config):
        raise UsageError(f"its get_config returned {type(config).__name__}, expected zoo.config.Config")
    if found := problems(config):  # before flags are put on top of it, which need its sections
        raise UsageError("; ".join(found))
    return copy.deepcopy(config)


def _module(file: pathlib.Path) -> ModuleType:
    module = ModuleType(f"config_{file.stem}")
    module.__file__ = str(file)
    _run(file, lambda: exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__))
    return module


def _run(file: pathlib.Path, function, *arguments):
    """What a user's file does. Its mistake is shown as a line of it, not as our traceback."""
    try:
        return function(*arguments)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = "" if line is None else f"line {line}: "
        said = error.msg if isinstance(error, SyntaxError) else error
        raise UsageError(f"{where}{type(error).__name__}: {said}") from error
