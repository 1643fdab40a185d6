"""Saving and restoring the state of a training run."""

import concurrent.futures
import contextlib
import errno
import math
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from zoo import processes
from zoo.checkpoints import digest
from zoo.checkpoints.digest import DIGEST
from zoo.checkpoints.folder import asides, complete_steps, delete_leftovers, refuse_if_damaged
from zoo.checkpoints.items import orbax_checkpointer, read_description, reason_of
from zoo.checkpoints.leaves import check_parameters, named_leaves, shapes, with_leaves
from zoo.errors import RunError, UsageError, warn


class SaveError(RunError):
    """A checkpoint could not be written. Threads of Orbax may wait for ten minutes more."""


class Checkpoint(NamedTuple):
    step: int
    state: Any  # what `restore` was given, with arrays; of parameters alone, `opt` is None and they are all
    meta: dict[str, Any]  # what `save` was given


class Checkpointer:
    """Saves and restores training states: any NamedTuple with the fields `params` (nnx.State) and `opt` (a pytree).
    Where `opt` is None and nothing else is there, the checkpoint is of parameters alone, as imported weights are.

    Kept are the newest `keep_last` checkpoints and the `keep_best` ones of lowest evaluation loss.

    Several processes share the directory and call the same methods at the same steps: each writes and reads what its
    devices hold, the first does all else. The others may hold a save for complete before its digest stands.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 2, keep_best: int = 1, at_once: int = 0):
        """`at_once`: bytes that a save writes at a time, of which it holds a second copy; 0: as many as it likes."""
        self.directory = pathlib.Path(directory).absolute()
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._orbax = orbax_checkpointer(at_once)
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
        items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave(description)}
        items |= {"opt": ocp.args.StandardSave(rest)} if rest else {}
        path = self.directory / str(step)
        try:
            if loss is not None and not math.isfinite(loss):
                raise ValueError(f"its evaluation loss is {loss}")
            if processes.is_first():
                self._make_way(path)
                self._check_room(params, rest)
            self._orbax.save(path, args=ocp.args.Composite(**items))
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
        for step in reversed(processes.broadcast(self.steps())):
            path = self.directory / str(step)
            if reason := self._damage(path):
                damaged[step] = reason
                continue
            try:
                description = read_description(path)
                check_parameters(f"checkpoint {path}", description["parameters"], shapes(params))
                wanted = {"params": ocp.args.StandardRestore(params)}
                if (path / "opt").is_dir():
                    wanted["opt"] = ocp.args.StandardRestore(rest)
                items = self._orbax.restore(path, args=ocp.args.Composite(**wanted))
            except UsageError:
                raise
            except Exception as error:  # for damage Orbax raises what it likes, bare Exception too
                if processes.count() > 1:  # the files are what was written: it is not damage, but this machine
                    raise RunError(f"checkpoint {path} cannot be read ({reason_of(error)})") from error
                damaged[step] = reason_of(error)
                continue
            if processes.is_first():
                self._set_aside(damaged)
            delete_leftovers(self.directory)
            state = abstract_state._replace(opt=None)
            if "opt" in wanted:
                state = with_leaves(abstract_state._replace(params=()), items["opt"])
            state = state._replace(params=with_leaves(abstract_state.params, items["params"]))
            return Checkpoint(step, state, description["meta"])
        refuse_if_damaged(self.directory, damaged)
        return None

    def prune(self) -> None:
        """Delete what neither `keep_last` nor `keep_best` keeps, and damaged ones that were passed."""
        if not processes.is_first():
            return
        steps = self.steps()
        losses = {step: digest.recorded_loss(self.directory / str(step)) for step in steps}
        evaluated = [step for step in steps if losses[step] is not None]
        best = sorted(evaluated, key=lambda step: losses[step])[: self.keep_best]
        for step in set(steps) - set(steps[-self.keep_last :]) - set(best):
            # The digest first: what is half deleted must not look complete.
            (self.directory / str(step) / DIGEST).unlink()
            shutil.rmtree(self.directory / str(step))
        for aside in asides(self.directory):
            if steps and int(aside.stem) <= steps[-1]:  # made again, or passed
                shutil.rmtree(aside)

    @staticmethod
    def _damage(path: pathlib.Path) -> str:
        """What is damaged, as all processes find that read a share of the files each; "": nothing."""
        try:
            digest.verify(path, share=(processes.index(), processes.count()))
            found = ""
        except Exception as error:
            found = reason_of(error)
        return processes.broadcast(next(filter(None, processes.gather(found)), ""))

    def _make_way(self, path: pathlib.Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        delete_leftovers(self.directory)
        if os.path.lexists(path) and int(path.name) not in self.steps():
            warn(f"{path} is no checkpoint; renamed to {path.name}.stray")
            path.rename(path.with_name(f"{path.name}.stray"))

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
            if processes.is_first():
                digest.write_digest(self.directory / str(step), loss)
                self.prune()
        except Exception as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> SaveError:
        with contextlib.suppress(OSError):
            delete_leftovers(self.directory)
        steps, reason = self.steps(), reason_of(error)
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


def _items(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters, and all else that training continues from, each by name."""
    return named_leaves(state.params), named_leaves(state._replace(params=()))
