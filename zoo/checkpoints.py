"""Checkpoints that can be trusted: written in the background, digested when complete, passed over when damaged.

    WORKDIR/checkpoints/<step>/params/, opt/, meta/     Orbax items
    WORKDIR/checkpoints/<step>/DIGEST.json              sha256 of every file above, written last

Orbax restores an array with a flipped byte without a word, so a checkpoint counts only if its digest stands and
agrees, and if its evaluation loss is finite. A save cut off at any moment leaves no digest, and an older checkpoint is
deleted only after a newer one has its digest: there is always a good one to go back to. Folders and files of other
names are left alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx

from zoo import config as zoo_config
from zoo import files, memory, paths
from zoo.data.tokenizer import Tokenizer, for_run
from zoo.errors import RunError, UsageError, warn
from zoo.model import LanguageModel

DIGEST = "DIGEST.json"
_LARGEST_JSON = 64 << 20  # bytes of a file that is read as a whole
ITEMS = ("params", "opt", "meta")


class SaveError(RunError):
    """A checkpoint could not be written. Threads of Orbax may wait for ten minutes more."""


class Digest(NamedTuple):
    """What DIGEST.json holds."""

    loss: float | None  # on the evaluation, nats per token
    files: dict[str, str]  # sha256 by name, "params/manifest.ocdbt"


class Checkpoint(NamedTuple):
    step: int
    state: Any  # what `restore` was given, with arrays
    meta: dict[str, Any]  # what `save` was given


class Checkpointer:
    """Saves and restores training states: any NamedTuple with the fields `params` (nnx.State) and `opt` (a pytree).

    Kept are the newest `keep_last` checkpoints and the `keep_best` ones of lowest evaluation loss.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 2, keep_best: int = 1):
        self.directory = pathlib.Path(directory).absolute()
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._orbax = _orbax_checkpointer()
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._unfinished: concurrent.futures.Future | None = None

    def steps(self) -> list[int]:
        """Steps of complete checkpoints, oldest first; whether they are undamaged shows when they are restored."""
        return complete_steps(self.directory)

    def save(self, step: int, state: Any, *, loss: float | None = None, meta: dict[str, Any] | None = None) -> None:
        """Copy `state` off the devices, and write it in the background; the caller may donate it right away.

        Args:
          loss: evaluation loss (nats per token) of this state, where there is one: it ranks the best.
          meta: JSON, handed back by `restore`.

        Raises:
          SaveError: this save, or the one before, failed (a full disk); checkpoints before stay as they were.
        """
        self.wait()
        params, rest = _items(state)
        description = {"parameters": shapes(params), "meta": meta or {}}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params), opt=ocp.args.StandardSave(rest), meta=ocp.args.JsonSave(description)
        )
        path = self.directory / str(step)
        try:
            if loss is not None and not math.isfinite(loss):
                raise ValueError(f"its evaluation loss is {loss}")
            self.directory.mkdir(parents=True, exist_ok=True)
            _delete_leftovers(self.directory)
            if os.path.lexists(path) and step not in self.steps():
                warn(f"{path} is no checkpoint; renamed to {path.name}.stray")
                path.rename(path.with_name(f"{path.name}.stray"))
            self._check_room(params, rest)
            self._orbax.save(path, args=items)
        except Exception as error:
            raise self._failed(step, error) from error
        self._unfinished = self._finisher.submit(self._finish, step, loss)

    def check(self) -> None:
        """Raise the SaveError of a save that has failed meanwhile; does not wait."""
        if self._unfinished is not None and self._unfinished.done():
            self.wait()

    def wait(self) -> None:
        """Until the save in progress is complete. Raises its SaveError."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            unfinished.result()

    def close(self) -> None:
        """Wait, then let go of the threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            self._orbax.close()

    def restore(self, abstract_state: Any) -> Checkpoint | None:
        """The newest undamaged checkpoint, its arrays on the shardings of `abstract_state`; None: there is none.

        A damaged one is passed over with a warning and renamed `<step>.damaged`, so that its step can be saved again;
        it is kept until that is done.

        Raises:
          UsageError: the checkpoint holds other parameters than `abstract_state`; or there are checkpoints, but none is
            undamaged. All stay where they are, for what is left of the run should not be overwritten unasked.
        """
        params, rest = _items(abstract_state)
        damaged = {}
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                verify(path)
                description = _read_description(self._orbax, path)
                check_parameters(f"checkpoint {path}", description["parameters"], shapes(params))
                items = self._orbax.restore(
                    path,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(params), opt=ocp.args.StandardRestore(rest)
                    ),
                )
            except UsageError:
                raise
            except Exception as error:  # for damage Orbax raises what it likes, bare Exception too
                damaged[step] = _reason(error)
                continue
            self._set_aside(damaged)
            _delete_leftovers(self.directory)
            state = _with_leaves(abstract_state._replace(params=()), items["opt"])
            state = state._replace(params=_with_leaves(abstract_state.params, items["params"]))
            return Checkpoint(step, state, description["meta"])
        _refuse_if_damaged(self.directory, damaged)
        return None

    def prune(self) -> None:
        """Delete what neither `keep_last` nor `keep_best` keeps, and damaged ones that were passed."""
        steps = self.steps()
        losses = {step: _loss(self.directory / str(step)) for step in steps}
        evaluated = [step for step in steps if losses[step] is not None]
        best = sorted(evaluated, key=lambda step: losses[step])[: self.keep_best]
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            # The digest first: what is half deleted must not look complete.
            (self.directory / str(step) / DIGEST).unlink()
            shutil.rmtree(self.directory / str(step))
        for aside in _asides(self.directory):
            if steps and int(aside.stem) <= steps[-1]:  # made again, or passed
                shutil.rmtree(aside)

    def _set_aside(self, damaged: dict[int, str]) -> None:
        for step, reason in damaged.items():
            path = self.directory / str(step)
            warn(f"checkpoint {path} is damaged ({reason}); set aside, falling back to the one before")
            aside = path.with_name(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def _check_room(self, *items: dict[str, Any]) -> None:
        # Orbax would find out too, after minutes of writing; it compresses floats by less than a tenth.
        needed = 0.9 * sum(x.nbytes for x in jax.tree.leaves(items))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"No space left: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")

    def _finish(self, step: int, loss: float | None) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_digest(self.directory / str(step), loss)
                self.prune()
        except Exception as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> SaveError:
        with contextlib.suppress(OSError):
            _delete_leftovers(self.directory)
        steps, reason = self.steps(), _reason(error)
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        advice = "Mend that"
        if re.search("space|quota", reason, re.IGNORECASE):
            advice = "Make room"
            if len(steps) > 1:
                advice += " (a lower checkpoint.keep_last or keep_best deletes older checkpoints at the next start)"
        return SaveError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({reason}); {kept}. "
            f"{advice}, then repeat the command to continue from it"
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, reopened."""

    model: LanguageModel  # its `tokenizer_size` is the tokenizer's
    tokenizer: Tokenizer  # `zoo.data.tokenizer` says what it can do
    config: zoo_config.Config
    step: int  # whose parameters the model has


def load_run(workdir: str | os.PathLike, step: int | None = None) -> Run:
    """Reopen a run with the parameters of `step` (None: of the newest undamaged checkpoint), on the first device.

    Only JSON and arrays are read; nothing in the folder is executed, changed or deleted.

    Raises:
      UsageError: no run in `workdir`, no (undamaged) checkpoint of that step, or no tokenizer.
    """
    workdir = pathlib.Path(paths.expand(workdir)).absolute()
    config = read_config(workdir)
    tokenizer = for_run(workdir, config)
    memory.check_parameters(config.model, str(workdir))
    directory = workdir / "checkpoints"
    if step is not None:
        _check_is_there(directory, step)
    model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for name, x in named_leaves(abstract).items()
    }
    limit = _LARGEST_JSON + 16 * sum(x.size * max(4, x.dtype.itemsize) for x in params.values())  # optimizer included
    orbax = _orbax_checkpointer()
    tried: set[int] = set()
    try:
        # Listed anew each time: a run that still trains deletes old checkpoints while this one is read.
        while candidates := [s for s in complete_steps(directory) if s not in tried and step in (None, s)]:
            candidate = candidates[-1]
            tried.add(candidate)
            path = directory / str(candidate)
            try:
                verify(path, limit)
                check_parameters(f"checkpoint {path}", _read_description(orbax, path)["parameters"], shapes(params))
                items = orbax.restore(path, args=ocp.args.Composite(params=ocp.args.StandardRestore(params)))
            except UsageError:
                raise
            except Exception as error:
                if (path / DIGEST).exists():
                    warn(f"checkpoint {path} is damaged ({_reason(error)}); passed over")
                continue
            model = nnx.merge(graphdef, _with_leaves(abstract, items["params"]))
            model.tokenizer_size = min(tokenizer.vocab_size, model.vocab_size)
            return Run(model, tokenizer, config, candidate)
    finally:
        orbax.close()
    if step is not None:
        _check_is_there(directory, step)  # or it was deleted meanwhile
    raise UsageError(
        f"{directory} has no undamaged checkpoint{'' if step is None else f' of step {step}'}; "
        f"complete steps: {_listed(complete_steps(directory))}. Train first, or name another --workdir or --step"
    )


def _check_is_there(directory: pathlib.Path, step: int) -> None:
    steps = complete_steps(directory)
    if step not in steps:
        raise UsageError(f"{directory} has no checkpoint of step {step}; it has {_listed(steps)}")


def evaluation_loss(workdir: str | os.PathLike, step: int) -> float | None:
    """Of a checkpoint, nats per token; None: it was not evaluated."""
    return _loss(pathlib.Path(paths.expand(workdir)) / "checkpoints" / str(step))


def newest_meta(directory: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """Step and `meta` of the newest checkpoint that is complete and whose description is undamaged; arrays wait for
    `Checkpointer.restore`. None: nothing was ever saved.

    Raises:
      UsageError: there are checkpoints, but all are damaged.
    """
    steps, damaged = complete_steps(directory), {}
    if steps:
        with contextlib.closing(_orbax_checkpointer()) as orbax:
            for step in reversed(steps):
                path = directory / str(step)
                try:
                    verify(path, only="meta/")
                    return step, _read_description(orbax, path)["meta"]
                except Exception as error:
                    damaged[step] = _reason(error)
    _refuse_if_damaged(directory, damaged)
    return None


def _refuse_if_damaged(directory: pathlib.Path, damaged: dict[int, str]) -> None:
    """UsageError if there were checkpoints, of which none is good."""
    found = [f"{step} ({reason})" for step, reason in damaged.items()] + [path.name for path in _asides(directory)]
    if found:
        raise UsageError(
            f"{directory}: every checkpoint is damaged: {', '.join(found)}. Put back a good one, or move this folder "
            "away to train from the start"
        )


def read_config(workdir: str | os.PathLike) -> zoo_config.Config:
    """The config that the run in `workdir` was started with, checked. UsageError if there is no run."""
    path = pathlib.Path(paths.expand(workdir)) / "config.json"
    try:
        config = zoo_config.read_json(path)
    except OSError as error:
        raise UsageError(
            f"{workdir} is no run: {path} cannot be read ({error.strerror}); expected the --workdir of a training run"
        ) from error
    try:
        zoo_config.validate(config)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return config


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: "embed.embedding", "units.blocks.0.mixer.q.kernel"."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # An nnx.Variable adds ".value" to the path of the array that it holds.
        named[jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")] = leaf
    return named


def shapes(tree: Any) -> dict[str, list[int]]:
    """Of the leaves, by dotted path."""
    return {name: list(x.shape) for name, x in named_leaves(tree).items()}


def check_parameters(where: str, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    """UsageError naming the parameters that differ between what `where` holds and what the config makes."""
    names = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if not names:
        return
    differences = [f"{n}: {found.get(n, 'missing')} there, {wanted.get(n, 'missing')} in this config" for n in names]
    shown = "; ".join(differences[:6]) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")
    raise UsageError(
        f"{where} is of another architecture: {shown}. Use the model that it was trained with, or another --workdir"
    )


def complete_steps(directory: pathlib.Path) -> list[int]:
    """Of checkpoints that have a digest, oldest first."""
    return sorted(int(path.name) for path in _entries(directory) if _is_step(path) and (path / DIGEST).is_file())


def _entries(directory: pathlib.Path) -> Iterable[pathlib.Path]:
    return directory.iterdir() if directory.is_dir() else ()


def _is_step(path: pathlib.Path) -> bool:
    """Whether it is named as checkpoints are (5, not 05), and a folder."""
    return _is_step_name(path.name) and _is_checkpoint_folder(path)


def _is_step_name(name: str) -> bool:
    return re.fullmatch("0|[1-9][0-9]{0,18}", name) is not None


def _is_checkpoint_folder(path: pathlib.Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _asides(directory: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints set aside as damaged."""
    return [p for p in _entries(directory) if p.suffix == ".damaged" and p.is_dir() and _is_step_name(p.stem)]


def write_digest(path: pathlib.Path, loss: float | None) -> None:
    """Declare the checkpoint at `path` complete: sha256 of every file, and its evaluation loss."""
    digest = Digest(loss, {name: _sha256(path / name) for name in _files(path)})
    paths.replace(path / DIGEST, json.dumps(digest._asdict(), indent=1))


def read_digest(path: pathlib.Path) -> Digest:
    """Of the checkpoint at `path`. Raises ValueError, or OSError, if it is damaged or the loss in it is not finite."""
    found = files.read_json(path / DIGEST, _LARGEST_JSON)
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or not found["files"]:
        raise ValueError(f"{DIGEST} holds no digests")
    loss = found.get("loss")
    if loss is not None and not (type(loss) in (int, float) and math.isfinite(loss)):
        raise ValueError(f"its evaluation loss is {loss!r}")
    return Digest(loss, found["files"])


def verify(path: pathlib.Path, limit: int | None = None, only: str = "") -> None:
    """Raise ValueError if a file of the checkpoint is missing, differs from its digest, or is no file inside it.

    Args:
      limit: bytes that all files together may have; None: any number.
      only: what the names of the files begin with; others are not read.
    """
    recorded, sizes = read_digest(path).files, _sizes(path)
    if limit is not None and sum(sizes.values()) > limit:
        raise ValueError(f"it holds {sum(sizes.values()):,} bytes, more than a model of this size has")
    for name, digest in recorded.items():
        if not name.startswith(only):
            continue
        if name not in sizes:
            raise ValueError(f"{name} is missing")
        if _sha256(path / name) != digest:
            raise ValueError(f"{name} differs from its digest")


def _sizes(path: pathlib.Path) -> dict[str, int]:
    """Bytes of every file below `path`. ValueError for what is no regular file: Orbax would follow it, or wait."""
    found = {}
    for root, folders, names in os.walk(path):
        for name in [*folders, *names]:
            status = os.lstat(os.path.join(root, name))
            if stat.S_ISREG(status.st_mode):
                found[os.path.relpath(os.path.join(root, name), path)] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise ValueError(f"{name} is no regular file")
    return found


def _loss(path: pathlib.Path) -> float | None:
    try:
        return read_digest(path).loss
    except (ValueError, OSError, RecursionError):
        return None


def _files(path: pathlib.Path) -> list[str]:
    found = (pathlib.Path(root, name).relative_to(path) for root, _, names in os.walk(path) for name in names)
    return sorted(str(name) for name in found if not name.name.startswith(DIGEST))


def _sha256(path: pathlib.Path) -> str:
    with files.open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _items(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters, and all else that training continues from, each by name."""
    return named_leaves(state.params), named_leaves(state._replace(params=()))


def _with_leaves(tree: Any, named: dict[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in named_leaves(tree)])


def _read_description(orbax: ocp.AsyncCheckpointer, path: pathlib.Path) -> dict[str, Any]:
    return orbax.restore(path, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _orbax_checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(*ITEMS))


def _delete_leftovers(directory: pathlib.Path) -> None:
    """Of saves that were cut off: Orbax's temporary folders, and steps without a digest."""
    if jax.process_index() != 0:
        return
    for entry in _entries(directory):
        begun = _is_step(entry) and any((entry / item).is_dir() for item in ITEMS) and not (entry / DIGEST).exists()
        if begun or (".orbax-checkpoint-tmp" in entry.name and _is_checkpoint_folder(entry)):
            shutil.rmtree(entry)


def _reason(error: BaseException) -> str:
    text = f"{error}".strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if system := re.search(r": ([^:]*) \[os_error_code", text):  # the end of TensorStore's long ones
        return system[1]
    first = text.splitlines()[0]
    return first if len(first) <= 160 else first[:157] + "..."


def _listed(steps: list[int]) -> str:
    return "steps " + ", ".join(map(str, steps)) if steps else "none"
