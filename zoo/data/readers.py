"""File formats: what the documents of one file are.

`.jsonl`: one a line, `.parquet`: one a row, `.txt`: the file. Each plain, or with `.gz` or `.zst` after it, in capitals
too. A file of another name is one document too, if it begins as text does; what is known to be something else is
refused. A document comes as pieces of about a megabyte, so that no file has to fit in memory; a line of jsonl, and a
cell of parquet, has to, and is bounded. docs/data.md lists it all.
"""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import pathlib
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from zoo import files
from zoo.errors import UsageError
from zoo.terminal import one_line

PIECE_BYTES = 1 << 20
LONGEST_DOCUMENT = 64 << 20  # bytes of a line of jsonl, or of a cell of parquet: what a small file unpacks to
_LARGEST_UNPACKED = 4 << 30  # bytes of a compressed parquet file, which is read from its end
_LOOKED_AT = 1 << 16  # bytes that show whether a file of an unknown extension is text

_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text", ".text": "text"}
_COMPRESSIONS = (".gz", ".zst")
_KNOWN = "known are .txt, .jsonl and .parquet, each also with .gz or .zst, and text of any name"
_NO_TEXT = {
    ".json", ".ndjson", ".csv", ".tsv", ".arrow", ".feather", ".npy", ".npz", ".pkl", ".pt", ".safetensors", ".h5",
    ".hdf5", ".tfrecord", ".db", ".sqlite", ".pdf", ".epub", ".docx", ".bz2", ".xz", ".lzma", ".lz4", ".zip", ".7z",
    ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".zstd", ".br", ".z", ".snappy", ".sz",
}  # fmt: skip
_BEGINNINGS = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z", b"\x04\x22\x4d\x18": "lz4", b"PAR1": "parquet", b"ARROW1": "arrow",
    b"%PDF-": "PDF", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip


@dataclasses.dataclass
class Document:
    name: str  # for messages: a path, path:line, or path:row
    pieces: Iterable[bytes]  # its text, UTF-8 unless the file is binary; read once
    split_key: bytes | None = None  # what decides between training and validation; None: its first piece


def file_format(path: str) -> str:
    """`jsonl`, `parquet`, `text`, or `unknown` (text, if it begins as text does), by the extension in any case.

    Raises:
      UsageError: an extension of something else, or of a format that is known with another one after it.
    """
    extensions, _ = _extensions(path)
    last = extensions[-1] if extensions else ""
    known = [extension for extension in extensions if extension.startswith((".jsonl", ".parquet", *_COMPRESSIONS))]
    if last in _NO_TEXT or (known and last not in _FORMATS):  # a.csv, a.jsonl.bz2, a.jsonl.1, a.jsonl-00000-of-00010
        kind = last if last in known else "".join([*known, last])
        hint = "; if it has one JSON object a line, rename it to .jsonl" if last in (".json", ".ndjson") else ""
        raise UsageError(f"{one_line(path)}: files of {one_line(kind)} are not read; {_KNOWN}{hint}")
    return _FORMATS.get(last, "unknown")


def _extensions(path: str) -> tuple[list[str], str]:
    """All but that of a compression, and that."""
    name = "_" + pathlib.PurePath(path).name  # of a file named .jsonl too
    extensions = [extension.lower() for extension in pathlib.PurePath(name).suffixes]
    compression = extensions.pop() if extensions and extensions[-1] in _COMPRESSIONS else ""
    return extensions, compression


def documents(path: str, text_field: str) -> Iterator[Document]:
    """The documents of a file, in order. A document's pieces must be read before the next one is asked for.

    Raises:
      UsageError: a file that cannot be read, is cut short, or breaks its format; names the file, and line or row.
    """
    read = {"jsonl": _jsonl, "parquet": _parquet, "text": _text, "unknown": _text}[file_format(path)]
    with read_errors(path), _open(path) as file:
        yield from read(path, file, text_field)


@contextlib.contextmanager
def read_errors(path: str) -> Iterator[None]:
    """What reading the file at `path` raises, as UsageError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:  # gzip's and Arrow's own among them
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{one_line(path)}: cannot be read: {one_line(why)}. Is the file complete, and its extension right?"
        ) from error


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    with files.open_regular(path) as file:
        compression = _extensions(path)[1]
        if compression == ".gz":
            unpacked = gzip.open(file, "rb")
        elif compression == ".zst":
            unpacked = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), PIECE_BYTES)
        else:
            unpacked = file
        with unpacked:
            yield unpacked


def _text(path: str, file: BinaryIO, text_field: str) -> Iterator[Document]:
    first = file.read(PIECE_BYTES).removeprefix(codecs.BOM_UTF8)
    _check_beginning(path, first)

    def blocks() -> Iterator[bytes]:
        yield first
        with read_errors(path):
            while block := file.read(PIECE_BYTES):
                yield block

    yield Document(one_line(path), _pieces(blocks()))


def _check_beginning(path: str, first: bytes) -> None:
    for magic, kind in _BEGINNINGS.items():
        if first.startswith(magic):
            raise UsageError(f"{one_line(path)}: its content is {kind}, whatever its name says; {_KNOWN}")
    if file_format(path) == "unknown":
        start = first[:_LOOKED_AT]
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)  # its end may be half a character
            at = start.find(b"\0")
        except UnicodeDecodeError as error:
            at = error.start
        if at >= 0:
            raise UsageError(
                f"{one_line(path)}: no text (byte {at} is {start[at]:#04x}); {_KNOWN}. To train on the bytes of any "
                "file, name it .txt"
            )


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
    for name, record in _records(path, file):
        yield Document(name, _pieces(_blocks(field_of(name, record, text_field, "data.text_field"))))


def records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file (.gz, .zst), each with its name for messages, "reviews.jsonl:17".

    Raises:
      UsageError: a file that cannot be read, is cut short, or breaks its format; names the file and the line.
    """
    with read_errors(path), _open(path) as file:
        yield from _records(path, file)


def field_of(name: str, record: dict[str, Any], field: str, setting: str) -> bytes:
    """The text in a field of a record; `setting` is what names the field.

    Raises:
      UsageError: there is no such field, it is no string, or no text that UTF-8 can hold.
    """
    if field not in record:
        raise UsageError(f"{name}: no field {field!r} (it has: {_listed(record)}); set {setting}")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise UsageError(f"{name}: field {field!r} is not a string but {kind}; set {setting}")
    return _utf8(name, record[field], f"field {field!r} ")


def _records(path: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_DOCUMENT + 1), b""), 1):
        name = f"{one_line(path)}:{number}"
        if len(line) > LONGEST_DOCUMENT:
            raise UsageError(f"{name}: the line is longer than {LONGEST_DOCUMENT >> 20} MiB; split it into documents")
        try:
            content = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not content.strip():
                continue
            record = json.loads(content)
        except UnicodeDecodeError as error:
            raise UsageError(f"{name}: not UTF-8 at byte {error.start} of the line; convert the file") from error
        except ValueError as error:
            raise UsageError(f"{name}: not valid JSON: {error}; expected one JSON object a line") from error
        except RecursionError as error:
            raise UsageError(f"{name}: JSON nested too deeply; expected one JSON object a line") from error
        if not isinstance(record, dict):
            raise UsageError(f"{name}: not a JSON object but {type(record).__name__}; expected one object a line")
        yield name, record


def _utf8(name: str, text: str, where: str = "") -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: {where}holds half a surrogate pair, which is no text") from error


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(one_line(name[:40]) for name in names[:10]) or "none"
    return shown + (f", and {len(names) - 10} more" if len(names) > 10 else "")


def _parquet(path: str, file: BinaryIO, text_field: str) -> Iterator[Document]:
    with contextlib.ExitStack() as stack:
        if _extensions(path)[1]:
            file = _unpacked(path, file, stack.enter_context(tempfile.TemporaryFile()))
        table = pyarrow.parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise UsageError(
                f"{one_line(path)}: no column {text_field!r} (it has: {_listed(table.schema_arrow.names)}); set "
                "data.text_field"
            )
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for cell in batch.column(0):  # one at a time: a dictionary's long value may stand in each row
                row += 1
                name, value = f"{one_line(path)}: row {row}", cell.as_py()
                if not isinstance(value, str):
                    kind = "null" if value is None else type(value).__name__
                    raise UsageError(f"{name}: column {text_field!r} is not a string but {kind}")
                yield text_document(name, value)


def text_document(name: str, text: str) -> Document:
    """The document that a string is.

    Raises:
      UsageError: it is longer than LONGEST_DOCUMENT, or holds half a surrogate pair.
    """
    content = _utf8(name, text)
    if len(content) > LONGEST_DOCUMENT:
        raise UsageError(f"{name}: longer than {LONGEST_DOCUMENT >> 20} MiB; split it into documents")
    return Document(name, _pieces(_blocks(content)))


def _unpacked(path: str, file: BinaryIO, plain: BinaryIO) -> BinaryIO:
    while block := file.read(PIECE_BYTES):
        plain.write(block)
        if plain.tell() > _LARGEST_UNPACKED:
            raise UsageError(f"{one_line(path)}: unpacks to more than {_LARGEST_UNPACKED >> 30} GiB; unpack it first")
    return plain


def _blocks(text: bytes) -> Iterator[bytes]:
    return (text[start : start + PIECE_BYTES] for start in range(0, len(text), PIECE_BYTES))
