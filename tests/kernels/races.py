"""Pallas kernels in the interpreters that model a TPU's or a GPU's memories: races are errors, what was not written is
NaN. The GPU's knows a block of threads as one thread, and beside it the copies into shared memory; those out of it from
jax 0.12 on."""

import contextlib
import os
import threading
from unittest import mock

import jax
from jax._src.core import eval_jaxpr
from jax._src.pallas.mosaic.interpret import interpret_pallas_call, thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import tpu as pltpu

from kernels import mosaic_gpu
from kernels.mosaic_tpu import use_interpret

CORES = min(2, len(os.sched_getaffinity(0)))  # the threads of two cores wait for each other if one runs at a time
PARAMS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=CORES)
GPU_PARAMS = mosaic_gpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
_compiling, _programs = threading.Lock(), {}


@contextlib.contextmanager
def checked():
    """While tracing and running: kernels are interpreted on two cores, which share the grid's parallel axes.

    Raises:
      AssertionError: at the end, two accesses of a kernel without an order between them, or no kernel ran. Newer
        versions of jax raise an error of their own, where it happens.
    """
    one_program = mock.patch.object(thread_map, "_run_jaxpr", _run_jaxpr)
    with use_interpret(PARAMS), one_program, _states_checked(interpret_pallas_call, "RaceDetectionState"):
        yield


@contextlib.contextmanager
def checked_on_gpu():
    """`checked` for kernels of Hopper GPUs, block after block."""
    state = "GPURaceDetectionState" if hasattr(gpu_callbacks, "GPURaceDetectionState") else "RaceDetectionState"
    with mosaic_gpu.use_interpret(GPU_PARAMS), _states_checked(gpu_callbacks, state):
        yield


@contextlib.contextmanager
def _states_checked(module, name):
    kernels = []  # jax keeps the state of the last kernel only

    class State(getattr(module, name)):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            kernels.append(self)

    with mock.patch.object(module, name, State):
        yield
        jax.effects_barrier()
    assert kernels, "no kernel was interpreted"
    assert not any(state.races_found for state in kernels), "a race"


def _run_jaxpr(jaxpr, consts, *args):
    """What a core runs, compiled once: jax compiles it anew for each core and each run."""
    with _compiling:
        if jaxpr not in _programs:
            run = jax.jit(lambda consts, *args: eval_jaxpr(jaxpr, consts, *args))
            _programs[jaxpr] = run.lower(consts, *args).compile()
    _programs[jaxpr](consts, *args)
