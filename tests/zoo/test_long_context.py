"""Long sequences at `tiny`, forward and backward, on a CPU with little memory; a prefix of 32,768 tokens decodes on."""

import os
import subprocess
import sys
import textwrap

import pytest

from zoo.mixers import CAUSAL_MIXERS

PROGRAM = """
    import resource
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from benchmarks.zoo import config_of
    from zoo.generate import Sampling, generate
    from zoo.model import LanguageModel

    config = config_of({family!r}, "tiny", 1).model
    config.vocab_size, config.remat = 320, {remat!r}
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 256, (1, {length}), np.int32)
    graphdef, parameters = nnx.split(model)

    @jax.jit
    def value_and_gradient(parameters):
        def loss(parameters):
            return nnx.merge(graphdef, parameters).token_losses(tokens, tokens, jnp.ones(tokens.shape)).mean()

        return jax.value_and_grad(loss)(parameters)

    value, gradient = value_and_gradient(parameters)
    assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    if {decoded}:
        (written,) = generate(model, tokens.tolist(), {decoded}, Sampling(temperature=0)).tokens
        assert len(written) == {decoded}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def gib(family, length, decoded=0, remat="none"):
    """The most memory that a process held."""
    settings = {"family": family, "length": length, "decoded": decoded, "remat": remat}
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment.pop("XLA_FLAGS", None)  # as users compile
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM).format(**settings)],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = float(done.stdout.splitlines()[-1])
    print(f"{family}: {found:.2f} GiB")
    return found


# What keeps more of a token: 272 features a head where others have 64 numbers, and their sums z; values twice as wide
# as the model, or two keys and values; and q, k and v before and after a convolution.
MORE = {"performer": 8, "gated_delta_net": 7, "kda": 7, "gated_delta_product": 9}


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL_MIXERS)
def test_a_prefix_of_32768_tokens_takes_less_than_6_gib(family):
    assert gib(family, 32768, decoded=200) < MORE.get(family, 6)


@pytest.mark.slow
def test_mamba_of_65536_tokens_takes_less_than_8_gib():
    assert gib("mamba", 65536, remat="full") < 8  # kept for the backward pass, 3 layers of width 256 take 10.7 GiB
