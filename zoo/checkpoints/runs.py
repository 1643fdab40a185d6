"""A run, reopened: nothing in its folder is executed, changed or deleted."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from zoo import config as zoo_config
from zoo import files, memory, processes
from zoo.checkpoints import digest
from zoo.checkpoints.digest import DIGEST
from zoo.checkpoints.folder import complete_steps, listed, refuse_if_damaged
from zoo.checkpoints.items import orbax_checkpointer, read_description, reason_of
from zoo.checkpoints.leaves import check_parameters, named_leaves, shapes, with_leaves
from zoo.data.tokenizer import Tokenizer, for_run
from zoo.errors import UsageError, warn
from zoo.model import LanguageModel

ORIGIN = "origin"  # the folder of what imported weights came with, and of origin.json that says from where


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, reopened."""

    model: LanguageModel  # its `tokenizer_size` is the tokenizer's
    tokenizer: Tokenizer  # `zoo.data.tokenizer` says what it can do
    config: zoo_config.Config
    step: int  # whose parameters the model has
    fingerprint: str  # of those parameters, as that checkpoint's digest has them


def load_run(
    workdir: str | os.PathLike, step: int | None = None, shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> Run:
    """Reopen a run with the parameters of `step` (None: of the newest undamaged checkpoint).

    Only JSON and arrays are read; nothing in the folder is executed, changed or deleted.

    Args:
      shardings: of the parameters, by dotted path; None: all on this process's first device. Several processes load
        them together, each what its devices hold, and name the step.

    Raises:
      UsageError: no run in `workdir`, no (undamaged) checkpoint of that step, or no tokenizer.
    """
    workdir = pathlib.Path(files.expand(workdir)).absolute()
    config = read_config(workdir)
    tokenizer = for_run(workdir, config)
    if shardings is None:
        memory.check_parameters(config.model, str(workdir))
    directory = workdir / "checkpoints"
    if step is not None:
        _check_is_there(directory, step)
    model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=(shardings or {}).get(name, device))
        for name, x in named_leaves(abstract).items()
    }
    limit = digest.LARGEST + 16 * sum(x.size * max(4, x.dtype.itemsize) for x in params.values())  # optimizer included
    orbax = orbax_checkpointer()
    tried: set[int] = set()
    try:
        # Listed anew each time: a run that still trains deletes old checkpoints while this one is read.
        while candidates := [s for s in complete_steps(directory) if s not in tried and step in (None, s)]:
            candidate = candidates[-1]
            tried.add(candidate)
            path = directory / str(candidate)
            try:
                if shardings is None or processes.is_first():
                    digest.verify(path, limit)
                check_parameters(f"checkpoint {path}", read_description(path)["parameters"], shapes(params))
                items = orbax.restore(path, args=ocp.args.Composite(params=ocp.args.StandardRestore(params)))
                fingerprint = digest.fingerprint(path)
            except UsageError:
                raise
            except Exception as error:
                if (path / DIGEST).exists():
                    warn(f"checkpoint {path} is damaged ({reason_of(error)}); passed over")
                continue
            model = nnx.merge(graphdef, with_leaves(abstract, items["params"]))
            model.tokenizer_size = min(tokenizer.vocab_size, model.vocab_size)
            return Run(model, tokenizer, config, candidate, fingerprint)
    finally:
        orbax.close()
    if step is not None:
        _check_is_there(directory, step)  # or it was deleted meanwhile
    raise UsageError(
        f"{directory} has no undamaged checkpoint{'' if step is None else f' of step {step}'}; "
        f"complete steps: {listed(complete_steps(directory))}. Train first, or name another --workdir or --step"
    )


def _check_is_there(directory: pathlib.Path, step: int) -> None:
    steps = complete_steps(directory)
    if step not in steps:
        raise UsageError(f"{directory} has no checkpoint of step {step}; it has {listed(steps)}")


def evaluation_loss(workdir: str | os.PathLike, step: int) -> float | None:
    """Of a checkpoint, nats per token; None: it was not evaluated."""
    return digest.recorded_loss(pathlib.Path(files.expand(workdir)) / "checkpoints" / str(step))


def newest_meta(directory: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
    """Step and `meta` of the newest checkpoint that is complete and whose description is undamaged; arrays wait for
    `Checkpointer.restore`. None: nothing was ever saved.

    Raises:
      UsageError: there are checkpoints, but all are damaged.
    """
    damaged = {}
    for step in reversed(complete_steps(directory)):
        path = directory / str(step)
        try:
            digest.verify(path, only="meta/")
            return step, read_description(path)["meta"]
        except Exception as error:
            damaged[step] = reason_of(error)
    refuse_if_damaged(directory, damaged)
    return None


def read_config(workdir: str | os.PathLike) -> zoo_config.Config:
    """The config that the run in `workdir` was started with, checked. UsageError if there is no run."""
    path = pathlib.Path(files.expand(workdir)) / "config.json"
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
