"""How several processes start, and how each watches the others: their parts, in one process."""

import json
import re
import socket
import threading
import time

import jax
import pytest

from zoo import processes
from zoo.errors import RunError, UsageError
from zoo.processes import coordinator, watch, world
from zoo.processes import start as starting


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


# --- Starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "environment", "said"),
    [
        (("", 2, 0), {}, "--coordinator=HOST:PORT missing"),
        (("node1:1", None, None), {}, "--num_processes and --process_id missing"),
        (("node1", 2, 0), {}, "--coordinator=node1: expected HOST:PORT"),
        (("node1:99999", 2, 0), {}, "a port from 1 to 65535"),
        (("a..b:1", 2, 0), {}, "--coordinator=a..b:1: expected HOST:PORT"),
        (("", 1, 5), {}, "--process_id=5: of 1 processes, expected 0"),
        (("node1:1", 2, 0), {"JAX_LOCAL_DEVICE_IDS": "x"}, "JAX_LOCAL_DEVICE_IDS=x: expected numbers"),
        (("node1:1", 2, 2), {}, "--process_id=2: of 2 processes, expected 0 to 1"),
        (("", None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: expected a number"),
        (("", None, None), {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, "--coordinator=HOST:PORT missing"),
    ],
)
def test_a_place_that_is_wrong_or_not_told_is_refused(place, environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(said)), processes.joined(*place):
        pass


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "environment", "expected"),
    [
        (("", None, None), {}, None),
        (("", 1, None), SLURM, None),
        (("", 1, None), {"JAX_PROCESS_ID": "1"}, None),
        (("a:1", 1, 0), {}, None),
        (("", None, None), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (("", None, None), SLURM, ("node3:61441", 2, 1)),
        (("", None, None), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (("", None, None), SLURM | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("node3:61441", 2, 1)),
        (("here:5", None, None), SLURM, ("here:5", 2, 1)),
        (("", None, 3), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}, ("a:1", 4, 3)),
        (("b:2", 5, 0), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}, ("b:2", 5, 0)),
    ],
)
def test_flags_come_before_the_environment_and_that_before_the_cluster(place, environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert starting._place(*place, 1) == expected


def test_jax_that_has_its_devices_already_is_refused():
    jax.devices()
    with pytest.raises(UsageError, match="before jax is asked for a device"):
        with processes.joined("localhost:1", 2, 1):
            pass


def test_who_does_not_answer_in_time_is_told(monkeypatch):
    monkeypatch.setattr(starting, "_check_jax", lambda: None)  # the tests before may have computed
    with pytest.raises(RunError, match="nobody answers there within 1 s .*; start process 0"):
        with processes.joined(f"localhost:{free_port()}", 2, 1, initialization_timeout=1):
            pass
    with pytest.raises(RunError, match="1 of 2 processes came within 5 s; missing: process 1"):
        with processes.joined(f"localhost:{free_port()}", 2, 0, initialization_timeout=5):
            pass
    with socket.create_server(("", 0)) as server:
        with pytest.raises(RunError, match="port .* cannot be opened"):
            with processes.joined(f"localhost:{server.getsockname()[1]}", 2, 0, initialization_timeout=1):
                pass


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ([(0, 2), (1, 2)], ""),
        ([(0, 2), (1, 3)], "process 1 was told of 3 processes, process 0 of 2"),
        ([(0, 2), (0, 2)], "there are two processes 0"),
    ],
)
def test_processes_meet_or_hear_why_not(says, told):
    parent, end = socket.socketpair()
    with socket.create_server(("localhost", 0)) as listener, parent, end:
        found = []
        rest = (2, 10, time.monotonic() + 10, parent.fileno())
        thread = threading.Thread(target=lambda: found.extend(coordinator.meet(listener, *rest)))
        thread.start()
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(b"GET / HTTP/1.1")
        with socket.create_connection(listener.getsockname()) as gone:
            gone.sendall(json.dumps({"process": 0, "of": 2}).encode())
        time.sleep(0.1)
        connections = []
        for process, of in says:
            connections.append(socket.create_connection(listener.getsockname()))
            connections[-1].sendall(json.dumps({"process": process, "of": of}).encode())
            time.sleep(0.1)
        thread.join()
        for connection in [*connections, *found[0]]:
            connection.close()
    assert len(found[0]) == 2 and told in found[1] and bool(told) == bool(found[1])


def test_the_port_of_the_run_before_is_waited_for(monkeypatch, capfd):
    """Its service answers nothing that a process understands, and lets go of the port after a while."""
    monkeypatch.setattr(coordinator, "PATIENCE", 0)
    before = coordinator.listen(0)
    port = before.getsockname()[1]
    parent, end = socket.socketpair()
    found, heard = [], []

    def coordinate():
        until = time.monotonic() + 20
        with coordinator.listen_when_free(port, until, parent.fileno()) as listener:
            there, wrong = coordinator.meet(listener, 1, 20, until, parent.fileno())
        for connection in there:
            connection.sendall(json.dumps({"error": wrong}).encode())
            connection.close()
        found.append((len(there), wrong))

    def meet():
        starting._meet(f"localhost:{port}", 1, 0, 20)
        heard.append("all are there")

    threads = [threading.Thread(target=f) for f in (coordinate, meet)]
    with parent, end:
        for thread in threads:
            thread.start()
        with before:
            for answer in (b"\x00\x00\x12\x04", b""):  # of gRPC, and of one that ends
                connection, _ = before.accept()
                with connection:
                    connection.sendall(answer)
            time.sleep(0.5)
        for thread in threads:
            thread.join()
    assert found == [(1, "")] and heard and capfd.readouterr().out == f"{coordinator.IN_USE}\n"


# --- Watching ---------------------------------------------------------------------------------------------------------


class Store(dict):
    """The coordination service's, of processes that are objects of this one."""

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self and not allow_overwrite:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in list(self.items()) if key.startswith(folder)]


@pytest.fixture
def watches(monkeypatch):
    """watches(count, step_timeout): of so many processes, that beat every 10 ms; one that ends raises in its thread."""
    made, store = [], Store()
    monkeypatch.setattr(watch, "POLL", 0.01)

    def make(count, step_timeout=60.0, heartbeat_timeout=60.0):
        for i in range(count):
            monkeypatch.setattr(world, "client", lambda: store)
            monkeypatch.setattr(world, "index", lambda i=i: i)
            monkeypatch.setattr(world, "count", lambda: count)
            made.append(watch.Watch(heartbeat_timeout, step_timeout))
        return made

    yield make
    for one in made:
        one.end()


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_stop_after_the_furthest_step_that_one_has_begun(watches):
    first, second, third = watches(3)
    for one, begun in ((first, 4), (second, 9), (third, 7)):
        assert all(one.stops_before(step) is None for step in range(begun + 1))
    third.ask_to_stop("SIGTERM")
    wait_until(lambda: all(one._stop for one in (first, second, third)))
    for one in (second, third, first):  # none waits for what another has still to begin
        stopped = next(step for step in range(one._begun + 1, 20) if one.stops_before(step))
        assert stopped == 10 and one.stops_before(10) == "SIGTERM of process 2"


def test_who_is_behind_when_nothing_is_done_is_told_to_all(watches, monkeypatch):
    told = []
    monkeypatch.setattr(watch, "_leave", lambda code, message: told.append((code, message)))
    for one, begun in zip(watches(3, step_timeout=3.0), (8, 7, 8), strict=True):
        one.stops_before(begun)
        one.done()
    wait_until(lambda: len(told) >= 3)
    code, message = told[0]
    assert set(told) == {(code, message)} and code == 1
    assert message.startswith("nothing was finished for 3 s: process 1 did not begin step 8, which the")


@pytest.mark.parametrize("gone", [0, 1])
def test_who_is_gone_is_told(watches, monkeypatch, gone):
    told = []
    monkeypatch.setattr(watch, "_leave", lambda code, message: told.append((code, message)))
    watches(2, heartbeat_timeout=3.0)[gone].end()
    wait_until(lambda: told)
    assert told[0][0] == 1 and told[0][1].startswith(f"process {gone} is gone, no sign of it for 3 s; repeat the")
