"""Host memory of a process that holds a share of a run's state: while it is made, saved and restored.

    python -m benchmarks.host_memory [--processes=1,2,4] [--width=1024]

Each number of processes, one CPU device each, spreads parameters and AdamW's moments of a GLA model over mesh.fsdp. A
device of a CPU keeps its arrays in the host's memory, so that the state itself counts too. Columns are MB of a process,
the largest of all: its share of the state, and the peaks of its resident memory above what it had at first.
"""

import argparse
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile

from benchmarks import record

PHASES = ("made", "saved", "restored")


def _peak(reset: bool = False) -> float:
    """MB of resident memory at most since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) / 1000


def work(folder: str, width: int, restores: bool, place: list[str]) -> None:
    """One process: make a state and save it, or restore it; a line of JSON."""
    import jax

    from zoo import config as zoo_config
    from zoo import processes, sharding
    from zoo.checkpoints import Checkpointer
    from zoo.training.step import build

    config = zoo_config.preset("tiny")
    config.model.d_model, config.model.num_layers, config.model.vocab_size = width, 2, 256
    config.optimizer.name, config.mesh.data, config.mesh.fsdp = "adamw", 1, -1
    count = int(place[1]) if place else 1
    with processes.joined(place[0], count, int(place[2])) if place else processes.joined(num_processes=1):
        programs = build(config, sharding.make_mesh(config.mesh))
        jax.jit(lambda: 0)()
        checkpointer = Checkpointer(folder)
        _peak(reset=True)
        before, told = _peak(), {}
        if restores:
            state = checkpointer.restore(programs.abstract_state).state
            jax.block_until_ready(state)
            told["restored"] = _peak() - before
        else:
            state = jax.block_until_ready(programs.init())
            told["made"] = _peak(reset=True) - before
            checkpointer.save(1, state)
            checkpointer.wait()
            told["saved"] = _peak() - before
        leaves = jax.tree.leaves(state)
        told["state"] = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards) / 1e6
        processes.barrier()  # the first one digests longer
        checkpointer.close()
    print(json.dumps(told), flush=True)


def measure(count: int, width: int) -> dict[str, float]:
    """Of the largest of `count` processes."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for restores in (False, True):
            with socket.create_server(("", 0)) as server:
                port = server.getsockname()[1]
            command = [sys.executable, "-m", "benchmarks.host_memory", "--work", folder, f"--width={width}"]
            command += ["--restores"] if restores else []
            places = [f"localhost:{port},{count},{i}" for i in range(count)] if count > 1 else [""]
            started = [
                subprocess.Popen([*command, f"--place={place}"], stdout=subprocess.PIPE, text=True) for place in places
            ]
            for process in started:
                printed = process.communicate()[0]
                if process.returncode:
                    raise SystemExit(f"a process of {count} ended with {process.returncode}")
                for name, value in json.loads(printed.splitlines()[-1]).items():
                    found[name] = max(found.get(name, 0.0), value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.host_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--width", type=int, default=1024, help="of the model")
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="keep the results")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--restores", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--place", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        place = arguments.place.split(",") if arguments.place else []
        work(arguments.work, arguments.width, arguments.restores, place)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    results = {}
    print(f"{'processes':>9}{'state':>10}" + "".join(f"{phase:>10}" for phase in PHASES) + "   MB of a process")
    for count in map(int, arguments.processes.split(",")):
        found = results[count] = {name: round(value, 1) for name, value in measure(count, arguments.width).items()}
        print(f"{count:9}{found['state']:10.1f}" + "".join(f"{found[phase]:10.1f}" for phase in PHASES), flush=True)
    if arguments.record:
        record.write("host_memory", {"width": arguments.width, "MB of a process": results})


if __name__ == "__main__":
    main()
