"""A context as a file: tokens, logits and state as safetensors, with what they belong to.

A recurrent model's whole past is a few kilobytes, whatever its length; a cache has as many slots as tokens were read.
Nothing is opened that is not of the same model, parameters and tokenizer, and nothing that is damaged.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from zoo import files, memory
from zoo.checkpoints import Run, named_leaves
from zoo.checkpoints.leaves import with_leaves
from zoo.config import HOW, leaves
from zoo.errors import UsageError
from zoo.generate import reading
from zoo.generate.reading import Context
from zoo.mixers import MIXERS
from zoo.settings import shown

_FORMAT = "sequence-zoo state 1"
_IRRELEVANT = {*HOW, "dropout"}  # of the model's settings: a state is the same with others
_MOST_SHOWN = 6


def save(path: str, context: Context, run: Run) -> None:
    """Write `context`, whole or not at all.

    Raises:
      UsageError: nothing was read yet.
      WriteError: it cannot be written; what stood there stands.
    """
    if not context.tokens:
        raise UsageError(f"{path}: nothing was read yet, and there is no state to keep; write something first")
    context = reading.resized(run.model, context, len(context.tokens))
    arrays = {name: _storable(leaf) for name, leaf in _arrays(context).items()}
    belongs = json.dumps(_belongs_to(run))
    metadata = {"format": _FORMAT, "belongs_to": belongs, "sha256": _digest(arrays, belongs)}
    try:
        with files.replacing(path) as temporary:
            safetensors.numpy.save_file(arrays, temporary, metadata)
    except OSError as error:
        raise files.WriteError(path, error) from error
    except safetensors.SafetensorError as error:  # of a full disk too
        raise files.WriteError(path, OSError(str(error))) from error


def load(path: str, run: Run) -> Context:
    """The context that `save` wrote.

    Raises:
      UsageError: no such file, none of `save`, a damaged one, or one of another model, parameters or tokenizer.
    """
    try:
        files.check_regular(os.stat(path))
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UsageError(f"{path}: no state of zoo.generate; expected a file of --save_state")
            _check_belongs(path, metadata["belongs_to"], run)
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            length = slices["tokens"].get_shape()[0]
            if length < 1:
                raise ValueError("no tokens")
            memory.check_state(run.model, 1, length)
            wanted = _arrays(_shapes(run, length))
            _check_shapes({name: part.get_shape() for name, part in slices.items()}, wanted)
            arrays = {name: opened.get_tensor(name) for name in wanted}
        if _digest(arrays, metadata["belongs_to"]) != metadata["sha256"]:
            raise ValueError("its content differs from its digest")
        arrays = {name: _restored(arrays[name], like) for name, like in wanted.items()}
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (safetensors.SafetensorError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        what = shown(str(error), 200)
        raise UsageError(f"{path}: no state, or a damaged one ({what}); save it anew") from error
    tokens, logits = arrays.pop("tokens"), arrays.pop("logits")
    template = _shapes(run, length).state
    state = with_leaves(template, {name.removeprefix("state."): jnp.asarray(array) for name, array in arrays.items()})
    return Context(tuple(tokens.tolist()), state, jnp.asarray(logits), length)


def _shapes(run: Run, length: int) -> Context:
    """Of a context of so many tokens."""
    state = jax.eval_shape(lambda: run.model.init_state(1, length))
    logits = jax.ShapeDtypeStruct((1, run.model.vocab_size), jnp.float32)
    return Context(jax.ShapeDtypeStruct((length,), jnp.int32), state, logits, length)


def _arrays(context: Context) -> dict[str, Any]:
    found = {f"state.{name}": leaf for name, leaf in named_leaves(context.state).items()}
    tokens = context.tokens if hasattr(context.tokens, "dtype") else np.asarray(context.tokens, np.int32)
    return found | {"tokens": tokens, "logits": context.logits}


def _storable(leaf: Any) -> np.ndarray:
    """bfloat16 as its bits, since safetensors reads none of it into numpy."""
    array = np.ascontiguousarray(leaf)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _restored(array: np.ndarray, like: Any) -> np.ndarray:
    array = array.view(jnp.bfloat16) if like.dtype == jnp.bfloat16 else array
    if array.dtype != like.dtype:
        raise ValueError(f"{array.dtype} instead of {like.dtype}")
    return array


def _check_shapes(found: Mapping[str, list[int]], wanted: Mapping[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        there = found.get(name)
        if name not in wanted or there is None or tuple(there) != wanted[name].shape:
            expected = list(wanted[name].shape) if name in wanted else "none"
            raise ValueError(f"{name}: {'missing' if there is None else there} instead of {expected}")


def _digest(arrays: Mapping[str, np.ndarray], belongs: str) -> str:
    found = hashlib.sha256(belongs.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"")
    return found.hexdigest()


def _belongs_to(run: Run) -> dict[str, Any]:
    """What a state of the run depends on."""
    families = set(run.model.pattern)
    settings = {
        f"model.{name}": value
        for name, value in leaves(run.config.model).items()
        if name not in _IRRELEVANT and (name.split(".")[0] not in MIXERS or name.split(".")[0] in families)
    }
    return {
        "model": settings, "step": run.step, "parameters": run.fingerprint, "tokenizer": run.tokenizer.fingerprint
    }  # fmt: skip


def _check_belongs(path: str, text: str, run: Run) -> None:
    """UsageError that names what differs."""
    there, here = json.loads(text), json.loads(json.dumps(_belongs_to(run)))
    differ = [
        f"{name}: {shown(there['model'][name])} there, {shown(value)} here"
        for name, value in here["model"].items()
        if there["model"].get(name, value) != value  # what one of them lacks follows from the mixers, or is newer
    ]
    more = len(differ) - _MOST_SHOWN
    differ = differ[:_MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    if there["tokenizer"] != here["tokenizer"]:
        differ.append("another tokenizer")
    if there["parameters"] != here["parameters"] and not differ:
        steps = f"of step {shown(there['step'])}, and these are of step {here['step']}"
        differ.append(f"its parameters are {steps}" if there["step"] != here["step"] else "other parameters")
    if differ:
        raise UsageError(
            f"{path}: a state of another model ({'; '.join(differ)}); use the run and step it was saved by"
        )
