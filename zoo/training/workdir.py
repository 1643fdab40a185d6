"""Everything that is checked and settled before a run allocates or compiles anything.

A workdir binds by what was trained: the config that a resumed run is held against is the one in its newest checkpoint.
Without a checkpoint nothing was trained, and config.json and tokenizer.json of a start that failed are written anew.
"""

import contextlib
import copy
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from zoo import checkpoints, data, files, linearize, metrics, processes
from zoo import config as zoo_config
from zoo.config import Config, ModelConfig
from zoo.data import rows, stored, synthetic
from zoo.data.corpora import STDLIB
from zoo.data.tokenizer import BYTES
from zoo.errors import UsageError, warn
from zoo.mixers import MIXERS
from zoo.settings import nearest

# What may differ when a run is resumed (a trailing dot: the whole section). Of the text its fingerprint counts, which
# the checkpoint holds, not where it lies.
FREE = (
    "train.log_every", "eval.", "checkpoint.", "metrics.", "data.text_field", "data.cache_dir", "data.max_lost_text",
    "data.read_threads",
)  # fmt: skip
# This too, but it leaves a trace: a longer train.steps stretches the schedule of the learning rate from the step
# resumed on, another mesh changes sums in their last bits.
NOTED = ("train.steps", "mesh.")
# And this if --override names it: the state and the batches to come stay what they are.
OVERRIDABLE = (
    *(f"optimizer.{name}" for name in zoo_config.leaves(zoo_config.OptimizerConfig()) if name != "name"),
    "train.accumulate_steps", "model.dropout", *(f"model.{name}" for name in zoo_config.HOW), "model.dtype",
    "data.validation_source",
)  # fmt: skip

# Of the head, and what reads numbers: under another head they are made anew.
_OF_HEAD = (
    "head", "head_pool", "classes", "channels", "patch", "horizon", "vocab_size", "tie_embeddings", "logit_softcap",
)  # fmt: skip
_SETTINGS = zoo_config.leaves(Config())


class Run(NamedTuple):
    workdir: pathlib.Path
    config: Config  # as asked for, with the vocabulary settled and paths absolute; in WORKDIR/config.json
    data_config: Config  # the same, reading the run's own copy of the tokenizer
    lock: "Lock | contextlib.nullcontext"  # closing it lets go of the workdir; of several processes the first has it
    override: tuple[str, ...] = ()  # settings that may differ from the checkpoint's


def prepare(config: Config, workdir: str | os.PathLike, override: Sequence[str] = (), init_from: str = "") -> Run:
    """Check `config` as a whole and against what stands in `workdir`, and write config.json and tokenizer.json there.

    Of several processes the first does, and the others take what it settled.

    Args:
      override: settings of `OVERRIDABLE` that may differ from those that the run was trained with so far.
      init_from: the run whose weights a new one starts from: where model.d_ff is 0, MLPs become as wide as there.

    Raises:
      UsageError: a setting that is wrong by itself, with the others, with the data, or with the run in `workdir`.
    """
    workdir = pathlib.Path(files.expand(workdir)).absolute()
    run = _prepare(config, workdir, tuple(override), init_from) if processes.is_first() else None
    if processes.count() == 1:
        return run
    settled = processes.broadcast(run and [zoo_config.to_json(run.config), run.data_config.data.tokenizer])
    if not processes.shares_with_first(workdir):
        raise UsageError(
            f"--workdir={workdir}: {socket.gethostname()} does not see there what process 0 writes; it has to be on "
            "storage that all processes share"
        )
    return run or _settled(workdir, *settled, tuple(override))


def _settled(workdir: pathlib.Path, config: str, tokenizer: str, override: tuple[str, ...]) -> Run:
    config = zoo_config.from_json(config)
    data_config = copy.deepcopy(config)
    data_config.data.tokenizer = tokenizer
    data.check(data_config)  # of this machine
    return Run(workdir, config, data_config, contextlib.nullcontext(), override)


def _prepare(config: Config, workdir: pathlib.Path, override: tuple[str, ...], init_from: str) -> Run:
    zoo_config.validate(config)
    metrics.check(config.metrics)
    _check_override(override)
    config = _with_absolute_paths(config)
    try:
        existed = workdir.exists()  # raises too: a name too long, a folder that may not be searched
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir)
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise _unwritable(workdir, getattr(error, "strerror", None) or str(error)) from error
    try:
        return _settle(config, workdir, lock, override, init_from)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):  # it is not empty
                (workdir / ".lock").unlink()
                workdir.rmdir()
        lock.close()
        raise


def settle_vocabulary(config: Config, workdir: str | os.PathLike | None) -> Config:
    """A copy of `config` whose model has the sizes that the data decides, where they were 0: model.vocab_size is what
    the tokenizer (of the run in `workdir`), the objective and a synthetic task need; classes and channels are a
    source's."""
    config = copy.deepcopy(config)

    def tokenizer() -> data.tokenizer.Tokenizer:
        name = config.data.tokenizer
        return data.tokenizer.for_run(files.expand(workdir), config) if workdir else data.tokenizer.load(name)

    data.settle(config, tokenizer)
    return config


def _settle(config: Config, workdir: pathlib.Path, lock: "Lock", override: tuple[str, ...], init_from: str) -> Run:
    own_tokenizer, data_config, before = workdir / "tokenizer.json", copy.deepcopy(config), None
    if trained := checkpoints.newest_meta(workdir / "checkpoints"):
        step, meta = trained
        before = _with_absolute_paths(trained_config(workdir, meta))
        if BYTES not in (config.data.tokenizer, before.data.tokenizer):
            is_new = config.data.tokenizer != before.data.tokenizer
            _settle_tokenizer(own_tokenizer, config.data.tokenizer, is_new, meta.get("tokenizer"))
            data_config.data.tokenizer = str(own_tokenizer)
    data.check(data_config)
    if init_from and config.model.d_ff == 0:
        config.model.d_ff = (
            before.model.d_ff
            if before
            else linearize.settled_width(checkpoints.read_config(init_from).model, config.model)
        )
        data_config.model.d_ff = config.model.d_ff
    data_config = settle_vocabulary(data_config, None)
    for name in ("vocab_size", "classes", "channels"):
        setattr(config.model, name, getattr(data_config.model, name))
    if before is not None:
        check_resumable(before, config, workdir, override, untrained=step == 0)
        if config.train.steps < step:
            raise UsageError(
                f"train.steps: {config.train.steps} is less than the {step} steps that the run in {workdir} has done; "
                f"use at least {step}, or another --workdir"
            )
    try:
        (workdir / "checkpoints").mkdir(exist_ok=True)
        if before is None and config.data.tokenizer == BYTES:
            own_tokenizer.unlink(missing_ok=True)
        elif before is None:
            files.write(own_tokenizer, pathlib.Path(config.data.tokenizer).read_bytes())
            data_config.data.tokenizer = str(own_tokenizer)
        files.write(workdir / "config.json", zoo_config.to_json(config))
    except files.WriteError as error:
        raise UsageError(f"--workdir: {error}; choose another") from error
    except OSError as error:
        raise _unwritable(error.filename or workdir, error.strerror) from error
    return Run(workdir, config, data_config, lock, override)


def trained_config(workdir: pathlib.Path, meta: dict[str, Any]) -> Config:
    """The config that a checkpoint was trained with; of an older release's checkpoint, config.json."""
    return zoo_config.from_json(json.dumps(meta["config"])) if "config" in meta else checkpoints.read_config(workdir)


def check_resumable(
    trained: Config, config: Config, workdir: pathlib.Path, override: tuple[str, ...] = (), untrained: bool = False
) -> None:
    """UsageError naming the settings that differ from the run's, but for those that may, and how each could.

    `untrained`: its weights were imported, and bind to the model and the tokenizer alone.
    """
    differences = changes(trained, config)
    if untrained:
        bind = ("model.", "data.tokenizer")
        differences = {name: values for name, values in differences.items() if name.startswith(bind)}
    shown = [
        f"{name}: {old} -> {new}"
        for name, (old, new) in differences.items()
        if not name.startswith(NOTED) and name not in override
    ]
    if not shown:
        return
    named = ",".join(name for name in differences if name in OVERRIDABLE)
    advice = f", add --override={named} to go on with the new value" if named else ""
    raise UsageError(
        f"--workdir={workdir} holds a run with another config: {'; '.join(shown)} (the run's -> yours). "
        f"Repeat the run's own command to resume it{advice}, or choose another --workdir"
    )


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each setting that differs and means something for what is trained or measured."""
    before, after = zoo_config.leaves(old), zoo_config.leaves(new)
    differ = [name for name in before if before[name] != after[name] and not name.startswith(FREE)]
    return {name: (before[name], after[name]) for name in differ if not _only_moved(name, before[name], after[name])}


def model_difference(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Settings, of families those that both use, that differ and change what the same parameters compute."""
    unused = MIXERS.keys() - (set(zoo_config.pattern(old)) & set(zoo_config.pattern(new)))
    unused |= {*zoo_config.HOW, *(() if old.head == new.head else _OF_HEAD)}
    before, after = zoo_config.leaves(old), zoo_config.leaves(new)
    return [
        f"model.{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name] and name.split(".")[0] not in unused
    ]


def _only_moved(name: str, old: str, new: str) -> bool:
    """Whether two values are paths of text or of a tokenizer, whose content is compared by its fingerprint."""
    if name == "data.tokenizer":
        return BYTES not in (old, new)
    if name in ("data.source", "data.validation_source"):
        return not any(spec in ("", STDLIB) or synthetic.is_task(spec) or rows.is_source(spec) for spec in (old, new))
    return False


def _check_override(override: Sequence[str]) -> None:
    for name in override:
        if name not in OVERRIDABLE and not (name in _SETTINGS and name.startswith((*FREE, *NOTED))):
            near = nearest(name, list(OVERRIDABLE))
            raise UsageError(f"--override: a run cannot change {name!r}; what it can, nearest first: {near}")


def _settle_tokenizer(own: pathlib.Path, asked: str, is_new: bool, wanted: str | None) -> None:
    """WORKDIR/tokenizer.json is what the run was trained with, or becomes it again from the file that is asked for.

    Args:
      is_new: whether another file is asked for than before; it has to have the same content.
      wanted: fingerprint of the tokenizer that the run was trained with, where the checkpoint has it.
    """
    found, given = _fingerprint(own), _fingerprint(asked)
    wanted = wanted or found
    if is_new and given != wanted:
        raise UsageError(f"data.tokenizer: {asked!r} is not the tokenizer that the run was trained with, {str(own)!r}")
    if found == wanted is not None:
        return
    if given is None or wanted not in (given, None):
        raise UsageError(
            f"data.tokenizer: {str(own)!r} is damaged or gone, and {asked!r} is not what it was; put one of them back"
        )
    warn(f"{own} is damaged or gone; written anew from {asked}")
    try:
        files.write(own, pathlib.Path(asked).read_bytes())
    except (OSError, files.WriteError) as error:
        raise UsageError(f"data.tokenizer: {error}") from error


def _fingerprint(tokenizer: str | pathlib.Path) -> str | None:
    """None: it cannot be read."""
    try:
        return data.tokenizer.load(str(tokenizer)).fingerprint
    except UsageError:
        return None


def _with_absolute_paths(config: Config) -> Config:
    """A copy that means the same files from any folder."""
    config = copy.deepcopy(config)
    section = config.data
    several = [section.source] if rows.is_source(section.source) else section.source.split(",")
    section.source = ",".join(_absolute(spec.strip()) for spec in several)
    section.validation_source = _absolute(section.validation_source)
    section.tokenizer = section.tokenizer if section.tokenizer == BYTES else _absolute(section.tokenizer)
    section.cache_dir = _absolute(section.cache_dir)
    if config.train.distill.teacher:
        config.train.distill.teacher = str(pathlib.Path(files.expand(config.train.distill.teacher)).absolute())
    return config


def _absolute(spec: str) -> str:
    if rows.is_source(spec):
        return stored.with_absolute_path(spec)
    if not spec or spec == STDLIB or synthetic.is_task(spec) or spec.startswith("hf:"):
        return spec
    return str(pathlib.Path(files.expand(spec)).absolute())


def _unwritable(path: str | os.PathLike, reason: str) -> UsageError:
    return UsageError(f"--workdir: {path} cannot be written ({reason}); choose another")


class Lock:
    """On a workdir. The system lets go of it too, however the process ends."""

    def __init__(self, workdir: pathlib.Path):
        self._files: list[int] = []
        try:
            # The folder itself, for a file may be deleted; and a file, for some file systems lock no folders.
            # O_NONBLOCK: a FIFO of that name is refused, not waited for.
            for path, flags in ((workdir / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK), (workdir, os.O_RDONLY)):
                self._files.append(os.open(path, flags))
                try:
                    fcntl.flock(self._files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise UsageError(f"--workdir={workdir}: another process trains there; choose another") from error
                except OSError:
                    if path != workdir:
                        raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
