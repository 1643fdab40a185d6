"""What many chips ask for, by formula."""

import math

import pytest

from benchmarks import at_scale
from zoo import flops
from zoo.config_files import load_config


def numbers(*flags):
    config = load_config("gla:1.3b")
    config.model.vocab_size = 32_000
    return config, at_scale.numbers(config, at_scale.parser().parse_args(flags))


def test_the_formulas():
    config, n = numbers("--chips=1024", "--mfu=0.5", "--chip=v5e", "--every=1")
    assert n["tokens"] == pytest.approx(1024 * 197e12 * 0.5 / flops.train_flops_per_token(config.model, 2048))
    assert n["read"] == 2 * n["tokens"] and n["hosts"] == 256
    assert n["checkpoint"] == 12 * flops.num_parameters(config.model)  # AdamW: three numbers of four bytes
    assert n["between_failures"] == pytest.approx(50_000 * 3600 / 1024)
    assert n["every"] == pytest.approx(math.sqrt(2 * n["wait"] * n["between_failures"]))
    assert n["storage"] * n["every"] == pytest.approx(n["checkpoint"])
    assert n["restart"] == pytest.approx(300 + n["checkpoint"] / 10e9)
    lost = [numbers("--chip=v5e", f"--every={n['every'] * share}")[1]["lost"] for share in (1.0, 1.5)]
    assert lost[0] < lost[1]


def test_the_command(capsys):
    at_scale.main(["--config=gla:tiny", "--chips=8"])
    assert capsys.readouterr().out.startswith("8 v5p (2 hosts), ")
    with pytest.raises(SystemExit):
        at_scale.main(["--config=glb:tiny"])
    assert "error: --config=glb:tiny: no config of that name; did you mean gla" in capsys.readouterr().err
