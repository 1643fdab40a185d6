"""What a run needs of memory, by formula, and what the machine has: refused with the numbers, before it is allocated.

    parameters, gradients    4 bytes a parameter each (float32)
    optimizer                AdamW 8 bytes a parameter; Muon 4, and 8 in embeddings, positions and the head; with
                             updates of low rank what its state takes
    activations, at least    the residual stream before each repeating unit, which the backward pass keeps whatever
                             model.remat says, and the batch itself

The last is a floor: what else is kept depends on the mixer, on model.remat and on the compiler.
"""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from zoo import heads, processes
from zoo.config import Config, ModelConfig, pattern, positions
from zoo.errors import UsageError
from zoo.flops import num_parameters, table_parameters
from zoo.model import LanguageModel

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Training(NamedTuple):
    """Bytes of one copy of the model, with the activations of a whole microbatch."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # at least

    def __str__(self) -> str:
        return ", ".join(f"{name} {amount(size)}" for name, size in self._asdict().items())


def training(config: Config, optimizer: int | None = None) -> Training:
    """Of `config`, with its vocabulary settled; `optimizer`: bytes of its state, where the formula is not of it."""
    model, train = config.model, config.train
    parameters = num_parameters(model)
    of_adam = table_parameters(model) if config.optimizer.name == "muon" else parameters
    tokens = train.batch_size * positions(model, train.context_length)
    units = model.num_layers // len(pattern(model))
    return Training(
        parameters=4 * parameters,
        gradients=4 * parameters,
        optimizer=4 * (parameters + of_adam) if optimizer is None else optimizer,
        activations=_batch_bytes(config, train.batch_size)
        + tokens // train.accumulate_steps * units * _residual_bytes(model),
    )


def _batch_bytes(config: Config, rows: int, length: int = 0) -> int:
    """Of a batch of so many rows; `length`: default, train.context_length. All arrays have entries of 4 bytes."""
    arrays = heads.of(config.model).arrays(config.model, rows, length or config.train.context_length)
    return sum(4 * math.prod(array.shape) for array in arrays.values())


def _residual_bytes(model: ModelConfig) -> int:
    """A token."""
    return model.d_model * (2 if model.dtype == "bfloat16" else 4)


def _forward_bytes(config: Config, rows: int, length: int) -> int:
    """Of rows of `length` tokens or steps, at least: the batch and the residual stream."""
    positioned = rows * positions(config.model, length)
    return _batch_bytes(config, rows, length) + positioned * _residual_bytes(config.model)


def floor(config: Config, mesh: Mesh, optimizer: int | None = None) -> int:
    """Bytes that training takes at least, of the mesh's devices together; `optimizer`: as in `training`."""
    needed = training(config, optimizer)
    return _copies(config, mesh) * (needed.parameters + needed.gradients + needed.optimizer) + needed.activations


def _copies(config: Config, mesh: Mesh) -> int:
    """Of the state. Overrides may spread parameters over any axis."""
    sizes = dict(mesh.shape)
    return 1 if config.mesh.overrides else mesh.size // (sizes["fsdp"] * sizes["tensor"])


def check_training(
    config: Config, mesh: Mesh, teacher: ModelConfig | None = None, optimizer: int | None = None
) -> None:
    """UsageError if the run cannot fit into the memory of the mesh's devices, all together.

    `teacher`: whose parameters lie there, too; `optimizer`: as in `training`.
    """
    needed, copies, least = training(config, optimizer), _copies(config, mesh), floor(config, mesh, optimizer)
    frozen = copies * 4 * num_parameters(teacher) if teacher else 0
    if needed.activations > least - needed.activations:
        advice = "lower train.batch_size or train.context_length, or raise train.accumulate_steps"
    else:
        advice = "lower model.d_model, model.num_layers or model.vocab_size"
    what = f"training {num_parameters(config.model):,} parameters ({needed}"
    what += f", teacher {amount(frozen)}" if teacher else ""
    what += f"; {copies} copies, which mesh.fsdp spreads instead)" if copies > 1 else ")"
    devices = list(mesh.devices.flat)
    check(what, least + frozen, devices, advice)
    resident = copies * (needed.parameters + needed.optimizer) + frozen
    rows = config.eval.batch_size or config.train.batch_size
    size = resident + _forward_bytes(config, rows, config.train.context_length)
    check(f"evaluating {rows} sequences at once", size, devices, "lower eval.batch_size")


def check_parameters(model: ModelConfig, where: str) -> None:
    """UsageError if the parameters alone do not fit into the memory of one device."""
    size = 4 * num_parameters(model)
    check(f"{where}: its {num_parameters(model):,} parameters", size, jax.local_devices()[:1], "use another machine")


def check_forward(config: Config, length: int) -> None:
    """UsageError if a batch of validation rows of `length` tokens does not fit; it has as many tokens as the run's."""
    rows = config.eval.batch_size or config.train.batch_size
    rows, length = max((1, length), (rows, config.train.context_length), key=math.prod)
    tokens = rows * length
    advice = "lower --context_length, or eval.batch_size in its config.json"
    check(f"evaluating {tokens} tokens at once", _forward_bytes(config, rows, length), jax.local_devices()[:1], advice)


def check_state(
    model: LanguageModel,
    rows: int,
    length: int,
    advice: str = "lower max_tokens, or give fewer or shorter prompts",
    beside: Any = None,
) -> None:
    """UsageError if the states of `rows` sequences of `length` tokens (caches grow with it) do not fit, with the arrays
    `beside` them."""
    arrays = jax.eval_shape(lambda: model.init_state(rows, length)), beside
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
    check(f"{rows} sequence(s) of {length} tokens", size, jax.local_devices()[:1], advice)


def check(what: str, needed: int, devices: Sequence[jax.Device], advice: str) -> None:
    """UsageError if `devices` have less than the `needed` bytes together, where that is known."""
    has = available(devices)
    if has is not None and needed > has:
        raise UsageError(f"{what}: at least {amount(needed)} of memory, and there are {amount(has)}; {advice}")


def available(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that the devices have together; None where that is not known. Devices of a CPU share the machine's.

    Of several processes, each knows its own devices alone, and takes the others' for alike.
    """
    if any(device.platform == "cpu" for device in devices):
        has = host_memory()
        return has and has * len({device.process_index for device in devices})
    own = [device for device in devices if device.process_index == processes.index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
    return None if None in limits else sum(limits) * len(devices) // len(own)


def host_memory() -> int | None:
    """Bytes that this process may have: the machine's, its container's or its own limit, whichever is least."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        pass
    for path in _CGROUPS:
        try:
            found.append(int(pathlib.Path(path).read_text()))
        except (OSError, ValueError):  # none, or "max"
            pass
    try:
        import resource

        found += [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    except (ImportError, OSError):
        pass
    return min((size for size in found if size > 0), default=None)


def amount(size: int) -> str:
    """ "1.3 GB"."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1000:.1f} kB"
