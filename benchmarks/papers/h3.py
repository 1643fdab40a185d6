"""H3's two synthetic tasks (arXiv:2212.14052), at full budget."""

from collections.abc import Iterator

from benchmarks.papers.set_up import Setup
from zoo.config import OptimizerConfig
from zoo.data.synthetic import make

TRAIN_ROWS = 5000


def setups() -> Iterator[Setup]:
    published = {"attention": ("100.0", "100.0"), "h3": ("100.0", "99.8"), "s4d": ("35.6", "86.0")}
    tasks = [
        (make("induction_heads", vocab_size=20, length=30), 400, "cosine", 0.1),
        (make("associative_recall", vocab_size=10, length=20), 200, "linear", 0.0),
    ]
    settings = {
        "attention": {"num_heads": 1},
        "h3": {"state_dim": 64, "discretization": "bilinear"},
        "s4d": {"state_dim": 64, "init": "inv", "n_ssm": 1},
    }
    for number, (task, epochs, decay, final) in enumerate(tasks):
        for mixer, figures in published.items():
            steps = epochs * (TRAIN_ROWS // 32)
            yield Setup(
                task,
                mixer,
                figures[number],
                steps,
                32,
                OptimizerConfig(
                    learning_rate=5e-4,
                    schedule=decay,
                    warmup_steps=steps // 10,
                    final_fraction=final,
                    b2=0.999,
                    clip_norm=0.0,
                ),
                rows=TRAIN_ROWS,
                d_ff=128,
                embedding_dropout=0.1,
                init_std=0.0 if mixer == "attention" else 0.02,
                as_gpt2=True,
                undecayed=("log_dt", "log_rate", "frequency", "b_real", "b_imag", "b"),
                settings=settings[mixer],
            )
