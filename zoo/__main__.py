"""`sequence-zoo COMMAND ...`: all commands of the package by one name."""

import difflib
import importlib
import sys

from zoo.errors import UsageError, exit_with_message, until_nobody_reads

COMMANDS = {
    "train": "train a model from a config, or resume training it",
    "evaluate": "loss, perplexity and bits per byte of a run",
    "generate": "let a run's model write",
    "compare": "runs side by side",
    "tokenizer": "train a byte-level BPE tokenizer",
    "import": "make a run of another package's weights (safetensors)",
    "export": "write a run's weights for other packages",
    "list": "mixers, sizes, configs and all settings with their defaults",
}
HELP = "\n".join(
    [
        "usage: sequence-zoo COMMAND [FLAGS]",
        "",
        *(f"  {name:12}{text}" for name, text in COMMANDS.items()),
        "",
        "sequence-zoo COMMAND --help shows a command's flags, sequence-zoo --version the version.",
        "",
        "  sequence-zoo train --config=gla:tiny --workdir=runs/gla",
        "  sequence-zoo evaluate --workdir=runs/gla",
        "  sequence-zoo generate --workdir=runs/gla --prompt='def main('",
    ]
)


def main(argv: list[str] | None = None) -> None:
    with until_nobody_reads():
        _main(argv)


def _main(argv: list[str] | None) -> None:
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(HELP)
        return
    if command == "--version":
        from zoo import __version__  # jax comes with it

        print(f"sequence-zoo {__version__}")
        return
    with exit_with_message():
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
            raise UsageError(f"unknown command {command!r}; {hint}")
    program = f"sequence-zoo {command}"
    if command in ("train", "list"):
        from zoo import train

        train.run([program, *(["--list"] if command == "list" else []), *arguments])
    elif command in ("import", "export"):
        from zoo.interop.__main__ import main as interop

        interop([command, *arguments], program)
    else:
        module = {"compare": "zoo.compare", "tokenizer": "zoo.data.tokenizer.__main__"}
        module = module.get(command, f"zoo.{command}.__main__")
        importlib.import_module(module).main(arguments, program)


if __name__ == "__main__":
    main()
