"""Beyond left-to-right text: classification and series by softmax attention, its approximations and recurrences.

Every model has two layers of width 64 and 12 d_model^2 parameters a layer, whatever its mixer leaves to the MLP; sees
both ways, a recurrence by one mixer that runs twice (`direction_shared`); and learned positions. A row of classes is
the mean over its positions. One learning rate for all. Each task at two lengths, in positions of the model.

listops: as Long Range Arena (arXiv:2011.04006), whose rows have 500 to 2,000 tokens; here up to 64 and up to 128, and
  16,000 of them. Published: accuracy there.
digits: scikit-learn's, a pixel a position, and four. mnist1d (arXiv:2011.14439): 40 points, and pairs of them.
GunPoint: of the UCR archive (arXiv:1810.07758), 50 rows of 150 steps, one and five a position.
lorenz, vic_elec: 24 steps after 96, 48 after more; the last fifth tests, the last value, the last season and a linear
  regression of the input stand beside. conv_linear there, and on lorenz its convolutions alone; linear attention alone
  is the family linear_attention, of as many parameters (within 3 %).

A task whose package is not installed is left out, and the command says so.
"""

from collections.abc import Iterator

from benchmarks.papers.row_task import RowTask
from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.mixers import BIDIRECTIONAL

FAMILIES = (
    "attention", "longformer", "linformer", "linear_attention", "performer", "rala", "transnormer", "gla",
    "gated_delta_net", "mamba",
)  # fmt: skip
CONVOLUTIONS = "convolutions"  # those of conv_linear without the attention
# Accuracy in per cent: what a task is held to, and whose it is.
HELD_TO = {"digits": (95.0, "ours"), "mnist1d": (91.0, "the published GRU's")}

_LISTOPS = {
    "attention": "36.4", "linformer": "35.7", "longformer": "35.6", "performer": "18.0", "linear_attention": "16.1"
}  # fmt: skip
_PLACES = ("dilation=1", "dilation=2")  # of conv_linear's two layers


def setups() -> Iterator[Setup]:
    for source, steps, patches, sizes in (
        ("listops", (64, 128), (1, 1), {"steps": 2000, "rows": 16_000}),
        ("digits", (64, 64), (1, 4), {"steps": 2000}),
        ("mnist1d", (40, 40), (1, 2), {"steps": 5000}),
        ("ucr?name=GunPoint", (150, 150), (1, 5), {"steps": 800, "batch_size": 16}),
    ):
        for length, patch in zip(steps, patches, strict=True):
            task = RowTask(source, "classes", length, patch)
            for mixer in FAMILIES:
                published = {"listops": _LISTOPS.get(mixer, "-"), "mnist1d": "GRU 91"}.get(task.name, "-")
                yield _setup(task, mixer, published, embedding_dropout=0.1, **sizes)
    for source, inputs, patch, season in (("lorenz", (96, 192), 4, 0), ("tsdata?name=vic_elec", (96, 336), 8, 48)):
        for length, horizon in zip(inputs, (24, 48), strict=True):
            task = RowTask(source, "values", length, patch, horizon, season)
            for mixer in (*FAMILIES, "conv_linear", *([CONVOLUTIONS] if source == "lorenz" else [])):
                yield _setup(task, mixer, "-", steps=2000)


def _setup(task: RowTask, mixer: str, published: str, *, steps: int, batch_size: int = 32, **sizes) -> Setup:
    optimizer = OptimizerConfig(learning_rate=2e-3, warmup_steps=steps // 10, final_fraction=0.0)
    model = {"positions": "learned", "direction": BIDIRECTIONAL, "direction_shared": True, "mlp": "swiglu", "d_ff": 0}
    if mixer in ("conv_linear", CONVOLUTIONS):
        alone = "@attention=false" if mixer == CONVOLUTIONS else ""
        model["mixer"] = ",".join(f"conv_linear@{place}{alone}" for place in _PLACES)
    settings = {
        "linformer": {"length": task.length, "mixtures": 16},
        "longformer": {"window": 16, "global_tokens": 1},
        "transnormer": {"block": 16},
    }
    return Setup(
        task, mixer, published, steps, batch_size, optimizer, d_model=64, settings=settings.get(mixer, {}),
        model=model, label=f"{_named(task)} {task.length}", **sizes,
    )  # fmt: skip


def _named(task: RowTask) -> str:
    """The source; of a package's data sets the one."""
    return task.source.partition("name=")[2] or task.name
