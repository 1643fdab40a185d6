import bz2
import gzip
import json
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from zoo.data import corpora, readers
from zoo.errors import UsageError

TEXTS = ["def f():\n    return 1\n", "naïve λ 🦓\n", "the last one"]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(column, name="text"):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({name: column, "other": list(range(len(column)))}), sink)
    return sink.getvalue().to_pybytes()


def jsonl(texts, name="text"):
    return "".join(json.dumps({name: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()


def read(path, text_field="text"):
    return [b"".join(document.pieces).decode() for document in readers.documents(str(path), text_field)]


COMPRESSIONS = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("extension", "content", "expected"),
    [
        (".txt", "".join(TEXTS).encode(), ["".join(TEXTS)]),
        (".py", "".join(TEXTS).encode(), ["".join(TEXTS)]),
        (".jsonl", jsonl(TEXTS), TEXTS),
        (".parquet", parquet(TEXTS), TEXTS),
    ],
)
def test_every_format_is_read_plain_and_compressed(tmp_path, extension, content, expected, compression):
    path = tmp_path / f"file{extension}{compression}"
    path.write_bytes(COMPRESSIONS[compression](content))
    assert read(path) == expected


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_of_several_frames_is_read_to_its_end(tmp_path, compression):
    path = tmp_path / f"file.txt{compression}"
    path.write_bytes(b"".join(COMPRESSIONS[compression](text.encode()) for text in TEXTS))
    assert read(path) == ["".join(TEXTS)]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("lost", [1, 20, 300])
@pytest.mark.parametrize("extension", [".txt", ".jsonl"])
def test_a_compressed_file_cut_short_is_refused(tmp_path, compression, lost, extension):
    path = tmp_path / f"file{extension}{compression}"
    path.write_bytes(COMPRESSIONS[compression](jsonl([str(hash(str(i))) for i in range(200)]))[:-lost])
    with pytest.raises(UsageError, match=rf"{path.name}: cannot be read"):
        read(path)


@pytest.mark.parametrize("name", ["file.txt.gz", "file.txt.zst", "file.parquet"])
def test_a_file_of_another_kind_than_its_extension_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"plain text, whatever the name says")
    with pytest.raises(UsageError, match=rf"{name}: cannot be read.*extension"):
        read(tmp_path / name)


def test_the_field_and_the_column_are_chosen_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, "content"))
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS, "content"))
    assert read(tmp_path / "a.jsonl", "content") == read(tmp_path / "a.parquet", "content") == TEXTS


def test_blank_lines_and_a_byte_order_mark_in_jsonl_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS[:1]) + b"\n  \n" + jsonl(TEXTS[1:]))
    assert read(tmp_path / "a.jsonl") == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "a.jsonl:3: not valid JSON"),
        (b"plain words", "a.jsonl:3: not valid JSON"),
        (b'{"text": "\xff\xfe"}', "a.jsonl:3: not UTF-8 at byte 10"),
        (b'{"body": "x", "id": 1}', r"a.jsonl:3: no field 'text' \(it has: body, id\)"),
        (b'{"text": 5}', "a.jsonl:3: field 'text' is not a string but int"),
        (b'{"text": null}', "a.jsonl:3: field 'text' is not a string but NoneType"),
        (b'["text"]', "a.jsonl:3: not a JSON object but list"),
        (b'{"text": "\\ud800"}', "a.jsonl:3: field 'text' holds half a surrogate pair"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:2]) + line + b"\n" + jsonl(TEXTS[2:]))
    with pytest.raises(UsageError, match=message):
        read(tmp_path / "a.jsonl")


def test_parquet_without_the_column_lists_the_columns(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS, "body"))
    with pytest.raises(UsageError, match=r"no column 'text' \(it has: body, other\)"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(("column", "kind"), [([1, 2], "int"), (["a", None], "null"), ([b"a"], "bytes")])
def test_a_parquet_cell_that_is_no_text_is_named(tmp_path, column, kind):
    (tmp_path / "a.parquet").write_bytes(parquet(column))
    with pytest.raises(UsageError, match=f"row {len(column) if None in column else 1}: .* is not a string but {kind}"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("unit", [b"    word\n", b"word\n", b"no line ends ", "€".encode()])
def test_a_long_document_comes_in_pieces_of_whole_characters_that_join_to_it(tmp_path, unit):
    text = b"x" + unit * (2_500_000 // len(unit)) + b"end"
    (tmp_path / "long.txt").write_bytes(text)
    (document,) = readers.documents(str(tmp_path / "long.txt"), "text")
    pieces = []
    for document in readers.documents(str(tmp_path / "long.txt"), "text"):
        pieces = list(document.pieces)
    assert b"".join(pieces) == text
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 2 * readers.PIECE_BYTES
    for piece in pieces:
        piece.decode()


def test_a_long_document_is_cut_before_a_line_that_does_not_start_with_white_space(tmp_path):
    (tmp_path / "long.txt").write_bytes((b"def f():\n    return 1\n\n\n") * 100_000)
    for document in readers.documents(str(tmp_path / "long.txt"), "text"):
        assert all(piece.startswith(b"def") for piece in document.pieces)


# --- What is not read, and what is bounded ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [(".jsonl", "jsonl"), (".txt.gz", "text"), ("a.b/.parquet", "parquet")])
def test_a_name_may_be_an_extension_alone(name, kind):
    assert readers.file_format(name) == kind


@pytest.mark.parametrize("extension", [".JSONL", ".Jsonl.GZ", ".jsonl.Zst"])
def test_capitals_in_an_extension_change_nothing(tmp_path, extension):
    compression = COMPRESSIONS[extension[6:].lower()]
    (tmp_path / f"a{extension}").write_bytes(compression(jsonl(TEXTS)))
    assert read(tmp_path / f"a{extension}") == TEXTS


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl.bz2",
        "a.BZ2",
        "a.zip",
        "a.xz",
        "a.csv",
        "a.json",
        "a.jsonl.1",
        "a.jsonl-00000-of-00002",
        "a.parquet~",
        "a.parquet.old",
        "a.jsonl.gz.part",
        "a.tgz",
    ],
)
def test_other_formats_are_refused_with_those_that_are_known(tmp_path, name):
    (tmp_path / name).write_bytes(b"a,b\n1,2\n")
    with pytest.raises(UsageError, match=rf"{name}: files of .* are not read; known are .txt, .jsonl and .parquet"):
        corpora.find(str(tmp_path / name), "text")


@pytest.mark.parametrize("name", ["notes", "a.md", "a.py", "data.v1.2", "a.txt.gz"])
def test_text_of_any_other_name_is_text(tmp_path, name):
    content = "naïve text\n".encode() * 7000  # a character lies across the last byte looked at
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == [content.decode()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"ab\0c", "no text .byte 2 is 0x00"),
        ("a", "naïve".encode("latin-1"), "no text .byte 2 is 0xef"),
        ("a.md", bz2.compress(b"text"), "its content is bzip2"),
        ("a.txt", gzip.compress(b"text", mtime=0), "its content is gzip"),
        ("a.txt.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "its content is gzip"),
        ("a.txt", parquet(TEXTS), "its content is parquet"),
        ("a.txt", "text".encode("utf-16"), "its content is UTF-16"),
    ],
)
def test_content_that_is_no_text_is_refused_whatever_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read(tmp_path / name)


def test_a_byte_order_mark_is_no_text_and_other_odd_characters_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\0c\x1b[0m")
    assert read(tmp_path / "a.txt") == ["a\r\nb\0c\x1b[0m"]


def test_json_nested_deeply_is_one_line_of_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:1]) + b'{"text":' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")
    with pytest.raises(UsageError, match="a.jsonl:2: JSON nested too deeply"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_line_that_unpacks_to_more_than_the_bound_is_refused_before_it_is_held(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1 << 20)
    (tmp_path / f"a.jsonl{compression}").write_bytes(COMPRESSIONS[compression](b'{"text": "' + b" " * (16 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=":1: the line is longer than 1 MiB"):
            read(tmp_path / f"a.jsonl{compression}")
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


def test_parquet_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 1000)
    monkeypatch.setattr(readers, "_LARGEST_UNPACKED", 1 << 20)
    (tmp_path / "a.parquet").write_bytes(parquet(["a", "b" * 1001]))
    with pytest.raises(UsageError, match="row 2: longer than"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(UsageError, match="unpacks to more than"):
        read(tmp_path / "a.parquet.gz")


@pytest.mark.parametrize("type", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_every_kind_of_text_column_is_read(tmp_path, type):
    for texts in (TEXTS, []):
        (tmp_path / "a.parquet").write_bytes(parquet(pyarrow.array(texts, pyarrow.string()).cast(type)))
        assert read(tmp_path / "a.parquet") == texts


def test_names_with_escapes_are_said_without_them(tmp_path):
    path = tmp_path / "a\n\x1b[31m.jsonl"
    path.write_bytes(b'{"\\u001b]0;x\\u0007": 1}')
    with pytest.raises(UsageError) as raised:
        read(path)
    assert not set("\n\x1b\x07") & set(str(raised.value))
