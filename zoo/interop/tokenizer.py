"""What stands beside the weights: the tokenizer, its special tokens, the defaults of sampling, a chat template.

An import keeps these files as they are in WORKDIR/origin, and an export hands them on. A run that was never imported
has a tokenizer of its own, bytes too, of which an export makes the same files.
"""

import json
import pathlib
import shutil
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from zoo import data, files
from zoo.checkpoints import ORIGIN
from zoo.data.tokenizer import BYTES, LARGEST_FILE, SEPARATORS
from zoo.errors import UsageError

FILE = "tokenizer.json"
CARRIED = (
    FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def choose(folder: pathlib.Path, asked: str, vocab_size: int) -> str:
    """`bytes`, or the path of the tokenizer.json that the imported run reads.

    Raises:
      UsageError: there is none, it is none, or it has more ids than the model has rows.
    """
    spec = asked or str(folder / FILE)
    if not asked and not (folder / FILE).is_file():
        hint = "; its tokenizer.model becomes one by AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        raise UsageError(
            f"{folder}: no {FILE}{hint if (folder / 'tokenizer.model').exists() else ''}; "
            "--tokenizer=PATH names another, --tokenizer=bytes is for models of bytes"
        )
    tokenizer = data.tokenizer.load(spec)
    if tokenizer.vocab_size > vocab_size:
        separator = tokenizer.separator_id
        found = f"{tokenizer.vocab_size:,} ids"
        if spec != BYTES and separator == tokenizer.vocab_size - 1 >= vocab_size:
            found += f", one made for the separator, for want of a special token among {', '.join(SEPARATORS)}"
        raise UsageError(f"{spec}: {found}, and the model's vocabulary has {vocab_size:,}; expected at most as many")
    return spec


def beside(folder: pathlib.Path) -> dict[str, bytes]:
    """The files of `folder` that are carried along, by name.

    Raises:
      UsageError: one that cannot be read, or that is a link out of the folder.
    """
    found = {}
    for path in [folder / name for name in CARRIED if (folder / name).is_file()]:
        try:
            found[path.name] = files.read_bytes(files.inside(path), LARGEST_FILE)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    return found


def carry(folder: pathlib.Path, to: pathlib.Path) -> list[str]:
    """Copy the files of `folder` that are there; their names."""
    found = beside(folder)
    for name, content in found.items():
        files.write(to / name, content)
    return list(found)


def write(workdir: pathlib.Path, config: Any, to: pathlib.Path) -> list[str]:
    """The tokenizer of a run as transformers opens it: the files that it was imported with, or new ones."""
    origin = workdir / ORIGIN
    own = workdir / FILE
    if (
        (origin / FILE).is_file()
        and own.is_file()
        and files.read_bytes(own, None) == files.read_bytes(origin / FILE, None)
    ):
        return carry(origin, to)
    spec = data.tokenizer.spec_for_run(workdir, config)
    tokenizer = data.tokenizer.load(spec)
    if spec == BYTES:
        made = of_bytes(tokenizer.separator_id)
        files.write(to / FILE, made.to_str(pretty=True))
    else:
        shutil.copyfile(spec, to / FILE)
        made = tokenizers.Tokenizer.from_file(spec)
    separator = made.id_to_token(tokenizer.separator_id)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.train.context_length}
    if separator is not None:
        said |= {"bos_token": separator, "eos_token": separator}
    files.write(to / "tokenizer_config.json", json.dumps(said, indent=2) + "\n")
    ids = {"bos_token_id": tokenizer.separator_id, "eos_token_id": tokenizer.separator_id}
    files.write(to / "generation_config.json", json.dumps(ids | {"do_sample": True}, indent=2) + "\n")
    return [FILE, "tokenizer_config.json", "generation_config.json"]


def of_bytes(separator: int) -> tokenizers.Tokenizer:
    """Ids 0 to 255 are bytes: a byte-level BPE that merges nothing."""
    made = tokenizers.Tokenizer(models.BPE(vocab=data.tokenizer.BYTE_OF, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(SEPARATORS[0], special=True)])
    assert made.token_to_id(SEPARATORS[0]) == separator
    return made
