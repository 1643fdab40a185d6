"""Train a language model, or resume training it: repeat the command.

    python train.py --config=gla:tiny --workdir=runs/gla
    python train.py --config=gla:tiny --workdir=runs/retnet --config.model.mixer=retnet
    python train.py --config=runs/gla/config.json --workdir=runs/gla --config.optimizer.learning_rate=1e-3 \\
        --override=optimizer.learning_rate
    python train.py --config=runs/gla/config.json --workdir=runs/more --init_from=runs/gla
    python train.py --list
    python train.py --list --config=gla:340m
    python train.py --dry_run --config=gla:1.3b --config.mesh.fsdp=64 --config.mesh.tensor=4
    python train.py --aot=v5e:4x4 --config=gla:1.3b --config.mesh.fsdp=16

--config is a name of `--list` with a size, or a file: configs/gla.py:tiny, my/own.py, a run's config.json.
--config.SECTION.FIELD=VALUE overrides any setting of the config; --list shows them. After an installation
`sequence-zoo train` is the same command, in any folder.
"""

import inspect
import logging as python_logging
import sys

from absl import app, flags, logging

from zoo.errors import RunError, UsageError, exit_with_message

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "", "Folder of the run; a run that stands there is resumed.")
flags.DEFINE_string("init_from", "", "Workdir of a run whose weights the new run starts from.")
flags.DEFINE_list("override", [], "Settings that a resumed run changes, as optimizer.learning_rate,optimizer.schedule.")
flags.DEFINE_integer("profile", 0, "Trace that many steps into WORKDIR/profile (--profile alone: 5).", lower_bound=0)
flags.DEFINE_boolean(
    "list", False, "Show mixers, sizes, configs and settings, or what --config is and costs, and exit."
)
flags.DEFINE_boolean(
    "dry_run", False, "Show how parameters and batch lie on the mesh, their bytes a device, and exit; writes nothing."
)
flags.DEFINE_string("coordinator", "", "Of several processes: HOST:PORT, on the machine of process 0.")
flags.DEFINE_integer("num_processes", None, "Of several processes: how many.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "Of several processes: which one this is, from 0.", lower_bound=0)
# Their defaults are those of `zoo.processes.joined`.
flags.DEFINE_integer("initialization_timeout", None, "Seconds within which all processes have to come.", lower_bound=1)
flags.DEFINE_integer("heartbeat_timeout", None, "Seconds after which a silent process is gone; all end.", lower_bound=2)
flags.DEFINE_integer("step_timeout", None, "Seconds without a step done, once one is; all end.", lower_bound=1)
flags.DEFINE_integer("devices", 0, "Of --dry_run; they need not be there. 0: what mesh.* needs.", lower_bound=0)
flags.DEFINE_string(
    "aot", "", "Compile the step for a TPU topology that is not there, as v5e:4x4; show memory, FLOPs, time; and exit."
)


def parse(argv: list[str]) -> list[str]:
    from zoo import processes
    from zoo.training import command_line

    for name, parameter in inspect.signature(processes.joined).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            FLAGS.set_default(name, parameter.default)
    with exit_with_message():
        if any(argument in ("--help", "-help", "-h", "--helpshort") for argument in argv[1:]):
            print(__doc__, FLAGS.module_help(sys.modules[__name__]), "", command_line.settings_listing(), sep="\n")
            sys.exit(0)
        return command_line.define_and_parse(["--profile=5" if a == "--profile" else a for a in argv])


def quiet_libraries() -> None:
    """What a run has to say it prints. Orbax logs what it also raises, hundreds of lines for one full disk."""
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)


def main(argv: list[str]) -> None:
    from zoo import compile_cache, processes
    from zoo.config import Config
    from zoo.training import command_line, train

    with exit_with_message(at_once=True):
        if FLAGS.list:
            chosen = FLAGS["config"].present or FLAGS.config != Config()
            print(command_line.config_listing(FLAGS.config, FLAGS.workdir) if chosen else command_line.listing())
            return
        if len(argv) > 1:
            raise UsageError(f"unexpected argument {argv[1]!r}; settings are given as --config.NAME=VALUE")
        if not FLAGS["config"].present:
            raise UsageError("--config is missing; for example --config=gla:tiny (see --list)")
        if FLAGS.devices and not FLAGS.dry_run:
            raise UsageError("--devices is for --dry_run; a run uses all devices that it sees")
        if FLAGS.dry_run and FLAGS.aot:
            raise UsageError("--dry_run compiles nothing, and --aot does; give one of them")
        several = [name for name in ("coordinator", "num_processes", "process_id") if FLAGS[name].present]
        if several and (FLAGS.dry_run or FLAGS.aot):
            raise UsageError(f"--{several[0]} is for a run; --dry_run and --aot are of one process")
        if FLAGS.dry_run:
            print(command_line.dry_run(FLAGS.config, FLAGS.workdir, FLAGS.devices))
            return
        if FLAGS.aot:
            quiet_libraries()
            text, problem = command_line.ahead_of_time(FLAGS.config, FLAGS.workdir, FLAGS.aot)
            print(text, flush=True)
            if problem:
                raise RunError(problem)
            return
        if not FLAGS.workdir:
            raise UsageError("--workdir is missing; for example --workdir=runs/gla")
        quiet_libraries()
        compile_cache.enable()
        with processes.joined(
            FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id,
            initialization_timeout=FLAGS.initialization_timeout,
            heartbeat_timeout=FLAGS.heartbeat_timeout,
            step_timeout=FLAGS.step_timeout,
        ):  # fmt: skip
            try:
                train(
                    FLAGS.config, FLAGS.workdir,
                    init_from=FLAGS.init_from, profile_steps=FLAGS.profile, override=FLAGS.override,
                )  # fmt: skip
            except OSError as error:
                raise RunError(str(error)) from error


def run(argv: list[str] | None = None) -> None:
    """The command, `argv[0]` being its name."""
    app.run(main, argv=argv, flags_parser=parse)


if __name__ == "__main__":
    run()
