"""Small corpora and a small tokenizer."""

import random

import pytest

from zoo.config import Config
from zoo.data import corpora
from zoo.data.tokenizer import FileTokenizer
from zoo.data.tokenizer.__main__ import train


@pytest.fixture
def config(tmp_path):
    config = Config()
    config.data.cache_dir = str(tmp_path / "cache")
    config.train.batch_size, config.train.context_length = 4, 8
    return config


@pytest.fixture
def write_documents(tmp_path):
    """Writes random documents to a file each; returns the glob, and the documents in order."""

    def write(count, longest=60, seed=0, folder="text", alphabet=b"abcdefgh \n"):
        generator, documents = random.Random(seed), []
        (tmp_path / folder).mkdir()
        for i in range(count):
            documents.append(bytes(generator.choices(alphabet, k=generator.randint(1, longest))))
            (tmp_path / folder / f"{i:04}.txt").write_bytes(documents[-1])
        return str(tmp_path / folder / "*.txt"), documents

    return write


@pytest.fixture(scope="session")
def bpe_path(tmp_path_factory):
    """A byte-level BPE tokenizer trained on a part of the standard library."""
    folder = tmp_path_factory.mktemp("bpe")
    with open(corpora.__file__, "rb") as file:
        (folder / "text.txt").write_bytes(file.read() * 3)
    tokenizer = train([corpora.find(str(folder / "text.txt"), "text")], 400)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def bpe(bpe_path):
    return FileTokenizer(bpe_path)
