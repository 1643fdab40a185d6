"""Starting several processes as one run, and ending them as one: `joined`.

Where the coordinator is, how many processes there are and which one this is, is told by arguments (the command's
flags), else by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else by what jax knows of the cluster: of
Slurm, Open MPI, Kubernetes and Cloud TPU. Told nothing, a process is alone, and nothing here costs it anything.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import jax
from jax._src import xla_bridge
from jax._src.clusters import ClusterEnv, K8sCluster

from zoo.errors import RunError, UsageError, warn
from zoo.processes import coordinator, world
from zoo.processes.watch import Watch

_KNOWN = "Slurm, Open MPI, Kubernetes and Cloud TPU tell it by themselves"
_watch: Watch | None = None


def require_joined() -> None:
    """UsageError where processes are several by other means than `joined`, and nothing would end them together."""
    if _watch is None and world.count() > 1:
        raise UsageError("several processes train in `with zoo.processes.joined():`, not by jax.distributed.initialize")


def done() -> None:
    """Something is finished, a step, a batch of an evaluation or a save: this process is not stuck."""
    if _watch:
        _watch.done()


def ask_to_stop(signal: str) -> None:
    """All processes are to stop after the same step."""
    if _watch:
        _watch.ask_to_stop(signal)


def stops_before(step: int) -> str | None:
    """What for all of several processes stop before `step`, once one was asked to; None: they begin it."""
    return _watch.stops_before(step) if _watch else None


@contextlib.contextmanager
def joined(
    address: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 60,
    step_timeout: int = 1800,
) -> Iterator[None]:
    """A context in which this process is one of several, where it is told of them; jax's devices are those of all.

    What one raises inside ends all processes, with its message and exit code. So does one that is gone.

    Args:
      address: HOST:PORT of the coordinator, on process 0's machine.
      initialization_timeout: seconds within which all processes have to come.
      heartbeat_timeout: seconds after which a process that gives no sign is gone.
      step_timeout: seconds without a finished step, batch of an evaluation or save, after which the run is stuck;
        from the first of these on: tokenizing, restoring and compiling take as long as they take.

    Raises:
      UsageError: what is told is wrong, or not all of it.
      RunError: the coordinator does not answer, or not all processes came.
    """
    global _watch
    place = _place(address, num_processes, process_id, initialization_timeout)
    if place is None:
        yield
        return
    address, num_processes, process_id = place
    _check_jax()
    service = None
    if process_id == 0:
        service = _Coordinator(address, num_processes, initialization_timeout, heartbeat_timeout)
    try:
        _meet(address, num_processes, process_id, initialization_timeout)
    except BaseException:
        if service:
            service.end(wait=True)
        raise
    # jax would hear SIGTERM itself, and not end at it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address, num_processes, process_id,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=coordinator.of_jax(heartbeat_timeout),
            coordinator_bind_address="localhost:0",  # the one that jax insists on, which nobody uses
        )  # fmt: skip
    except Exception as error:
        if service:
            service.end()
        raise RunError(f"--coordinator={address}: jax could not make the processes one ({error})") from error
    _watch = Watch(heartbeat_timeout, step_timeout)
    try:
        yield
        world.barrier()
    except BaseException as error:
        _watch.fail(error)
    _watch.end()
    _watch = None
    jax.distributed.shutdown()
    if service:
        service.end()


def _check_jax() -> None:
    """What jax would refuse once all processes are there, when its refusal aborts the others."""
    devices = os.environ.get("JAX_LOCAL_DEVICE_IDS", "")
    if devices and not re.fullmatch("[0-9]+(,[0-9]+)*", devices.replace(" ", "")):
        raise UsageError(f"JAX_LOCAL_DEVICE_IDS={devices}: expected numbers of devices, as 0,1")
    if world.client() is not None or xla_bridge.backends_are_initialized():
        raise UsageError("zoo.processes.joined() comes once, before jax is asked for a device or computes anything")


def _place(address: str, count: int | None, index: int | None, timeout: int) -> tuple[str, int, int] | None:
    """Where this process stands; None: alone."""
    if count == 1 and index is None:  # whatever the environment says
        return None
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    index = _number("JAX_PROCESS_ID") if index is None else index
    if count == 1 and not index:
        return None
    if not address or count is None or index is None:
        try:
            if (cluster := _cluster()) is not None:
                address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                    address or None, count, index, None, cluster.name or None, timeout
                )
        except Exception as error:  # of many kinds: what a variable holds, or a server of metadata answers
            raise UsageError(
                f"what this cluster says of its processes cannot be read ({error}); give --coordinator=HOST:PORT, "
                "--num_processes and --process_id, or --num_processes=1, if it is alone"
            ) from error
    if (count == 1 and not index) or (not address and count is None and index is None):
        return None
    if count is not None and count < 1:
        raise UsageError(f"--num_processes={count}: expected at least 1")
    if count is not None and index is not None and not 0 <= index < count:
        expected = f"0 to {count - 1}" if count > 1 else "0"
        raise UsageError(f"--process_id={index}: of {count} processes, expected {expected}")
    flags = {"--coordinator=HOST:PORT": address, "--num_processes": count, "--process_id": index}
    if missing := [name for name, value in flags.items() if value in (None, "")]:
        raise UsageError(f"of several processes: {' and '.join(missing)} missing; {_KNOWN}, else all three are needed")
    if not _is_address(address):
        raise UsageError(f"--coordinator={address}: expected HOST:PORT, as node1:1234, with a port from 1 to 65535")
    return address, count, index


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    try:
        host.encode("idna")  # as every look-up of it begins
    except UnicodeError:
        return False
    return bool(host) and re.fullmatch("[0-9]{1,5}", port) is not None and 0 < int(port) < 65536


def _cluster() -> type[ClusterEnv] | None:
    """Whose processes are told apart by it. A pod of Kubernetes is alone, unless it is one of an indexed Job."""
    with warnings.catch_warnings(action="ignore"):  # in each pod without jax[k8s]
        for cluster in ClusterEnv._cluster_types:
            alone = cluster is K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ
            if not cluster.opt_in_only_method and not alone and cluster.is_env_present():
                return cluster
    return None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    if text and not (text.isascii() and text.isdigit()):
        raise UsageError(f"{variable}={text}: expected a number")
    return int(text) if text else None


def _meet(address: str, count: int, index: int, timeout: int) -> None:
    """Wait until all processes are there. Who answers something else, as the service of the run before, ends soon."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), max(1.0, deadline - time.monotonic()))
            wrong = _introduce(connection, count, index, max(1.0, deadline - time.monotonic()) + 10)
            break
        except _NotAll as error:
            raise RunError(f"--coordinator={address}: not all processes came within {timeout} s") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                reason = (error.strerror or error) if isinstance(error, OSError) else "another program does"
                raise RunError(
                    f"--coordinator={address}: nobody answers there within {timeout} s ({reason}); "
                    "start process 0, on that machine (--initialization_timeout is the time to wait)"
                ) from error
            time.sleep(0.2)
    if wrong:
        raise RunError(f"--coordinator={address}: {wrong}")


class _NotAll(Exception):
    """The coordinator is there, and has no answer yet."""


def _introduce(connection: socket.socket, count: int, index: int, timeout: float) -> str:
    """What the coordinator answers when all are there, or what is wrong. OSError, ValueError, ...: it is none."""
    with connection:
        connection.settimeout(timeout)
        connection.sendall(json.dumps({"process": index, "of": count}).encode())
        try:
            answer = connection.recv(coordinator.LONGEST)
        except TimeoutError as error:
            raise _NotAll from error
    return json.loads(answer)["error"]


class _Coordinator:
    """The process of coordinator.py, beside process 0."""

    def __init__(self, address: str, count: int, initialization_timeout: int, heartbeat_timeout: int):
        port = address.rpartition(":")[2]
        self._process = subprocess.Popen(
            [sys.executable, coordinator.__file__, port, *map(str, (count, initialization_timeout, heartbeat_timeout))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )  # fmt: skip
        with self._process.stdout as said:
            wrong = said.readline().decode().strip()
            if wrong == coordinator.IN_USE:
                warn(f"--coordinator={address}: port {port} is in use, perhaps still by the run before; waiting")
                wrong = said.readline().decode().strip()
        if wrong:
            self.end(wait=True)
            raise RunError(f"--coordinator={address}: port {port} cannot be opened ({wrong}); choose another")

    def end(self, wait: bool = False) -> None:
        """In order. It goes on for seconds, for the last of the others; `wait`: it has served nobody yet."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(b".")
            self._process.stdin.close()
        if wait:
            self._process.wait()
