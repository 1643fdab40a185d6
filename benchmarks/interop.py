"""Seconds and host memory of importing another package's weights, and what each process and device of several holds.

    python -m benchmarks.interop [--layers=24] [--width=2048] [--processes=1,2,4] [--devices=8]

A folder of random bfloat16 weights as Llama's (1.3 billion parameters unless told otherwise, in two shards) is made
first. Columns are MB: parameters in the files, a process's share of them, the most that one of its devices holds, and
its memory at most above what it had at the start, without pages of mapped files, which the system takes back at will.
The memory of a CPU device is the host's, so that the share itself counts too.
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
import threading
import time

import ml_dtypes
import numpy as np

from benchmarks import record


def make(folder: pathlib.Path, layers: int, width: int, vocabulary: int = 32_000) -> int:
    """The folder; its bytes of parameters."""
    from zoo.interop.files import write_shards

    inner = width * 8 // 3 // 64 * 64
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    for i in range(layers):
        block = f"model.layers.{i}."
        shapes |= {f"{block}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes |= {f"{block}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{block}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (width,)
    random = np.random.default_rng(0)
    arrays = ((name, random.random(shape, np.float32).astype(ml_dtypes.bfloat16)) for name, shape in shapes.items())
    write_shards(folder, shapes, arrays, np.dtype(ml_dtypes.bfloat16), 1_500_000_000)
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return 2 * sum(int(np.prod(shape)) for shape in shapes.values())


class _Peak(threading.Thread):
    """Of anonymous memory, MB, looked at a hundred times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.found, self._done = 0.0, threading.Event()

    def run(self):
        while not self._done.wait(0.01):
            self.found = max(self.found, anonymous())

    def stop(self) -> float:
        self._done.set()
        self.join()
        return self.found


def anonymous() -> float:
    """MB of this process that no file backs."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1000


def work(folder: str, workdir: str, place: list[str]) -> None:
    """One process imports; a line of JSON."""
    import jax

    from zoo import processes
    from zoo.interop import import_model, importing
    from zoo.sharding import MeshConfig

    with processes.joined(place[0], int(place[1]), int(place[2])) if place else processes.joined(num_processes=1):
        jax.jit(lambda: 0)()
        held: dict = {}

        def load(*arguments, original=importing.load):
            arrays = original(*arguments)
            for array in arrays.values():
                for part in array.addressable_shards:
                    held[part.device] = held.get(part.device, 0) + part.data.nbytes
            return arrays

        importing.load = load
        before, peak, begin = anonymous(), _Peak(), time.perf_counter()
        peak.start()
        import_model(folder, workdir, asked_tokenizer="bytes", mesh=MeshConfig(data=1, fsdp=-1))
        told = {"seconds": time.perf_counter() - begin, "peak": peak.stop() - before}
        told |= {"share": sum(held.values()) / 1e6, "device": max(held.values()) / 1e6}
    print(json.dumps(told), flush=True)


def measure(folder: pathlib.Path, count: int, devices: int) -> dict[str, float]:
    """Of the largest of `count` processes."""
    with tempfile.TemporaryDirectory() as out:
        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]
        command = [sys.executable, "-m", "benchmarks.interop", "--work", str(folder), f"{out}/run"]
        places = [f"localhost:{port},{count},{i}" for i in range(count)] if count > 1 else [""]
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        started = [
            subprocess.Popen([*command, f"--place={place}"], stdout=subprocess.PIPE, text=True, env=os.environ | flags)
            for place in places
        ]
        told = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {name: max(one[name] for one in told) for name in told[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="keep the results")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--place", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, arguments.place.split(",") if arguments.place else [])
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        size = make(pathlib.Path(folder), arguments.layers, arguments.width) / 1e6
        print("processes  devices each  parameters      share   a device       peak   peak/share   seconds")
        plan = [(int(count), 1) for count in arguments.processes.split(",")] + [(1, arguments.devices)]
        for count, devices in plan:
            found = measure(pathlib.Path(folder), count, devices)
            row = {"processes": count, "devices": devices, "parameters": size}
            row |= {name: round(value, 1) for name, value in found.items()}
            rows.append(row)
            of_files = row["share"], row["device"], row["peak"]
            line = f"{count:9}  {devices:12}  {size:10,.0f}" + "".join(f"{mb:11,.0f}" for mb in of_files)
            print(f"{line}  {row['peak'] / row['share']:11.2f}  {row['seconds']:8.1f}", flush=True)
    if arguments.record:
        record.write("interop", {"layers": arguments.layers, "width": arguments.width, "MB": rows})


if __name__ == "__main__":
    main()
