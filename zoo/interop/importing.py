"""Weights of another package into a workdir, tensor by tensor, onto the mesh.

Everything is checked first, by headers and config alone: sizes, names, shapes, types, the tokenizer. Then each device
reads its part of each parameter; a process holds what its devices hold, and one parameter more. The workdir is written
beside its place and moved there at the end.
"""

import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from zoo import checkpoints, files, memory, processes, sharding
from zoo import config as zoo_config
from zoo.checkpoints import ORIGIN
from zoo.config import Config, ModelConfig
from zoo.data.tokenizer import BYTES
from zoo.errors import RunError, UsageError, warn
from zoo.flops import num_parameters
from zoo.interop import families, family, hub, tokenizer
from zoo.interop.files import DTYPES, Tensor, Weights, compare, listed, new_folder, open_folder, read_json, sha256
from zoo.interop.table import Entry, Table, table
from zoo.sharding import MeshConfig
from zoo.terminal import brief
from zoo.training import placement, step

MAX_JSON = 16 << 20  # bytes of a config.json
MORE = "import on more devices, spread by --fsdp"
AT_ONCE = 10**9  # bytes of parameters that are written at a time
PIECE = 16 << 20  # bytes that are compared at a time
LEARNING_RATE = 2e-5  # of a run that goes on from it, where nobody says otherwise
CONTEXT = 1024  # tokens, the same


class Imported(NamedTuple):
    workdir: pathlib.Path
    model_type: str
    config: Config
    parameters: int
    dtypes: list[str]  # of the files
    ignored: list[str]  # fields of config.json


class _State(NamedTuple):
    """What a checkpoint of parameters alone holds."""

    params: dict[str, jax.Array]
    opt: None = None


def import_model(
    folder: str, workdir: str, *, asked_tokenizer: str = "", mesh: MeshConfig | None = None, ignore: Iterable[str] = ()
) -> Imported:
    """Make `workdir` a run that has the weights in `folder`, and no training yet.

    Args:
      folder: a path, or hf:NAME.
      asked_tokenizer: `bytes`, or the path of a tokenizer.json; "": the folder's.
      mesh: how parameters lie on the devices; None: as the default config has it.
      ignore: fields of config.json that are passed over though they are not known.

    Raises:
      UsageError: something in the folder is not as it should be, cannot be expressed, or does not fit; or `workdir` is
        there. Nothing was written.
    """
    source, said = hub.folder_of(files.expand(folder))
    to = pathlib.Path(files.expand(workdir)).absolute()
    values = read_json(source / "config.json", MAX_JSON)
    if not isinstance(values, dict):
        raise UsageError(f"{source / 'config.json'}: expected an object of fields")
    weights = open_folder(source)
    of_model = families.of_config(values, str(source / "config.json"))
    try:
        model, ignored = family.to_model(of_model, values, ignore)
    except UsageError as error:
        raise UsageError(f"{source / 'config.json'} ({of_model.name}): {error}") from error
    config = _config(model, mesh or MeshConfig(), values)
    size = sum(math.prod(t.shape) * DTYPES[t.dtype].itemsize for t in weights.tensors.values() if t.dtype in DTYPES)
    memory.check(f"{source}: {num_parameters(model):,} parameters", 2 * num_parameters(model), jax.devices(), MORE)
    placement.check(config, jax.device_count())
    tokenizer.beside(source)  # or it says now which cannot be carried
    spec = tokenizer.choose(source, asked_tokenizer, model.vocab_size)
    config.data.tokenizer = BYTES if spec == BYTES else str(to / tokenizer.FILE)
    weights = _renamed(without_unread(weights, of_model, model), of_model.renamed)
    places = table(of_model.rules_of(model, values), zoo_config.pattern(model), _abstract(config))
    compare(weights, places.shapes)
    memory.check(f"{source}: {size:,} bytes of parameters", size, jax.devices(), MORE)
    with contextlib.ExitStack() as stack:
        made = str(stack.enter_context(new_folder(to))) if processes.is_first() else None
        temporary = pathlib.Path(processes.broadcast(made))
        try:
            not_finite: set[str] = set()
            _save(temporary, load(places, _abstract(config), weights, not_finite), config)
        except checkpoints.SaveError as error:
            raise RunError(f"{to} cannot be written ({error.__cause__ or error})") from error
        if processes.is_first():
            _write(temporary, source, said, weights, config, spec, of_model.name, ignored)
        processes.barrier()
    if not_finite:
        warn(f"{source}: {len(not_finite)} tensors hold NaN or infinity: {listed(sorted(not_finite))}")
    dtypes = sorted({tensor.dtype for tensor in weights.tensors.values()})
    return Imported(to, of_model.name, config, num_parameters(model), dtypes, ignored)


def _config(model: ModelConfig, mesh: MeshConfig, values: Mapping[str, Any]) -> Config:
    """Of a run that goes on from the weights: slow, and in contexts that the model knows."""
    config = Config(model=model, mesh=copy.deepcopy(mesh))
    longest = values.get("max_position_embeddings")
    longest = longest if type(longest) is int and longest > 0 else CONTEXT
    config.train.context_length = min(CONTEXT, longest)
    config.optimizer.learning_rate = LEARNING_RATE
    zoo_config.validate(config)
    return config


def _abstract(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Our parameters by name, with their shardings on the mesh of all devices."""
    params = nnx.state(step.abstract_model(config), nnx.Param)
    specs = sharding.parameter_specs(params, config.mesh.overrides)
    mesh = sharding.make_mesh(config.mesh)
    placed = sharding.named_shardings(params, mesh, specs)
    shapes, where = checkpoints.named_leaves(params), checkpoints.named_leaves(placed)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in shapes.items()}


def without_unread(weights: Weights, of_model: family.Family, model: ModelConfig) -> Weights:
    """Without buffers, and without a head that repeats the embedding where the two are tied.

    Raises:
      UsageError: such a head differs.
    """
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in of_model.unread)
    }
    if model.tie_embeddings:
        names = {one.ours[0]: one.theirs[0] for one in of_model.rules_of(model)}
        head, embedding = names.get("head.kernel"), names["embed.embedding"]
        if head in tensors and embedding in tensors:
            if not _equal(tensors[head], tensors[embedding]):
                raise UsageError(f"{weights.folder}: {head} differs from {embedding}, and config.json ties them")
            del tensors[head]
    return weights._replace(tensors=tensors)


def _renamed(weights: Weights, renamed: Mapping[str, str]) -> Weights:
    """Under the names of the table."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        for pattern, other in renamed.items():
            name = re.sub(pattern, other, name)
        if name in found:
            raise UsageError(f"{weights.folder}: {brief(name)} stands there under two names")
        found[name] = tensor
    return weights._replace(tensors=found)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Byte by byte: NaN is itself."""
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype not in DTYPES:
        return False
    if 0 in a.shape:
        return True
    there, here = (tensor.view().reshape(-1).view(np.uint8) for tensor in (a, b))
    return all(np.array_equal(there[i : i + PIECE], here[i : i + PIECE]) for i in range(0, len(there), PIECE))


# --- Reading ----------------------------------------------------------------------------------------------------------


def load(
    places: Table, wanted: Mapping[str, jax.ShapeDtypeStruct], weights: Weights, not_finite: set[str]
) -> dict[str, jax.Array]:
    """Our parameters by name, in the files' own type, each part read by the device that holds it.

    Args:
      not_finite: gets the names of tensors with NaN or infinity in what was read.
    """
    return {
        name: jax.make_array_from_callback(
            wanted[name].shape, wanted[name].sharding, _reader(entries, weights, not_finite)
        )
        for name, entries in places.of_parameter().items()
    }


def _reader(entries: list[tuple[Entry, int]], weights: Weights, not_finite: set[str]) -> Callable[[Any], np.ndarray]:
    """index of a part -> the part, of a parameter that has one entry a unit, or one."""
    dtypes = {
        np.dtype(np.float32) if entry.transform.computes else DTYPES[weights.tensors[name].dtype]
        for entry, _ in entries
        for name in entry.theirs
    }
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)  # of bfloat16 and float16 too

    def of_entry(entry: Entry, place: int, index: tuple[slice, ...]) -> np.ndarray:
        views = [weights.tensors[name].view() for name in entry.theirs]
        return entry.transform.read(*views)[place][index]

    def checked(entry: Entry, made: np.ndarray) -> np.ndarray:
        if not all(np.isfinite(row).all() for row in np.atleast_2d(made)):  # by rows: no mask as large as it
            not_finite.update(entry.theirs)
        return made

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if entries[0][0].unit is None:
            made = np.asarray(of_entry(*entries[0], index), order="C")
            return checked(entries[0][0], made).astype(dtype, copy=False)
        units = entries[index[0]]
        first = of_entry(*units[0], index[1:])
        found = np.empty((len(units), *first.shape), dtype)
        for i, unit in enumerate(units):
            found[i] = first if i == 0 else of_entry(*unit, index[1:])
            checked(unit[0], found[i])
        return found

    return part


# --- Writing ----------------------------------------------------------------------------------------------------------


def _save(temporary: pathlib.Path, parameters: dict[str, jax.Array], config: Config) -> None:
    at_once = max(AT_ONCE, *(array.nbytes for array in parameters.values()))
    with contextlib.closing(checkpoints.Checkpointer(temporary / "checkpoints", at_once=at_once)) as checkpointer:
        checkpointer.save(0, _State(parameters), meta={"config": dataclasses.asdict(config)})
        checkpointer.wait()


def _write(
    temporary: pathlib.Path, source: pathlib.Path, said: str, weights: Weights, config: Config, spec: str,
    model_type: str, ignored: list[str],
) -> None:  # fmt: skip
    origin = temporary / ORIGIN
    origin.mkdir()
    carried = tokenizer.carry(source, origin)
    files.write(origin / "config.json", files.read_bytes(source / "config.json", MAX_JSON))
    if spec != BYTES:
        files.write(temporary / tokenizer.FILE, files.read_bytes(spec, tokenizer.LARGEST_FILE))
    hashed = [*weights.paths, source / "config.json", *(source / name for name in carried)]
    origin_of = {
        "model_type": model_type,
        "folder": said,
        "sha256": {path.name: sha256(path) for path in hashed},
        "ignored": ignored,
    }
    files.write(origin / "origin.json", json.dumps(origin_of, indent=2) + "\n")
    files.write(temporary / "config.json", zoo_config.to_json(config))
