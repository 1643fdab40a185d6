"""Folders of safetensors: opened without being read, written shard by shard. Nothing of them is ever executed.

The safetensors package checks a file (offsets, sizes, its end); numpy then maps each tensor, so that of a view of it,
cut or transposed, only what is copied is read. bfloat16 is ml_dtypes', as jax has it.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from zoo import files
from zoo.errors import UsageError, warn
from zoo.settings import shown
from zoo.terminal import brief, one_line

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; the package's own limit
LARGEST_JSON = 64 << 20  # bytes of an index
MAX_SHARDS, MAX_NAMES = 10_000, 8
SHARD_BYTES = 2_000_000_000  # of a file that is written, at most
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Tensor(NamedTuple):
    """Where a tensor lies."""

    path: pathlib.Path
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it

    def view(self) -> np.ndarray:
        """Mapped, not read."""
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


class Weights(NamedTuple):
    """A folder's tensors by name, and its files."""

    folder: pathlib.Path
    tensors: dict[str, Tensor]
    paths: list[pathlib.Path]


def open_folder(folder: pathlib.Path) -> Weights:
    """Headers and index are read and checked, no tensor is.

    Raises:
      UsageError: no folder, no safetensors in it, or a file, header or index that is not what it should be.
    """
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: no folder that can be read ({getattr(error, 'strerror', error)})") from error
    if INDEX in names:
        return _open_shards(folder)
    found = [SINGLE] if SINGLE in names else [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        path = folder / found[0]
        return Weights(folder, _read_header(path), [path])
    if found:
        raise UsageError(f"{folder}: {len(found)} safetensors files and no {INDEX} that says what is in which")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UsageError(
            f"{folder}: its weights are pickled ({listed(pickles)}), and to open a pickle is to run the code in it. "
            "Convert them once where you trust them, with the package they come from: "
            f"model.from_pretrained({str(folder)!r}), then safetensors.torch.save_model(model, 'model.safetensors') "
            "beside a copy of config.json and tokenizer.json"
        )
    raise UsageError(f"{folder}: neither {SINGLE} nor {INDEX} is there; it has {listed(names) or 'no files'}")


def _open_shards(folder: pathlib.Path) -> Weights:
    where = folder / INDEX
    index = read_json(where, LARGEST_JSON)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{where}: no weight_map of tensors and files")
    bad = [name for name in weight_map.values() if not _is_shard(name)]
    if bad:
        raise UsageError(f"{where}: expected names of .safetensors files beside it, got {listed(map(shown, bad))}")
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing or len(shards) > MAX_SHARDS:
        found = f"missing {listed(missing)}" if missing else f"{len(shards)} files, at most {MAX_SHARDS}"
        raise UsageError(f"{where}: of {len(shards)} shards, {found}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in _read_header(folder / shard).items():
            if name in tensors:
                raise UsageError(f"{brief(name)} stands twice, in {tensors[name].path.name} and in {shard}")
            tensors[name] = tensor
    differ = [
        f"{brief(name, 100)}: {weight_map.get(name, 'nowhere')} there, "
        f"{tensors[name].path.name if name in tensors else 'nowhere'} in fact"
        for name in sorted(tensors.keys() | weight_map.keys())
        if name not in tensors or weight_map.get(name) != tensors[name].path.name
    ]
    if differ:
        raise UsageError(f"{where} does not say where tensors are: {listed(differ, '; ')}")
    return Weights(folder, tensors, [folder / shard for shard in shards])


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,200}\.safetensors", name) is not None


def _read_header(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        with files.open_regular(files.inside(path)) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8)) if size >= 8 else (0,)
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise UsageError(f"{path}: a header of {length:,} bytes, in a file of {size:,}; it is damaged, or cut")
            header = _parse(file.read(length))
        with safetensors.safe_open(path, framework="numpy") as opened:
            names = set(opened.keys())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: no safetensors file, or damaged ({one_line(str(error))[:200]})") from error
    header.pop("__metadata__", None)
    if names != set(header):
        raise UsageError(f"{path}: its header is read in two ways")
    return {
        name: Tensor(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
    }


def _parse(text: bytes) -> Any:
    """JSON without names that stand twice."""

    def once(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def read_json(path: pathlib.Path, limit: int) -> Any:
    """JSON of others. UsageError: it is not there, too large, no JSON, or says something twice."""
    try:
        return _parse(files.read_bytes(files.inside(path), limit))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: no JSON ({one_line(str(error))[:200] or 'nested too deeply'})") from error


def compare(weights: Weights, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """UsageError naming what the files hold and the model does not want, and the other way round."""
    found = weights.tensors
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    left = {name: tensor for name, tensor in found.items() if name not in wanted}
    unknown = [f"{brief(name, 100)} {shown(list(tensor.shape))}" for name, tensor in left.items()]
    differ = [
        f"{name}: {shown(list(found[name].shape))} in the file, {list(shape)} by config.json"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    dtypes = [
        f"{name}: {found[name].dtype}, expected {', '.join(DTYPES)}"
        for name in wanted
        if name in found and found[name].dtype not in DTYPES
    ]
    parts = {
        "not in the files": missing,
        "in the files, and not of the model that config.json describes": unknown,
        "of another shape": differ,
        "of another type": dtypes,
    }
    said = [f"{len(names)} {what}: {listed(names, '; ')}" for what, names in parts.items() if names]
    if said:
        raise UsageError(f"{weights.folder}: tensors {'. Tensors '.join(said)}")


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    names = list(names)
    more = f"{separator}and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return separator.join(brief(name) for name in names[:MAX_NAMES]) + more


def sha256(path: pathlib.Path) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_shards(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterator[tuple[str, np.ndarray]],
    dtype: np.dtype, shard_bytes: int,
) -> None:  # fmt: skip
    """One file, or shards of at most `shard_bytes` (of one tensor, if it is larger) and their index.

    Args:
      shapes: of all tensors in the order of `arrays`, which is read once; a shard's are held at a time.
    """
    shards: list[list[str]] = [[]]
    sizes, held = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}, 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    count, weight_map = len(shards), {}
    for i, names in enumerate(shards):
        path = SINGLE if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
        of_shard = {}
        for name in names:
            got, array = next(arrays)
            assert got == name, f"{got}, expected {name}"
            of_shard[name] = _as_type(name, array, dtype)
        try:
            safetensors.numpy.save_file(of_shard, folder / path, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk too
            raise OSError(f"{path}: {error}") from error
        weight_map |= dict.fromkeys(names, path)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        files.write(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _as_type(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(array.astype(dtype, copy=False))
    if made.dtype != array.dtype and (np.isinf(made) & np.isfinite(array)).any():
        raise UsageError(f"{name}: it has values that {dtype} cannot hold; write another --dtype")
    return made


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that becomes `path` when all went well, and is gone otherwise, with those above that were made for it.

    Raises:
      UsageError: something stands at `path`.
    """
    if "\0" in str(path):
        raise UsageError(f"{one_line(path)} is no path; choose another folder")
    temporary = path.parent / f".{path.name[:64]}.{secrets.token_hex(4)}.unfinished"
    above = [folder for folder in path.parents if not folder.exists()]
    try:
        if os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
            raise UsageError(f"{path} stands there already, and nothing is overwritten; choose another folder")
        temporary.mkdir(parents=True)
        left = [name.name for name in path.parent.glob(f".{glob.escape(path.name[:64])}.????????.unfinished")]
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
    if len(left) > 1:
        others = listed(sorted(set(left) - {temporary.name}))
        warn(f"{path.parent}: {others} is of one that was killed, or that still writes; delete it if none does")
    try:
        yield temporary
        temporary.rename(path)  # an empty folder is replaced
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first that is not empty
            for folder in above:
                folder.rmdir()
