"""Everything that is checked and settled before a run allocates or compiles anything."""

import copy
import fcntl
import os
import pathlib
from typing import IO, NamedTuple

from jax.sharding import Mesh

from zoo import checkpoints, data, metrics, sharding
from zoo import config as zoo_config
from zoo.config import Config
from zoo.errors import UsageError

# What may differ when a run is resumed (a trailing dot: the whole section). A longer train.steps stretches the
# schedule of the learning rate from the step resumed on; another mesh changes sums in their last bits.
FREE_ON_RESUME = (
    "train.steps", "train.log_every", "eval.", "checkpoint.", "metrics.", "mesh.", "data.cache_dir",
    "data.max_lost_text", "data.read_threads",
)  # fmt: skip

VOCAB_MULTIPLE = 64


class Run(NamedTuple):
    workdir: pathlib.Path
    config: Config  # as asked for, with the vocabulary settled; in WORKDIR/config.json
    data_config: Config  # the same, reading the run's own copy of the tokenizer
    lock: IO  # closing it lets go of the workdir


def prepare(config: Config, workdir: str | os.PathLike) -> Run:
    """Check `config` as a whole and against what stands in `workdir`, and write config.json and tokenizer.json there.

    Raises:
      UsageError: a setting that is wrong by itself, with the others, with the data, or with the run in `workdir`.
    """
    workdir = pathlib.Path(workdir).absolute()
    zoo_config.validate(config)
    metrics.check(config.metrics)
    data.check(config)
    config = settle_vocabulary(config, workdir)
    saved = workdir / "config.json"
    if saved.exists():
        check_resumable(checkpoints.read_config(workdir), config, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = _lock(workdir)
        own_tokenizer = workdir / "tokenizer.json"
        if config.data.tokenizer != data.tokenizer.BYTES and not own_tokenizer.exists():
            _replace(own_tokenizer, pathlib.Path(config.data.tokenizer).expanduser().read_text())
        _replace(saved, zoo_config.to_json(config))
    except OSError as error:
        raise UsageError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another") from error
    data_config = copy.deepcopy(config)
    if own_tokenizer.exists():
        data_config.data.tokenizer = str(own_tokenizer)
    return Run(workdir, config, data_config, lock)


def settle_vocabulary(config: Config, workdir: str | os.PathLike | None) -> Config:
    """A copy of `config` whose model.vocab_size, if it was 0, is what the tokenizer (of the run in `workdir`) needs."""
    config = copy.deepcopy(config)
    if config.model.vocab_size == 0:
        name = config.data.tokenizer
        tokenizer = data.tokenizer.for_run(workdir, config) if workdir else data.tokenizer.load(name)
        config.model.vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return config


def check_resumable(saved: Config, config: Config, workdir: pathlib.Path) -> None:
    """UsageError naming the settings that differ from the run's, but for those that may."""
    differences = [d for d in zoo_config.difference(saved, config) if not d.startswith(FREE_ON_RESUME)]
    if differences:
        raise UsageError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(differences)} (the run's -> yours). "
            "Repeat the run's own command to resume it, or choose another --workdir"
        )


def check_mesh(config: Config, mesh: Mesh) -> None:
    """UsageError if a batch does not spread over the mesh."""
    sizes = dict(zip(sharding.MESH_AXES, mesh.devices.shape, strict=True))
    copies = sizes["data"] * sizes["fsdp"]
    evaluation = config.eval.batch_size or config.train.batch_size
    for field, rows in (
        ("train.batch_size / train.accumulate_steps", config.train.batch_size // config.train.accumulate_steps),
        ("eval.batch_size", evaluation),
    ):
        if rows % copies:
            raise UsageError(
                f"{field}: {rows} sequences do not spread over mesh.data * mesh.fsdp = {copies}; use a multiple"
            )
    if config.train.context_length % sizes["sequence"]:
        raise UsageError(
            f"train.context_length: {config.train.context_length} tokens do not spread over mesh.sequence = "
            f"{sizes['sequence']}; use a multiple"
        )


def _lock(workdir: pathlib.Path) -> IO:
    lock = open(workdir / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however the process ends
    except BlockingIOError as error:
        lock.close()
        raise UsageError(f"--workdir={workdir}: another process trains there; choose another") from error
    return lock


def _replace(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)
