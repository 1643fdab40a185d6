"""A prefix of 32,768 tokens at `tiny`: forward, backward and 200 decoded tokens, on a CPU with 6 GiB."""

import os
import subprocess
import sys
import textwrap

import pytest

from zoo.mixers import MIXERS

PROGRAM = """
    import resource
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from benchmarks.zoo import config_of
    from zoo.generate import generate
    from zoo.model import LanguageModel

    config = config_of({family!r}, "tiny", 1).model
    config.vocab_size = 320
    with nnx.use_eager_sharding(False):
        model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 256, (1, 32768), np.int32)
    graphdef, parameters = nnx.split(model)

    @jax.jit
    def value_and_gradient(parameters):
        def loss(parameters):
            return nnx.merge(graphdef, parameters).token_losses(tokens, tokens, jnp.ones(tokens.shape)).mean()

        return jax.value_and_grad(loss)(parameters)

    value, gradient = value_and_gradient(parameters)
    assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))
    (written,) = generate(model, tokens.tolist(), 200, temperature=0)
    assert len(written) == 200
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", MIXERS)
def test_a_prefix_of_32768_tokens_takes_less_than_6_gib(family):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment.pop("XLA_FLAGS", None)  # as users compile
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM.format(family=family))],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gib = float(done.stdout.splitlines()[-1])
    print(f"{family}: {gib:.2f} GiB")
    assert gib < 6
