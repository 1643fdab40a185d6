"""The folder of a run's checkpoints: which of its entries are complete, set aside as damaged, or left over."""

import pathlib
import re
import shutil
from collections.abc import Iterable

from zoo import processes
from zoo.checkpoints.digest import DIGEST
from zoo.checkpoints.items import ITEMS
from zoo.errors import UsageError


def complete_steps(directory: pathlib.Path) -> list[int]:
    """Of checkpoints that have a digest, oldest first."""
    return sorted(int(path.name) for path in _entries(directory) if _is_step(path) and (path / DIGEST).is_file())


def asides(directory: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints set aside as damaged."""
    return [p for p in _entries(directory) if p.suffix == ".damaged" and p.is_dir() and _is_step_name(p.stem)]


def delete_leftovers(directory: pathlib.Path) -> None:
    """Of saves that were cut off: Orbax's temporary folders, and steps without a digest."""
    if not processes.is_first():
        return
    for entry in _entries(directory):
        begun = _is_step(entry) and any((entry / item).is_dir() for item in ITEMS) and not (entry / DIGEST).exists()
        if begun or (".orbax-checkpoint-tmp" in entry.name and _is_checkpoint_folder(entry)):
            shutil.rmtree(entry)


def refuse_if_damaged(directory: pathlib.Path, damaged: dict[int, str]) -> None:
    """UsageError if there were checkpoints, of which none is good."""
    found = [f"{step} ({reason})" for step, reason in damaged.items()] + [path.name for path in asides(directory)]
    if found:
        raise UsageError(
            f"{directory}: every checkpoint is damaged: {', '.join(found)}. Put back a good one, or move this folder "
            "away to train from the start"
        )


def listed(steps: list[int]) -> str:
    """ "steps 5, 10"."""
    return "steps " + ", ".join(map(str, steps)) if steps else "none"


def _entries(directory: pathlib.Path) -> Iterable[pathlib.Path]:
    return directory.iterdir() if directory.is_dir() else ()


def _is_step(path: pathlib.Path) -> bool:
    """Whether it is named as checkpoints are (5, not 05), and a folder."""
    return _is_step_name(path.name) and _is_checkpoint_folder(path)


def _is_step_name(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,18}", name) is not None


def _is_checkpoint_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and not path.is_symlink()
