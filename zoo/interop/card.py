"""README.md of an export, the model card: what it is, where it comes from, what it was trained on and reached."""

import contextlib
import pathlib
import re
from typing import Any

from zoo import files, flops, metrics
from zoo.checkpoints import Run, evaluation_loss
from zoo.interop.family import Family
from zoo.terminal import brief, one_line


def text(workdir: pathlib.Path, run: Run, family: Family, dtype: str, origin: dict[str, Any]) -> str:
    model, summary = run.config.model, _summary(workdir)
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- sequence-zoo",
        f"- {family.name}", "---", "", f"# {one_line(workdir.name)}", "",
        f"A language model of {flops.num_parameters(model):,} parameters ({dtype}): {model.num_layers} layers of width "
        f"{model.d_model}, mixer `{model.mixer}`, vocabulary {model.vocab_size:,}. Written by Sequence Zoo as "
        f"`{family.architecture}`.", "",
        "## Where it comes from", "",
    ]  # fmt: skip
    if origin:
        lines.append(f"Imported from `{_plain(origin.get('folder', ''))}` ({_plain(origin.get('model_type', ''))}):")
        hashes = origin.get("sha256") if isinstance(origin.get("sha256"), dict) else {}
        lines += ["", *(f"- {_plain(name)}: sha256 {_plain(digest)}" for name, digest in hashes.items()), ""]
    lines += _training(run, summary, evaluation_loss(workdir, run.step))
    return "\n".join(lines) + "\n"


def _training(run: Run, summary: dict[str, Any], loss: float | None) -> list[str]:
    """What was done and measured here; of an import without training, that it was none."""
    if run.step == 0:
        return ["It was not trained here."]
    train, optimizer = run.config.train, run.config.optimizer
    tokens = run.step * train.batch_size * train.context_length
    rows = {
        "steps": f"{run.step:,}",
        "tokens": f"{tokens:,}, {train.batch_size} x {train.context_length} a step",
        "data": _plain(", ".join(map(_source, run.config.data.source.split(",")))),
        "optimizer": f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {optimizer.schedule}",
        "seed": str(train.seed),
    }
    corpus = summary.get("corpus")
    if isinstance(corpus, dict) and corpus.get("fingerprint"):
        rows["data"] += f" (fingerprint {_plain(corpus['fingerprint'])})"
    if summary.get("step") == run.step:  # else it is of another checkpoint
        for name, what in (("loss", "training loss"), ("eval_loss", "validation loss")):
            if isinstance(summary.get(name), int | float):
                rows[what] = f"{summary[name]:.4f} nats a token"
        if isinstance(summary.get("eval_bits_per_byte"), int | float):
            rows["validation bits a byte"] = f"{summary['eval_bits_per_byte']:.4f}"
    elif loss is not None:
        rows["validation loss"] = f"{loss:.4f} nats a token"
    if summary.get("init_from"):
        rows["started from"] = _plain(pathlib.PurePath(str(summary["init_from"])).name)
    return ["| trained | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _plain(text: object) -> str:
    """Without what Markdown would obey, whoever wrote it."""
    return re.sub(r"[`|<>\[\]]", "'", brief(text))


def _source(spec: str) -> str:
    """Of a path its last name; where it lies on this machine is nobody's business."""
    spec = spec.strip()
    return spec if spec.startswith("hf:") else pathlib.PurePath(spec).name


def _summary(workdir: pathlib.Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = files.read_json(workdir / "summary.json", metrics.LARGEST_SUMMARY)
        if isinstance(found, dict):
            return found
    return {}
