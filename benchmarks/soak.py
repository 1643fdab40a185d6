"""Kill runs and damage them: whatever happens, they go on bit by bit, or say what is wrong.

    python -m benchmarks.soak [--mixers=gla,mamba,gla+attention] [--kills=30] [--damages=30] [--seed=0] [--minutes=60]

For each mixer a tiny run is trained undisturbed: the reference, with its own tokenizer. Then

kills: runs of the same command get a signal (SIGKILL, SIGTERM, SIGHUP) at a random moment between the start of the
  process and its end, and are started again, until all signals are spent. Their rows must be the reference's, to the
  last bit, except for times and speeds.
damages: copies of a run stopped half-way, its tokenizer's original gone, lose or change one random file (a byte
  flipped, cut short, emptied, zeros, noise, deleted, a stray file or folder beside it), and the command is repeated. It
  must end with the reference's rows, less the damaged ones; or with one line that names what is damaged, the other
  files as they were. Only a tokenizer of which no good copy is left is reason to end.

--processes=2 has kills alone, of several processes that train one run: `benchmarks.soak_processes`.

No process may print a traceback. Processes are forked from one that has imported everything, and find their programs in
jax's compilation cache. Exit code 1 after any violation; what they were is printed.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from typing import NamedTuple

from benchmarks import record
from zoo import metrics

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
TIMES = ("seconds", "tokens_per_second", "mfu")
STEPS = 120
PROCESS_SECONDS = 300  # after which one counts as hung
FORKS = multiprocessing.get_context("forkserver")


class Case(NamedTuple):
    what: str  # the signals, or the damage
    violations: list[str]
    outcome: str


def _command(argv: list[str], output: str) -> None:
    """train.py, in a process of its own; both streams to `output` and `output`.err."""
    for number, path in ((1, output), (2, output + ".err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    from zoo import train

    train.run(["train.py", *argv])


class Soak:
    """The runs of one mixer, in a folder of its own."""

    def __init__(self, folder: pathlib.Path, mixer: str, seed: int):
        self.folder, self.mixer, self.random = folder, mixer, random.Random(f"{seed} {mixer}")
        self.tokenizer = folder / "original.json"
        self.flags = ["--config=configs/gla.py:tiny"] + [
            f"--config.{name}={value}"
            for name, value in {
                "model.mixer": mixer.replace("+", ","), "model.num_layers": 1 + mixer.count("+"), "model.d_model": 32,
                "model.dropout": 0.1, "train.batch_size": 2, "train.context_length": 32, "train.steps": STEPS,
                "train.log_every": 1, "optimizer.name": "adamw", "optimizer.warmup_steps": 5, "checkpoint.every": 7,
                "eval.every": 20, "eval.batches": 2, "data.source": folder / "text.txt",
                "data.cache_dir": folder / "cache", "data.tokenizer": self.tokenizer,
            }.items()
        ]  # fmt: skip

    def start(self, workdir: pathlib.Path) -> multiprocessing.Process:
        process = FORKS.Process(target=_command, args=([*self.flags, f"--workdir={workdir}"], str(workdir) + ".log"))
        process.start()
        return process

    def finish(self, workdir: pathlib.Path) -> tuple[int | None, str]:
        """Exit code (None: hung, and killed) and stderr of a process that nobody disturbs."""
        process = self.start(workdir)
        process.join(PROCESS_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return None, ""
        return process.exitcode, self.stderr(workdir)

    @staticmethod
    def stderr(workdir: pathlib.Path) -> str:
        path = pathlib.Path(str(workdir) + ".log.err")
        return path.read_text(errors="replace") if path.exists() else ""

    def make_reference(self) -> None:
        words = "state gate decay head key value query norm scan chunk".split()
        lines = (" ".join(self.random.choices(words, k=12)) for _ in range(3000))
        (self.folder / "text.txt").write_text("\n".join(lines))
        _train_tokenizer(self.folder / "text.txt", self.tokenizer)
        for name in ("warm", "reference"):  # the first one compiles
            begin = time.monotonic()
            code, error = self.finish(self.folder / name)
            if code != 0:
                raise SystemExit(f"{self.mixer}: the undisturbed run ended with {code}: {error}")
        self.seconds = time.monotonic() - begin
        self.reference = rows(self.folder / "reference")
        if differences(rows(self.folder / "warm"), self.reference):
            raise SystemExit(f"{self.mixer}: two undisturbed runs differ")

    def kill(self, kills: int, deadline: float) -> list[Case]:
        cases, life = [], 0
        while kills and time.monotonic() < deadline:
            life += 1
            workdir, told, violations = self.folder / f"life{life}", [], []
            while kills and time.monotonic() < deadline:
                process = self.start(workdir)
                process.join(self.random.uniform(0, 1.2 * self.seconds))
                if not process.is_alive():
                    break
                number = self.random.choice(SIGNALS)
                os.kill(process.pid, number)
                process.join(PROCESS_SECONDS)
                if process.is_alive():
                    violations.append(f"hung after {number.name}")
                    process.kill()
                    process.join()
                kills -= 1
                told.append(f"{number.name} at {_last_step(workdir)}")
                if "Traceback" in self.stderr(workdir):
                    violations.append(f"traceback after {told[-1]}: {self.stderr(workdir)[-300:]}")
                if process.exitcode not in (0, -number):
                    violations.append(f"exit code {process.exitcode} after {told[-1]}: {self.stderr(workdir)[-300:]}")
            code, error = self.finish(workdir)
            if code != 0 or error:
                violations.append(f"exit code {code} at the end: {error[-300:]}")
            violations += differences(rows(workdir), self.reference)
            if violations and not told:  # it was faster than every signal
                told = ["no signal"]
            cases += [Case(one, violations if one == told[-1] else [], "finished") for one in told]
        return cases

    def make_half(self) -> pathlib.Path:
        """A run at rest, stopped by SIGTERM half-way."""
        workdir = self.folder / "half"
        process = self.start(workdir)
        while _last_step(workdir) < STEPS // 2 and process.is_alive():
            time.sleep(0.01)
        process.terminate()
        process.join(PROCESS_SECONDS)
        self.tokenizer.unlink()
        return workdir

    def damage(self, damages: int, deadline: float) -> list[Case]:
        half, cases = self.make_half(), []
        for number in range(damages):
            if time.monotonic() > deadline:
                break
            workdir = shutil.copytree(half, self.folder / f"damaged{number}")
            # Of the checkpoints' many files no more than of the few others.
            paths = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
            groups = [
                [path for path in paths if "checkpoints" in path.parts],
                [p for p in paths if p.parent == workdir],
            ]
            file = self.random.choice(self.random.choice(groups))
            kind = self.random.choice(list(DAMAGES))
            name = str(file.relative_to(workdir))
            before = contents(workdir)
            DAMAGES[kind](file, self.random)
            now = contents(workdir)
            damaged = {n for n in before.keys() | now.keys() if before.get(n) != now.get(n)}
            whole, left = rows(half), rows(workdir)
            lost, changed = [row for row in whole if row not in left], [row for row in left if row not in whole]
            code, error = self.finish(workdir)
            violations = []
            if code is None or "Traceback" in error:
                violations.append(f"hung, or a traceback: {error[-300:]}")
            elif code == 0:
                found = [row for row in rows(workdir) if row not in changed]
                violations += differences(found, [row for row in self.reference if row not in lost])
            elif error.count("error:") != 1 or str(workdir) not in error or not name.startswith("tokenizer.json"):
                violations.append(f"exit code {code}: {error[-300:]}")
            else:
                after = contents(workdir)
                gone = [n for n in before if n not in damaged and n != ".lock" and after.get(n) != before[n]]
                violations += [f"lost though not damaged: {gone}"] if gone else []
            outcome = "continued" if code == 0 else "refused"
            cases.append(Case(f"{kind}: {name}", violations, outcome))
            if not violations:
                shutil.rmtree(workdir)
        return cases


def rows(workdir: pathlib.Path) -> list[dict]:
    """Of metrics.jsonl, without what depends on the clock."""
    with contextlib.redirect_stderr(io.StringIO()):  # warnings of lines that were damaged on purpose
        return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read(workdir)]


def differences(found: list[dict], expected: list[dict]) -> list[str]:
    """The first one, or nothing."""
    if found == expected:
        return []
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    return [
        f"{len(found)} rows, expected {len(expected)}; row {at}: {found[at : at + 1]}, expected {expected[at : at + 1]}"
    ]


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def _last_step(workdir: pathlib.Path) -> int:
    try:
        found = (workdir / "metrics.jsonl").read_bytes().splitlines()
        return json.loads(found[-1])["step"] if found else 0
    except (OSError, ValueError):
        return 0


def _flip(file: pathlib.Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def _stray(file: pathlib.Path, chance: random.Random) -> None:
    name = chance.choice(["foo", "007", "12.damaged", "30", "\u00b2", "x.json.tmp", "1e3"])
    stray = file.parents[0] / name
    if not stray.exists():
        stray.write_text("stray") if chance.random() < 0.5 else stray.mkdir()


DAMAGES = {
    "byte flipped": _flip,
    "cut short": lambda file, chance: os.truncate(file, chance.randrange(max(1, file.stat().st_size))),
    "emptied": lambda file, chance: os.truncate(file, 0),
    "zeros": lambda file, chance: file.write_bytes(bytes(file.stat().st_size)),
    "noise": lambda file, chance: file.write_bytes(chance.randbytes(file.stat().st_size)),
    "deleted": lambda file, chance: file.unlink(),
    "stray beside": _stray,
}


def _train_tokenizer(text: pathlib.Path, path: pathlib.Path) -> None:
    from zoo.data import corpora
    from zoo.data.tokenizer.__main__ import train

    path.write_text(train(corpora.find_all(str(text), "text"), 300).to_str())


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.soak", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--mixers", default="gla,mamba,gla+attention", help="comma-separated, with + inside a pattern")
    parser.add_argument("--kills", type=int, default=30, help="a mixer")
    parser.add_argument("--damages", type=int, default=30, help="a mixer")
    parser.add_argument("--processes", type=int, default=1, help="of a run; more than one: kills alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no new case begins")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="keep the results")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    root = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "programs"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    several = arguments.processes > 1
    if several:
        from benchmarks.soak_processes import Processes

        arguments.damages = 0
    FORKS.set_forkserver_preload(["zoo.train", "zoo.training.command_line", "zoo.training"])
    results = {}
    for mixer in arguments.mixers.split(","):
        begin = time.monotonic()
        (root / mixer).mkdir()
        soak = Soak(root / mixer, mixer, arguments.seed)
        if several:
            soak = Processes(root / mixer, mixer, arguments.seed, arguments.processes)
        soak.make_reference()
        kills = soak.kill(arguments.kills, deadline)
        damages = soak.damage(arguments.damages, deadline) if arguments.damages else []
        broken = [case for case in kills + damages if case.violations]
        results[mixer] = {
            "kills": len(kills),
            "damages": len(damages),
            "outcomes_of_damage": dict(Counter(case.outcome for case in damages)),
            "refused": [case.what for case in damages if case.outcome == "refused"],
            "violations": {case.what: case.violations for case in broken},
            "seconds": round(time.monotonic() - begin, 1),
        }
        outcomes = ", ".join(f"{count} {name}" for name, count in Counter(c.outcome for c in damages).items())
        print(
            f"{mixer:16} {len(kills):3} kills, {len(damages):3} damages ({outcomes}), {len(broken)} violations, "
            f"{results[mixer]['seconds']:.0f} s", flush=True,
        )  # fmt: skip
        for case in broken:
            print(f"    {case.what}: {'; '.join(case.violations)}", flush=True)
    if arguments.record:
        about = {"seed": arguments.seed, "steps": STEPS} | ({"processes": arguments.processes} if several else {})
        record.write("soak_processes" if several else "soak", about | {"mixers": results})
    if any((r["kills"], r["damages"]) != (arguments.kills, arguments.damages) for r in results.values()):
        print(f"stopped after {arguments.minutes:g} minutes (--minutes), before the end", file=sys.stderr)
    if any(result["violations"] for result in results.values()):
        print(f"the workdirs are kept in {root}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
