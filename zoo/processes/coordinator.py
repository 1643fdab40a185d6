"""The coordinator: a process beside process 0 that holds jax's coordination service, and outlives process 0.

    coordinator.py PORT PROCESSES INITIALIZATION_TIMEOUT HEARTBEAT_TIMEOUT      of `zoo.processes.joined`

jax would hold the service in process 0. When that dies, the connections of the others break, and each ends in C++, with
a stack trace, before Python can say what happened; so does a process that waits for others in vain. Here they first
meet in plain text on the service's port, where it can be said who is missing; the service begins when all are there. It
takes its tasks for recoverable, that is, leaves to `zoo.processes.watch` what a death means.

The coordinator of a run that has just ended has the port for a while yet; it is waited for. The parent hears a line,
what went wrong or nothing, when the port is open, and `IN_USE` before it, if that takes long. Its end is that of our
stdin.
"""

import errno
import json
import os
import select
import selectors
import socket
import sys
import time

LINGER = 5  # seconds that the service outlives an orderly end: clients are still letting go of it
LONGEST = 4096  # bytes of a message
IN_USE = "in use"
PATIENCE = 3  # seconds after which it is said that the port is in use


def of_jax(heartbeat_timeout: int) -> int:
    """jax too ends a process that hears nothing, unfriendlier than `zoo.processes.watch`, and so later."""
    return 2 * heartbeat_timeout + 60


def listen(port: int) -> socket.socket:
    """On all addresses of this machine. OSError if the port is taken."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def listen_when_free(port: int, deadline: float, parent: int) -> socket.socket:
    """`listen`, once whoever has the port lets go of it. OSError: not until `deadline`, or `parent` has ended."""
    patient = time.monotonic() + PATIENCE
    while True:
        try:
            return listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
            if select.select([parent], [], [], 0.2)[0]:
                raise
        if time.monotonic() > patient:
            print(IN_USE, flush=True)
            patient = deadline + PATIENCE


def meet(
    listener: socket.socket, count: int, timeout: float, deadline: float, parent: int
) -> tuple[dict[socket.socket, int], str]:
    """Wait for `count` processes; each says {"process": its id, "of": how many it was told of}.

    Args:
      timeout: seconds that they were given, until `deadline`.
      parent: a file whose end ends the wait.

    Returns:
      The id of each that came, and what is wrong, if anything.
    """
    there: dict[socket.socket, int] = {}
    with selectors.DefaultSelector() as selector:
        for file in (listener, parent):
            selector.register(file, selectors.EVENT_READ)
        while len(there) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                missing = sorted(set(range(count)) - set(there.values()))
                named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                return there, f"{len(there)} of {count} processes came within {timeout:g} s; missing: process {named}"
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj == parent:  # its end, or an order to end
                    return there, "process 0 ended while the others came"
                else:
                    said = _said(key.fileobj)
                    if said is None:  # it ended, or it is none of ours
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                        there.pop(key.fileobj, None)
                        continue
                    process, of = said
                    known, there[key.fileobj] = process in there.values(), process
                    if of != count:
                        return there, f"process {process} was told of {of} processes, process 0 of {count}"
                    if known:
                        return there, f"there are two processes {process}; each needs a --process_id of its own"
    return there, ""


def _said(connection: socket.socket) -> tuple[int, int] | None:
    try:
        said = json.loads(connection.recv(LONGEST))
        return int(said["process"]), int(said["of"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main() -> None:
    port, count, timeout, heartbeat = map(int, sys.argv[1:])
    parent, deadline = sys.stdin.fileno(), time.monotonic() + timeout
    try:
        listener = listen_when_free(port, deadline, parent)
    except OSError as error:
        print(error.strerror or error, flush=True)
        return
    print(flush=True)
    there, wrong = meet(listener, count, timeout, deadline, parent)
    listener.close()
    if not wrong:
        from jaxlib import _jax

        options = {"heartbeat_timeout": of_jax(heartbeat), "cluster_register_timeout": timeout, "recoverable": True}
        _service = _jax.get_distributed_runtime_service(f"[::]:{port}", count, **options)
    for connection in there:
        try:
            connection.sendall(json.dumps({"error": wrong}).encode())
        except OSError:
            pass
        connection.close()
    if not wrong:
        in_order = bool(os.read(parent, 1))
        time.sleep(LINGER if in_order else heartbeat + LINGER)  # the others find out that process 0 is gone
    os._exit(0)


if __name__ == "__main__":
    main()
