"""What many chips ask of data, storage and patience, by formula: `python -m benchmarks.at_scale --config=gla:1.3b`.

    tokens/s            chips * peak * mfu / FLOPs a token (zoo.flops, training)
    read                4 bytes a token of the token cache (2 where the vocabulary has at most 65,536 entries)
    to devices          16 bytes a token: tokens, targets, segment_ids, weights
    checkpoint          C = parameters and what the optimizer keeps (zoo.memory), in float32
    between failures    M = hours / chips, hours being those of one chip between unexpected stops
    between checkpoints T = sqrt(2 s M), of which s is how long the devices wait for one (Young 1974), at least --every
    to restart          R = start + C / rate
    lost                s / T + (T / 2 + R) / M

Assumed unless flags say otherwise: MFU 40%; a chip stops unexpectedly once in 50,000 hours (419 stops of 16,384 GPUs
in 54 days: Llama 3, arXiv:2407.21783, section 3.3.4); storage gives and takes 10 GB/s; a host (4 chips) copies 5 GB/s
out of its devices while they wait; five minutes until new processes stand, have found one another and loaded the step.
"""

import argparse
import math
from collections.abc import Sequence

from zoo import chips, flops, memory
from zoo import config as zoo_config
from zoo.config_files import load_config
from zoo.errors import UsageError, exit_with_message
from zoo.settings import argument

HOST = 4  # chips


def numbers(config: zoo_config.Config, flags: argparse.Namespace) -> dict[str, float]:
    """Of a config with its vocabulary settled; bytes, seconds and their rates."""
    needed, chip = memory.training(config), chips.CHIPS[flags.chip]
    a_token = flops.train_flops_per_token(config.model, config.train.context_length)
    rate = flags.chips * chip.peak * flags.mfu / a_token
    checkpoint = needed.parameters + needed.optimizer
    hosts = math.ceil(flags.chips / HOST)
    between_failures = 3600 * flags.hours / flags.chips
    wait = checkpoint / (hosts * flags.copy * 1e9)
    every = max(math.sqrt(2 * wait * between_failures), flags.every)
    restart = flags.start + checkpoint / (flags.storage * 1e9)
    return {
        "tokens": rate,
        "step": config.train.batch_size * config.train.context_length / rate,
        "read": rate * (2 if config.model.vocab_size <= 1 << 16 else 4),
        "to_devices": rate * 16,
        "hosts": hosts,
        "checkpoint": checkpoint,
        "wait": wait,
        "every": every,
        "storage": checkpoint / every,
        "written": checkpoint / (flags.storage * 1e9),
        "between_failures": between_failures,
        "restart": restart,
        "lost": wait / every + (every / 2 + restart) / between_failures,
    }


def lines(config: zoo_config.Config, flags: argparse.Namespace) -> list[str]:
    n = numbers(config, flags)
    many = flags.many / n["tokens"] / 86400
    return [
        f"{flags.chips:,} {flags.chip} ({n['hosts']:,} hosts), {flops.num_parameters(config.model):,} parameters, "
        f"MFU {flags.mfu:.0%}",
        f"tokens        {n['tokens'] / 1e6:.2f} M/s: a step in {n['step']:.3f} s, {flags.many:.0e} in {many:.1f} days",
        f"data          {n['read'] / 1e6:.1f} MB/s read, {n['to_devices'] / 1e6:.1f} MB/s to devices; "
        f"a host {n['read'] / n['hosts'] / 1e3:.1f} and {n['to_devices'] / n['hosts'] / 1e3:.1f} kB/s",
        f"checkpoint    {n['checkpoint'] / 1e9:.1f} GB, a host's share {n['checkpoint'] / n['hosts'] / 1e9:.2f} GB; "
        f"devices wait {n['wait']:.2f} s, storage writes for {n['written']:.0f} s",
        f"              every {n['every'] / 60:.0f} minutes: {n['storage'] / 1e6:.0f} MB/s on average",
        f"failures      one in {n['between_failures'] / 3600:.1f} hours; back after {n['restart'] / 60:.1f} minutes",
        f"lost          {n['lost']:.2%} of the time, {n['every'] / 2 / 60:.0f} minutes of work each time",
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", default="mamba2_hybrid:8b")
    made.add_argument("--chip", choices=chips.CHIPS, default="v5p")
    made.add_argument("--chips", type=argument(int), default=1024)
    made.add_argument("--mfu", type=argument(float, above=0), default=0.4)
    made.add_argument(
        "--hours", type=argument(float, above=0), default=50_000, help="of one chip, between unexpected stops"
    )
    made.add_argument("--storage", type=argument(float, above=0), default=10, help="GB/s, of all hosts together")
    made.add_argument("--copy", type=argument(float, above=0), default=5, help="GB/s, a host's from its devices")
    made.add_argument("--start", type=argument(float, above=0), default=300, help="seconds from a stop to the restore")
    made.add_argument(
        "--every", type=argument(float, above=0), default=600, help="seconds between checkpoints, at least"
    )
    made.add_argument("--many", type=argument(float, above=0), default=1e12, help="tokens whose days are printed")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_with_message():
        flags = parser().parse_args(arguments)
        try:
            config = load_config(flags.config)
        except UsageError as error:
            raise UsageError(f"--config={flags.config}: {error}") from error
        config.model.vocab_size = config.model.vocab_size or 320  # the byte tokenizer's
        print("\n".join(lines(config, flags)))


if __name__ == "__main__":
    main()
