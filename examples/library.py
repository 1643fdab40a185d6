"""Sequence Zoo as a library: build, call, train, take a mixer, restore a run, generate, continue a state.

    python examples/library.py

It needs no flags, no mesh and no context manager, and takes a few seconds on a CPU. docs/library.md explains it.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from zoo import MIXERS, LanguageModel, ModelConfig, Sizes, load_config, load_run
from zoo.generate import Sampling, TextStream, generate
from zoo.training import train

# --- Build and call ---------------------------------------------------------------------------------------------------

config = ModelConfig(mixer="retnet", num_layers=2, d_model=32, vocab_size=64)
model = LanguageModel(config, rngs=nnx.Rngs(0))
tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)  # [batch, time]
logits, _ = nnx.jit(model)(tokens)  # float32 [batch, time, vocab]
print("logits", logits.shape, logits.dtype)

# --- Train a step -----------------------------------------------------------------------------------------------------

optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, tokens):
    def mean_loss(model):
        return model.token_losses(tokens[:, :-1], tokens[:, 1:], jnp.ones(tokens[:, 1:].shape)).mean()

    loss, gradient = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradient)
    return loss


print("losses", *(f"{step(model, optimizer, tokens):.3f}" for _ in range(5)))

# --- A mixer as a layer of one's own module ---------------------------------------------------------------------------


class Classifier(nnx.Module):
    def __init__(self, rngs):
        gla = MIXERS["gla"]
        self.mix = gla(gla.config_class(num_heads=2), Sizes(d_model=32), layer_index=0, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):  # [batch, time, 32]
        y, _ = self.mix(x)
        return self.out((x + y).mean(axis=1))


classes = nnx.jit(Classifier(nnx.Rngs(0)))(jnp.ones((2, 16, 32)))
print("classes", classes.shape)

# --- A run of the trainer ---------------------------------------------------------------------------------------------

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "text.txt").write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(300)))
settings = load_config("retnet:tiny")
settings.model.num_layers, settings.model.d_model = 1, 32
settings.optimizer.name, settings.optimizer.learning_rate = "adamw", 3e-3
settings.train.steps, settings.train.batch_size, settings.train.context_length = 20, 4, 64
settings.data.source, settings.data.cache_dir = str(folder / "text.txt"), str(folder / "cache")
train(settings, folder / "run")

# --- Restore and generate ---------------------------------------------------------------------------------------------

run = load_run(folder / "run")
prompt = [run.tokenizer.separator_id, *run.tokenizer.encode("def f1(")]  # as documents begin in training
result = generate(run.model, [prompt], 32, Sampling(temperature=0.5), seed=1)
print(f"step {run.step} writes {run.tokenizer.decode(result.tokens[0])!r}")

stream = TextStream(run.tokenizer, prompt, stops=["\n\n"])
generate(run.model, [prompt], 32, seed=1, on_token=lambda _, token: stream.push(token)[1])  # True: it is over
stream.end()  # what was held back, unless a stop string was found
print(f"up to an empty line: {stream.text!r}")

# --- Continue from a state --------------------------------------------------------------------------------------------

document = jnp.asarray([prompt])
call = nnx.jit(lambda model, tokens, state: model(tokens, state=state))
state = run.model.init_state(batch_size=1, max_length=document.shape[1])
first, state = call(run.model, document[:, :4], state)
rest, state = call(run.model, document[:, 4:], state)  # goes on where the first call ended
whole, _ = call(run.model, document, run.model.init_state(1, document.shape[1]))
print("in two pieces as in one:", bool(jnp.allclose(jnp.concatenate([first, rest], axis=1), whole, atol=1e-4)))
