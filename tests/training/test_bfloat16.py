"""bfloat16 training ends where float32 training ends: by AdamW, whose step takes a third of the time of Muon's."""

import json
import math

import pytest

from benchmarks.zoo import config_of
from zoo import metrics
from zoo.mixers import CAUSAL_MIXERS
from zoo.training import train

STEPS = 300


def final_loss(family, dtype, workdir):
    """Mean over the last 50 steps of a run at `tiny`, on small batches."""
    config = config_of(family, "tiny", STEPS)
    config.model.dtype = dtype
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 2e-3
    config.train.batch_size, config.train.context_length = 4, 128
    config.eval.batches = 1
    train(config, workdir)
    rows = [row["loss"] for row in metrics.read(workdir) if "loss" in row]
    assert json.loads((workdir / "summary.json").read_text())["step"] == STEPS and all(map(math.isfinite, rows))
    return math.fsum(rows[-5:]) / 5


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL_MIXERS)
def test_bfloat16_ends_within_3_percent_of_float32(family, tmp_path):
    float32, bfloat16 = (final_loss(family, dtype, tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    print(f"{family}: float32 {float32:.4f}, bfloat16 {bfloat16:.4f}")
    assert bfloat16 == pytest.approx(float32, rel=0.03)
