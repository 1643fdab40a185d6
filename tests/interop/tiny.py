"""Folders as other packages leave them, made of a golden or from nothing."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from tests.interop.values import draw

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and the tensors' shapes, and the arrays."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("about"))), arrays


def tensors(shapes: dict[str, list[int]], dtype: np.dtype = np.float32) -> dict[str, np.ndarray]:
    return {name: draw(name, tuple(shape)).astype(dtype) for name, shape in shapes.items()}


def tokenizer(vocab_size: int) -> str:
    """A tokenizer.json of so many words, the separator among them."""
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    special = {"id": 0, "content": "<|endoftext|>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"},
        }
    )  # fmt: skip


def folder(path: pathlib.Path, name: str = "llama", **fields) -> pathlib.Path:
    """The golden's folder; `fields` change its config.json (... takes one away)."""
    about, _ = golden(name)
    path.mkdir()
    config = {key: value for key, value in (about["config"] | fields).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(tokenizer(about["config"]["vocab_size"]))
    safetensors.numpy.save_file(tensors(about["shapes"]), path / "model.safetensors", metadata={"format": "pt"})
    return path
