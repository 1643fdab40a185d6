"""A run's weights for other packages: safetensors, config.json, tokenizer, and a card that says how they came to be.

The family is the one that the run was imported from, if its weights still are of that kind, else the first one whose
config says all that the model is. Tensors are made and written a shard at a time.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from zoo import checkpoints, files, heads
from zoo import config as zoo_config
from zoo.checkpoints import ORIGIN
from zoo.config import ModelConfig
from zoo.errors import UsageError
from zoo.interop import card, families, tokenizer
from zoo.interop.family import HARMLESS, Family, to_fields, to_model, unsaid
from zoo.interop.files import DTYPES, SHARD_BYTES, new_folder, write_shards
from zoo.interop.importing import MAX_JSON
from zoo.interop.table import Table, table
from zoo.mixers import CAUSAL

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Exported(NamedTuple):
    folder: pathlib.Path
    model_type: str
    step: int
    tensors: int
    files: list[str]


def export_run(
    workdir: str, to: str, *, step: int | None = None, dtype: str = "float32", model_type: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Exported:  # fmt: skip
    """Write the parameters of a run, of `step` (None: of its newest checkpoint), into the new folder `to`.

    Args:
      dtype: of the tensors.
      model_type: of the config.json; "": one that can say what the model is.

    Raises:
      UsageError: no such run; a model that the family, or none, can express; something stands at `to`.
    """
    source, target = pathlib.Path(files.expand(workdir)).absolute(), pathlib.Path(files.expand(to)).absolute()
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype: got {dtype!r}, expected one of {', '.join(DTYPE_NAMES)}")
    config = checkpoints.read_config(source)
    heads.require_tokens(config.model, str(source))
    if config.model.direction != CAUSAL:
        raise UsageError(f"{source} is a bidirectional model, and no family of other packages is one here; export none")
    origin = _origin(source)
    family, model = choose(config.model, model_type, origin.get("model_type", ""))
    with new_folder(target) as temporary:
        run = checkpoints.load_run(source, step)
        parameters = checkpoints.named_leaves(nnx.state(run.model, nnx.Param))
        if config.model.tie_embeddings and not model.tie_embeddings:
            parameters["head.kernel"] = parameters["embed.embedding"].T
        places = table(family.rules_of(model), zoo_config.pattern(model), parameters)
        write_shards(temporary, places.shapes, _tensors(places, parameters), DTYPES[DTYPE_NAMES[dtype]], shard_bytes)
        fields = _fields(family, model, config, source, run.tokenizer, dtype)
        files.write(temporary / "config.json", json.dumps(fields, indent=2) + "\n")
        tokenizer.write(source, config, temporary)
        files.write(temporary / "README.md", card.text(source, run, family, dtype, origin))
        names = sorted(path.name for path in temporary.iterdir())
    return Exported(target, family.name, run.step, len(places.shapes), names)


def choose(model: ModelConfig, asked: str, origin: str) -> tuple[Family, ModelConfig]:
    """The family that an export is of, and the model as its config says it: with all numbers, and with a head of its
    own where no family ties it.

    Raises:
      UsageError: none can say all that the model is; what the nearest cannot.
    """
    if asked and asked not in families.FAMILIES:
        raise UsageError(f"--format: got {asked!r}, expected one of {', '.join(families.exported())}")
    model = _in_sections(model)
    layers = set(zoo_config.pattern(model)) - {zoo_config.MLP_LAYER}
    fitting = [name for name in families.exported() if layers <= set(families.FAMILIES[name].mixers)]
    names = [asked] if asked else sorted(fitting, key=lambda name: name != origin)
    found: dict[str, list[str]] = {}
    untied = [dataclasses.replace(model, tie_embeddings=False)] if model.tie_embeddings else []
    for one in [model, *untied]:
        for name in names:
            family = families.FAMILIES[name]
            missing = unsaid(family, one)
            if not missing:
                return family, to_model(family, to_fields(family, one))[0]
            found.setdefault(name, missing)
    if not found:
        raise UsageError(f"no format of {', '.join(families.exported())} has the mixers of this run, {model.mixer}")
    nearest = min(found, key=lambda name: (set(families.FAMILIES[name].mixers) != layers, len(found[name])))
    raise UsageError(f"{nearest}, the nearest format, cannot say what this model is: {'; '.join(found[nearest])}")


def _in_sections(model: ModelConfig) -> ModelConfig:
    """The same model, where all layers of a family are alike with their settings in the family's section, which is what
    a format reads, and not in the pattern: gla@expand_k=1,attention is gla,attention."""
    places = zoo_config.places(model)
    alike = {}
    for family in {place.family for place in places} - {zoo_config.MLP_LAYER}:
        first, *others = [place.settings for place in places if place.family == family]
        if all(settings == first for settings in others):
            alike[family] = first
    mixer = ",".join(place.family if place.family in alike else place.name for place in places)
    return dataclasses.replace(model, mixer=mixer, **alike)


def _tensors(places: Table, parameters: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for entry in places.entries:
        ours = (parameters[name] if entry.unit is None else parameters[name][entry.unit] for name in entry.ours)
        yield from zip(entry.theirs, entry.transform.write(*map(np.asarray, ours)), strict=True)


def _fields(
    family: Family, model: ModelConfig, config: Any, workdir: pathlib.Path, of_run: Any, dtype: str
) -> dict[str, Any]:
    """config.json: what the model is, and of an imported one what its own said of other things."""
    separator = of_run.separator_id
    before = {
        "bos_token_id": separator,
        "eos_token_id": separator,
        "max_position_embeddings": config.train.context_length,
    }
    with contextlib.suppress(OSError, ValueError):
        theirs = files.read_json(workdir / ORIGIN / "config.json", MAX_JSON)
        if isinstance(theirs, dict) and theirs.get("model_type") == family.name:
            carried = (HARMLESS | set(family.harmless)) - {"auto_map"}  # which names code to run
            before |= {name: value for name, value in theirs.items() if name in carried and _plain(name, value)}
    said = {"architectures": [family.architecture], "model_type": family.name, "torch_dtype": dtype, "dtype": dtype}
    of_model = to_fields(family, model)
    kept = {name for name in family.fixed if name in before}  # what an import said counts, where nothing hangs on it
    return before | {name: value for name, value in of_model.items() if name not in kept} | said


def _plain(name: str, value: Any) -> bool:
    """Numbers and words, or a list of them; an id is a whole number."""
    parts = value if isinstance(value, list) else [value]
    if name.endswith("_token_id"):
        return value is None or all(type(part) is int for part in parts)
    return all(
        part is None or isinstance(part, int | str) or (isinstance(part, float) and math.isfinite(part))
        for part in parts
    )


def _origin(workdir: pathlib.Path) -> dict[str, Any]:
    """What origin.json says.

    Raises:
      UsageError: a link in the workdir's folder of origins, which would publish what it names.
    """
    path = folder = workdir / ORIGIN
    try:
        for path in (folder, *(sorted(folder.iterdir()) if folder.is_dir() else ())):
            files.inside(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be handed on ({error.strerror or error})") from error
    try:
        found = files.read_json(workdir / ORIGIN / "origin.json", MAX_JSON)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
