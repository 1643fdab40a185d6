"""What a set-up is: one model on one task, and how it is trained."""

import dataclasses

from benchmarks.papers.row_task import RowTask
from zoo.config import OptimizerConfig
from zoo.data.synthetic import Task


@dataclasses.dataclass
class Setup:
    """One model on one task."""

    task: Task | RowTask
    mixer: str
    published: str  # accuracy in per cent, or what was found
    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    rows: int = 0  # of a training set that is passed over again and again; 0: fresh data, or all that is stored
    d_model: int = 32
    d_ff: int = 0  # of a GELU MLP; 0: no MLP
    embedding_dropout: float = 0.0
    init_std: float = 0.0  # of matrices; 0: the model's own
    as_gpt2: bool = False  # norms of mean and variance, and biases everywhere, in place of RMS norms and none
    undecayed: tuple[str, ...] = ()  # parameters without weight decay, every other has it; (): the trainer's choice
    test_lengths: tuple[int, ...] = ()  # beside the task's own
    settings: dict = dataclasses.field(default_factory=dict)  # of the mixer
    model: dict = dataclasses.field(default_factory=dict, repr=False)  # of the model, beside what stands above
    label: str = dataclasses.field(default="", repr=False)  # in the table; "": the task's name
    is_tuned: bool = dataclasses.field(default=False, repr=False)  # one of several optimizers, all tried

    def __post_init__(self):
        self.label = self.label or self.task.name

    @property
    def name(self) -> str:
        """Of its runs, which are kept under it."""
        tried = f" rate={self.optimizer.learning_rate:g} decay={self.optimizer.weight_decay:g}" if self.is_tuned else ""
        return f"{self.label}{tried} {self.mixer}"

    @property
    def description(self) -> str:
        """All that a result depends on. What is off is not said: a setting that comes new changes no kept run."""
        optimizer = ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self.optimizer).items() if v)
        said = repr(self).replace(repr(self.optimizer), f"OptimizerConfig({optimizer})")
        return said + (f" {self.model}" if self.model else "")

    @property
    def programs(self) -> str:
        """All that its programs depend on: learning rates are arguments."""
        optimizer = dataclasses.replace(self.optimizer, learning_rate=1.0)
        return dataclasses.replace(self, optimizer=optimizer).description
