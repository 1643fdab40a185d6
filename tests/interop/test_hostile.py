"""What others wrote is read with distrust: one line that says what is wrong, nothing run, nothing left behind."""

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import sys

import numpy as np
import pytest
import safetensors.numpy

from tests.interop import tiny
from zoo import errors, interop
from zoo.__main__ import main
from zoo.errors import RunError, UsageError
from zoo.interop import files
from zoo.training import start


def header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(folder, change, single=True):
    """The header of model.safetensors after `change`, which may return its text."""
    path = folder / "model.safetensors"
    head, body = header(path)
    text = change(head)
    text = (text if isinstance(text, str) else json.dumps(head)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def shards(folder, weight_map=None, drop=(), **more):
    """In two files and an index."""
    held = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        if file not in drop:
            extra = {name: held[name] for name in more.get(file[0], ())}
            safetensors.numpy.save_file({name: held[name] for name in part} | extra, folder / file)
    whole = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": whole | (weight_map or {})}))


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10_000_000_000) + path.read_bytes()[8:])


def overlapping(folder):
    def change(head):
        a, b, *_ = (entry for name, entry in head.items() if name != "__metadata__" and len(entry["shape"]) == 2)
        b["data_offsets"] = a["data_offsets"]

    rewrite(folder, change)


def twice_in_a_header(folder):
    def change(head):
        head.pop("__metadata__")
        name = next(iter(head))
        return json.dumps(head)[:-1] + f', "{name}": {json.dumps(head[name])}}}'

    rewrite(folder, change)


def outside_the_file(folder):
    def change(head):
        entry = head["model.norm.weight"]
        entry["data_offsets"] = [2**40, 2**40 + 64]

    rewrite(folder, change)


def with_tensors(**changes):
    def change(folder):
        path = folder / "model.safetensors"
        held = safetensors.numpy.load_file(path)
        for name, value in changes.items():
            name = {"norm": "model.norm.weight"}.get(name, name)
            held = {key: x for key, x in held.items() if key != name} if value is None else held | {name: value}
        safetensors.numpy.save_file(held, path)

    return change


class Mark:
    """What a pickle may do when it is opened."""

    def __reduce__(self):
        return print, ("opened",)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Mark()))


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def config(text=None, **fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields) if text is None else text)

    return change


def small_tokenizer(size):
    def change(folder):
        (folder / "tokenizer.json").write_text(tiny.tokenizer(size))

    return change


def link(name):
    """To a file that is no part of the model."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(__file__)

    return change


NAME = "model.norm.weight"
NORM, POINT = np.ones(16, np.float32), np.ones((), np.float32)
CASES = {
    "truncated": (truncated, r"model\.safetensors.*(damaged|cut)"),
    "a header of 10 GB": (huge_header, r"header of 10,000,000,000 bytes"),
    "no JSON in the header": (lambda folder: rewrite(folder, lambda head: "{" * 64), r"model\.safetensors.*damaged"),
    "overlapping offsets": (overlapping, r"model\.safetensors.*damaged"),
    "offsets outside": (outside_the_file, r"model\.safetensors.*damaged"),
    "a name twice": (twice_in_a_header, r"stands twice"),
    "a name in two shards": (lambda folder: shards(folder, a=[NAME], b=[NAME]), r"stands twice"),
    "a missing shard": (lambda folder: shards(folder, drop=["b.safetensors"]), r"of 2 shards, missing b\.safetensors"),
    "a tensor in another shard": (
        lambda folder: shards(folder, {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}),
        r"does not say where tensors are.*in fact",
    ),
    "an index that leaves the folder": (
        lambda folder: shards(folder, {"model.norm.weight": "../../x.safetensors"}),
        r"\.safetensors files beside it, got '\.\./\.\./x\.safetensors'",
    ),
    "an absolute path in the index": (
        lambda folder: shards(folder, {"model.norm.weight": "/etc/x.safetensors"}), r"got '/etc/x\.safetensors'",
    ),
    "a shard's name without end": (
        lambda folder: shards(folder, {"model.norm.weight": "a" * 5000 + ".safetensors"}),
        r"files beside it, got 'a{50,60}\.\.\.$",
    ),
    "an index that is no object": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), r"no weight_map",
    ),
    "a tensor missing": (with_tensors(norm=None), r"1 not in the files: model\.norm\.weight \[16\]"),
    "an unknown tensor": (with_tensors(more=NORM), r"not of the model that config\.json describes: more \[16\]"),
    "another shape": (
        with_tensors(norm=np.ones(8, np.float32)), r"model\.norm\.weight: \[8\] in the file, \[16\] by config\.json",
    ),
    "another dtype": (with_tensors(norm=NORM.astype(np.int32)), r"model\.norm\.weight: I32, expected F32, BF16, F16"),
    "float64": (with_tensors(norm=NORM.astype(np.float64)), r"model\.norm\.weight: F64, expected"),
    "a pickle": (pickled, r"pickled \(pytorch_model\.bin\).*save_model"),
    "no weights": (no_weights, r"neither model\.safetensors nor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: cannot be read"),
    "a config that is no JSON": (config("{"), r"config\.json: no JSON"),
    "a config nested without end": (config("[" * 100_000), r"config\.json: no JSON"),
    "a config that is a list": (config("[]"), r"expected an object"),
    "an unknown model": (config(model_type="lama"), r"model_type 'lama' is not one of.*did you mean llama"),
    "tied numbers": (
        lambda folder: (
            config(tie_word_embeddings=True)(folder),
            with_tensors(**{"lm_head.weight": POINT, "model.embed_tokens.weight": POINT})(folder),
        ),
        r"model\.embed_tokens\.weight: \[\] in the file",
    ),
    "experts": (config(model_type="mixtral"), r"mixtral cannot be expressed here: experts"),
    "a model_type that is a number": (config(model_type=7), r"model_type 7 is not one of"),
    "an absurd width": (config(hidden_size=10**30), r"hidden_size: got 1"),
    "a width that no memory holds": (config(intermediate_size=2**30), r"at least .* of memory"),
    "an absurd depth": (config(num_hidden_layers=10**9), r"num_hidden_layers: got 1000000000, expected .* 10000"),
    "no layers": (config(num_hidden_layers=0), r"num_hidden_layers: got 0, expected at least 1"),
    "a field that is text": (config(hidden_size="16"), r"hidden_size: got '16', expected a whole number"),
    "a field that is a list": (config(rms_norm_eps=[1]), r"rms_norm_eps: got \[1\], expected a number"),
    "a field that is not finite": (config(rms_norm_eps=float("nan")), r"rms_norm_eps: got nan"),
    "rope that is a list": (config(rope_parameters=[1]), r"rope_parameters: got \[1\], expected an object"),
    "all that cannot be expressed": (
        config(hidden_act="relu", tie_word_embeddings="x", num_attention_heads=0),
        r"(?s)tie_word_embeddings: got 'x'.*num_attention_heads: got 0, expected at least 1.*hidden_act: 'relu'",
    ),
    "another rope": (config(rope_parameters={"rope_type": "dynamic"}), r"rope_parameters\.rope_type: 'dynamic'"),
    "an unknown field": (config(attention_multiplier=0.5), r"attention_multiplier: 0\.5 is not known.*--ignore"),
    "a tokenizer of another vocabulary": (small_tokenizer(50), r"50 ids, and the model's vocabulary has 40"),
    "a tokenizer that is none": (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"is no tokenizer\.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer\.json; --tokenizer="),
} | {
    f"{name}, a link out of the folder": (link(name), rf"{re.escape(name)}: cannot be read \(it is a link out of")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja")
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_left(case, tmp_path, capsys):
    change, message = CASES[case]
    folder = tiny.folder(tmp_path / "theirs")
    change(folder)
    with pytest.raises(UsageError) as error:
        interop.import_model(str(folder), str(tmp_path / "run"))
    assert re.search(message, str(error.value)), error.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]
    assert "opened" not in capsys.readouterr().out


def test_what_stands_there_is_not_overwritten(tmp_path, capsys):
    folder = tiny.folder(tmp_path / "theirs")
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("kept")
    with pytest.raises(UsageError, match="stands there already"):
        interop.import_model(str(folder), str(tmp_path / "run"))
    interop.import_model(str(folder), str(tmp_path / "new"))
    with pytest.raises(UsageError, match="stands there already"):
        interop.export_run(str(tmp_path / "new"), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="float16"), files.new_folder(tmp_path / "a/b/c"):
        assert (tmp_path / "a/b").is_dir()
        raise UsageError("float16")
    assert not (tmp_path / "a").exists()
    (tmp_path / ".again.0123abcd.unfinished").mkdir()
    with files.new_folder(tmp_path / "again"):
        assert f"{tmp_path}: .again.0123abcd.unfinished is of one that was killed" in capsys.readouterr().err
    (tmp_path / ".again.0123abcd.unfinished").rmdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="stands there already"):
        interop.export_run(str(tmp_path / "new"), str(tmp_path / "link"))
    for name in ("run", "out"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["mine"]
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_links(tmp_path):
    """Into the hub's cache they are what a snapshot is made of; of a run's origin they would publish what they name."""
    for folder in ("name/snapshots/abc", "name/blobs", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "name/blobs/hash").write_text("")
    for target, found in (("../../blobs/hash", True), ("../../../other", False), ("a.json", True)):
        path = tmp_path / "name/snapshots/abc/config.json"
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with contextlib.nullcontext() if found else pytest.raises(OSError, match="link out of its folder"):
            assert files.files.inside(path) == path
    made = interop.import_model(str(tiny.folder(tmp_path / "theirs")), str(tmp_path / "run"))
    origin = made.workdir / "origin"
    for path, target in ((origin / "tokenizer.model", __file__), (origin, tmp_path / "moved")):
        if path == origin:
            origin.rename(target)
        path.symlink_to(target)
        with pytest.raises(UsageError, match=f"{path.name}: cannot be handed on .*link out"):
            interop.export_run(str(made.workdir), str(tmp_path / "out"))
        with pytest.raises(UsageError, match="link out") if path == origin else contextlib.nullcontext():
            start._carry_origin(made.workdir, tmp_path / "next")  # of a run that begins with it
            assert (tmp_path / "next" / "origin" / path.name).is_symlink()
        shutil.rmtree(tmp_path / "next", ignore_errors=True)
        (tmp_path / "moved" if path == origin else path).rename(tmp_path / f"gone{path.name}")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    folder = tiny.folder(tmp_path / "theirs")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(files.files, "write", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(RunError, match="run cannot be written .*No space left"):
        interop.import_model(str(folder), str(tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_export_onto_a_full_disk(tmp_path, monkeypatch):
    made = interop.import_model(str(tiny.folder(tmp_path / "theirs")), str(tmp_path / "run"))
    full = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(UsageError, match="out cannot be written .*model.safetensors: .*No space left"):
        interop.export_run(str(made.workdir), str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"a.x00b is no path"):
        interop.export_run(str(made.workdir), str(tmp_path / "a\0b"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "theirs"]


def test_a_reader_that_has_seen_enough(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit) as exit:
            main(["--help"])
        assert exit.value.code == 141
        with pytest.raises(BrokenPipeError, match="another"), errors.until_nobody_reads():  # now it can be written to
            raise BrokenPipeError("of another pipe")


def test_the_command_says_it_in_one_line(tmp_path, capsys, monkeypatch):
    folder = tiny.folder(tmp_path / "theirs")
    pickled(folder)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as exit:
        main(["import", str(folder), f"--workdir={tmp_path / 'run'}"])
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
