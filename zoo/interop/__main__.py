"""Weights of other packages into a run, and a run's weights into a folder for other packages.

    python -m zoo import llama-3.2-1b --workdir=runs/llama
    python -m zoo export runs/llama --to=llama-tuned --dtype=bfloat16

Both read safetensors, config.json and tokenizer.json (docs/interop.md), execute nothing, and overwrite nothing.
"""

import argparse
import sys
import time

from zoo.errors import UsageError, exit_with_message
from zoo.files import expand
from zoo.interop.files import SHARD_BYTES, listed
from zoo.settings import Parser, argument
from zoo.terminal import one_line

MESH = ("data", "fsdp", "tensor")


def _import_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("folder", help="of config.json, *.safetensors, tokenizer.json; or hf:NAME, of the Hugging Face hub")
    add("--workdir", type=expand, required=True, help="the run to make; nothing may stand there")
    add("--tokenizer", type=expand, default="", help="`bytes`, or a tokenizer.json; default: the folder's")
    add("--ignore", default="", help="fields of config.json, comma-separated, to pass over though they are not known")
    for axis in MESH:
        default = -1 if axis == "data" else 1
        add(
            f"--{axis}", type=argument(int, special={-1: "what the others leave"}), default=default, help=f"mesh.{axis}"
        )
    add("--coordinator", default="", help="of several processes: HOST:PORT, on the machine of process 0")
    add("--num_processes", type=argument(int), help="of several processes: how many")
    add("--process_id", type=argument(int, at_least=0), help="of several processes: which one this is, from 0")


def _export_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("workdir", type=expand, help="the run")
    add("--to", type=expand, required=True, help="the folder to make; nothing may stand there")
    add("--step", type=argument(int, at_least=0), help="the checkpoint's step; default: the newest")
    add("--dtype", default="float32", help="of the tensors: float32, bfloat16 or float16")
    add("--format", default="", help="the model_type to write; default: the one imported, or the first that fits")
    add("--shard_bytes", type=argument(int), default=SHARD_BYTES, help="largest size of a file")


def _import(arguments: argparse.Namespace) -> None:
    from zoo import processes
    from zoo.interop import import_model
    from zoo.sharding import MeshConfig

    begin = time.perf_counter()
    mesh = MeshConfig(**{axis: getattr(arguments, axis) for axis in MESH})
    with processes.joined(arguments.coordinator, arguments.num_processes, arguments.process_id):
        made = import_model(
            arguments.folder, arguments.workdir, asked_tokenizer=arguments.tokenizer, mesh=mesh,
            ignore=[name for name in arguments.ignore.split(",") if name],
        )  # fmt: skip
        if not processes.is_first():
            return
    model = made.config.model
    print(
        f"imported    {made.model_type}: {model.num_layers} layers of width {model.d_model}, {made.parameters:,} "
        f"parameters in {', '.join(made.dtypes)}, {time.perf_counter() - begin:.1f} s"
    )
    if made.ignored:
        print(f"ignored     {listed(made.ignored)}")
    print(f"write       python -m zoo generate --workdir={one_line(made.workdir)} --prompt='def main('")
    print(
        f"train on    python -m zoo train --config={one_line(made.workdir)}/config.json --workdir=NEW "
        f"--init_from={one_line(made.workdir)} --config.data.source=..."
    )


def _export(arguments: argparse.Namespace) -> None:
    from zoo.interop import export_run

    made = export_run(
        arguments.workdir, arguments.to, step=arguments.step, dtype=arguments.dtype, model_type=arguments.format,
        shard_bytes=arguments.shard_bytes,
    )  # fmt: skip
    print(f"exported    step {made.step} as {made.model_type}, {made.tensors} tensors of {arguments.dtype}")
    print(one_line(f"written     {made.folder}: {', '.join(made.files)}"))


COMMANDS = {"import": (_import_arguments, _import), "export": (_export_arguments, _export)}


def main(argv: list[str] | None = None, program: str = "python -m zoo.interop") -> None:
    argv = sys.argv[1:] if argv is None else argv
    with exit_with_message(at_once=True):
        if not argv or argv[0] not in COMMANDS:
            if argv and argv[0] in ("--help", "-h"):
                print(__doc__)
                return
            raise UsageError(f"{program}: expected one of {', '.join(COMMANDS)}")
        define, run = COMMANDS[argv[0]]
        parser = Parser(program if program.endswith(argv[0]) else f"{program} {argv[0]}", __doc__)
        define(parser)
        arguments = parser.parse_args(argv[1:])
        run(arguments)


if __name__ == "__main__":
    main()
