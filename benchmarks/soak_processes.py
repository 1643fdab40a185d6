"""`python -m benchmarks.soak --processes=N`: kill one of several processes of a run, and see what the others do.

A signal at a random moment to a random process, or to all. After SIGTERM and SIGHUP all have to end in order, at the
same step. After SIGKILL, and after SIGSTOP, which is how a machine that is gone looks, the others have to end with exit
code 1 and no traceback, within `HEARTBEAT` and `GRACE` seconds. The rows of what comes of it have to be those of
processes that nobody disturbed, to the last bit.
"""

import os
import pathlib
import signal
import socket
import time

from benchmarks.soak import FORKS, PROCESS_SECONDS, STEPS, Case, Soak, _command, _last_step, differences, rows

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGHUP)
HEARTBEAT = 8
GRACE = 12
COMING = 30  # seconds that processes wait for one that was killed before it came


class Processes(Soak):
    """The runs of one mixer on `count` processes of one device each."""

    def __init__(self, folder: pathlib.Path, mixer: str, seed: int, count: int):
        super().__init__(folder, mixer, seed)
        self.count = count
        self.flags += [f"--config.train.batch_size={2 * count}", f"--heartbeat_timeout={HEARTBEAT}"]
        self.flags += [f"--initialization_timeout={COMING}"]

    def start_all(self, workdir: pathlib.Path) -> list:
        with socket.create_server(("", 0)) as server:
            place = [f"--coordinator=localhost:{server.getsockname()[1]}", f"--num_processes={self.count}"]
        started = []
        for i in range(self.count):
            pathlib.Path(f"{workdir}.{i}.log").unlink(missing_ok=True)
            argv = [*self.flags, f"--workdir={workdir}", *place, f"--process_id={i}"]
            started.append(FORKS.Process(target=_command, args=(argv, f"{workdir}.{i}.log")))
            started[-1].start()
        return started

    def errors(self, workdir: pathlib.Path) -> list[str]:
        """What each printed to stderr."""
        paths = [pathlib.Path(f"{workdir}.{i}.log.err") for i in range(self.count)]
        return [path.read_text(errors="replace") if path.exists() else "" for path in paths]

    def finish(self, workdir: pathlib.Path) -> tuple[int | None, str]:
        started = self.start_all(workdir)
        codes = _join(started, PROCESS_SECONDS)
        return (None if None in codes else max(codes, key=abs)), "".join(self.errors(workdir))

    def kill(self, kills: int, deadline: float) -> list[Case]:
        cases, life = [], 0
        while kills and time.monotonic() < deadline:
            life += 1
            workdir, told, violations = self.folder / f"life{life}", [], []
            while kills and time.monotonic() < deadline:
                started = self.start_all(workdir)
                started[0].join(self.random.uniform(0, 1.2 * self.seconds))
                if not started[0].is_alive():
                    _join(started, GRACE)
                    break
                number, everyone = self.random.choice(SIGNALS), self.random.random() < 0.2
                hit = range(self.count) if everyone else [self.random.randrange(self.count)]
                ready = self._trains(workdir)
                told.append(f"{number.name} to {'all' if everyone else f'process {hit[0]}'} at {_last_step(workdir)}")
                for i in hit:
                    os.kill(started[i].pid, number)
                kills -= 1
                found = self._aftermath(workdir, started, number, hit, ready)
                violations += [f"{what} after {told[-1]}" for what in found]
            code, error = self.finish(workdir)
            if code != 0 or error:
                violations.append(f"exit code {code} at the end: {error[-300:]}")
            violations += differences(rows(workdir), self.reference)
            told = told or ["no signal"]
            cases += [Case(one, violations if one == told[-1] else [], "finished") for one in told]
        return cases

    def _trains(self, workdir: pathlib.Path) -> bool:
        """Whether these processes, started last, do steps, and not the last one."""
        try:
            return "\nstep " in pathlib.Path(f"{workdir}.0.log").read_text() and _last_step(workdir) < STEPS - 2
        except OSError:
            return False

    def _aftermath(self, workdir: pathlib.Path, started: list, number: signal.Signals, hit, ready: bool) -> list[str]:
        """What is wrong with how they ended."""
        lost = number in (signal.SIGKILL, signal.SIGSTOP)
        others = [process for i, process in enumerate(started) if not lost or i not in hit]
        codes = _join(others, HEARTBEAT + GRACE + (0 if ready else COMING) if lost else PROCESS_SECONDS)
        for process in started:
            if process.is_alive():
                process.kill()
                process.join()
        # Before the first step and after the last a signal ends its process, and the others may have ended.
        allowed = ({1} if lost else {0}) | (set() if ready else {0, 1, -number})
        wrong = [f"exit code {code}" for code in codes if code not in allowed]
        return wrong + [f"traceback: {error[-300:]}" for error in self.errors(workdir) if "Traceback" in error]


def _join(started: list, seconds: float) -> list[int | None]:
    """Exit codes; None: still there after so many seconds."""
    deadline = time.monotonic() + seconds
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    return [None if process.is_alive() else process.exitcode for process in started]
