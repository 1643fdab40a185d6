"""File formats: what the documents of one file are.

`.txt` and every other extension: the file is one document. `.jsonl`: one a line, `.parquet`: one a row. Each plain, or
with `.gz` or `.zst` after it. A document comes as pieces of about a megabyte, so that no file has to fit in memory.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from zoo.errors import UsageError

PIECE_BYTES = 1 << 20


@dataclasses.dataclass
class Document:
    name: str  # for messages: a path, path:line, or path:row
    pieces: Iterable[bytes]  # its text, UTF-8 unless the file is binary; read once
    split_key: bytes | None = None  # what decides between training and validation; None: its first piece


def file_format(path: str) -> str:
    """`jsonl`, `parquet` or `text`, by the extension."""
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(_extensions(path)[0], "text")


def _extensions(path: str) -> tuple[str, str]:
    pure = pathlib.PurePath(path)
    compression = pure.suffix if pure.suffix in (".gz", ".zst") else ""
    return (pathlib.PurePath(pure.stem) if compression else pure).suffix, compression


def documents(path: str, text_field: str) -> Iterator[Document]:
    """The documents of a file, in order. A document's pieces must be read before the next one is asked for.

    Raises:
      UsageError: a file that cannot be read, is cut short, or breaks its format; names the file, and line or row.
    """
    read = {"jsonl": _jsonl, "parquet": _parquet, "text": _text}[file_format(path)]
    with _read_errors(path), _open(path) as file:
        yield from read(path, file, text_field)


@contextlib.contextmanager
def _read_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:  # gzip's and Arrow's own among them
        raise UsageError(f"{path}: cannot be read: {error}. Is the file complete, and its extension right?") from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    compression = _extensions(path)[1]
    if compression == ".gz":
        file = gzip.open(path, "rb")
    elif compression == ".zst":
        file = io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), PIECE_BYTES)
    else:
        file = open(path, "rb")
    with file:
        yield file


def _text(path: str, file: BinaryIO, text_field: str) -> Iterator[Document]:
    def blocks() -> Iterator[bytes]:
        with _read_errors(path):
            while block := file.read(PIECE_BYTES):
                yield block

    yield Document(path, _pieces(blocks()))


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut where a tokenizer would cut too: before a line that does not start with white space."""
    rest = b""
    for block in blocks:
        rest += block
        if len(rest) >= PIECE_BYTES:
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(text: bytes) -> int:
    end = len(text) - 1
    while (newline := text.rfind(b"\n", len(text) // 2, end)) > 0:
        if not text[newline + 1 : newline + 2].isspace():
            return newline + 1
        end = newline
    for cut in range(len(text) - 1, len(text) - 4, -1):  # no such line: between two characters
        if text[cut] & 0xC0 != 0x80:
            return cut
    return len(text) - 1


def _jsonl(path: str, file: BinaryIO, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        name = f"{path}:{number}"
        try:
            content = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not content.strip():
                continue
            record = json.loads(content)
            text = record[text_field].encode() if isinstance(record, dict) else None
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}: not UTF-8 at byte {error.start} of the line; convert the file") from error
        except UnicodeEncodeError as error:
            raise UsageError(f"{name}: field {text_field!r} holds half a surrogate pair, which is no text") from error
        except ValueError as error:
            raise UsageError(f"{name}: not valid JSON: {error}; expected one JSON object a line") from error
        except KeyError as error:
            fields = ", ".join(sorted(record)) or "none"
            raise UsageError(f"{name}: no field {text_field!r} (it has: {fields}); set data.text_field") from error
        except AttributeError as error:
            kind = type(record[text_field]).__name__
            raise UsageError(f"{name}: field {text_field!r} is not a string but {kind}; set data.text_field") from error
        if text is None:
            raise UsageError(f"{name}: not a JSON object but {type(record).__name__}; expected one object a line")
        yield Document(name, _pieces(_blocks(text)))


def _parquet(path: str, file: BinaryIO, text_field: str) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        if _extensions(path)[1]:  # parquet is read from its end
            plain = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, plain)
            file = plain
        table = pyarrow.parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise UsageError(f"{path}: no column {text_field!r} (it has: {columns}); set data.text_field")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if not isinstance(value, str):
                    kind = "null" if value is None else type(value).__name__
                    raise UsageError(f"{path}: row {row}: column {text_field!r} is not a string but {kind}")
                yield Document(f"{path}: row {row}", _pieces(_blocks(value.encode())))


def _blocks(text: bytes) -> Iterator[bytes]:
    return (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))
