"""Turns are one text, a turn can be taken back, and a state comes back from its file or is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from zoo.checkpoints import Run
from zoo.config import preset
from zoo.data import tokenizer
from zoo.errors import RunError, UsageError
from zoo.generate import Request, Sampling, answer, reading, state_file
from zoo.generate.session import Session
from zoo.mixers import CAUSAL_MIXERS
from zoo.model import LanguageModel

BYTES = tokenizer.load("bytes")
PLAIN, GREEDY = Sampling(), Sampling(0.0)


def reopened(mixer="gla,attention,attention@window=8", **settings):
    config = preset("tiny")
    config.model.mixer, config.model.vocab_size, config.model.d_model = mixer, 257, 32
    config.model.num_layers, config.model.tie_embeddings = len(mixer.split(",")), False
    for name, value in settings.items():
        setattr(config.model, name, value)
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 50.0
    model.head.kernel[...] *= 10.0
    return Run(model, BYTES, config, 7, "f" * 64)


@pytest.fixture(scope="module")
def run():
    return reopened()


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A file, and the context in it."""
    path = tmp_path_factory.mktemp("states") / "x.state"
    context = reading.read(run.model, reading.empty(run.model), [256, *b"a text read before"])
    state_file.save(str(path), context, run)
    return path, context


def turn(session, said, max_tokens=5, sampling=PLAIN, **rest):
    told = []
    session.turn(list(said), max_tokens, sampling, 3, tell=told.append, **rest)
    return "".join(told)


def test_turns_are_one_text_of_what_was_said_and_told(run):
    session = Session(run)
    first, second = turn(session, b"one "), turn(session, " é".encode())
    assert list(session.context.tokens[:5]) == [256, *b"one "]
    assert BYTES.decode(session.context.tokens) == f"one {first} é{second}"
    anew = reading.read(run.model, reading.empty(run.model), session.context.tokens)
    np.testing.assert_allclose(session.context.logits, anew.logits, rtol=1e-3, atol=1e-2)
    assert turn(session, b"!", max_tokens=0, echo=True) == "!" and session.context.tokens[-1] == ord("!")


def test_what_a_stop_string_cut_off_is_not_in_the_state(run):
    free = Session(run)
    text = turn(free, b"one ", sampling=GREEDY)
    stop = text[2:4]
    session = Session(run)
    assert turn(session, b"one ", sampling=GREEDY, stops=[stop]) == text[: text.index(stop)]
    assert BYTES.decode(session.context.tokens) == "one " + text[: text.index(stop)]


def test_an_undone_turn_is_as_if_it_had_never_been(run):
    session, hot = Session(run), Sampling(20.0)  # at which draws differ from turn to turn
    turn(session, b"one ")
    before = session.context
    text = turn(session, b"two ", sampling=hot)
    assert session.undo() and session.context is before and turn(session, b"two ", sampling=hot) == text
    session.reset()
    assert session.context.tokens == () and session.undo() and len(session.context.tokens) > 5
    assert session.undo() and session.undo() and not session.undo() and session.context.tokens == ()


def test_ctrl_c_ends_a_turn_and_what_was_told_stands(run):
    session, told = Session(run), []

    def tell(text):
        told.append(text)
        if len("".join(told)) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.turn(list(b"one "), 5, PLAIN, 3, tell=tell)
    assert BYTES.decode(session.context.tokens) == "one " + "".join(told)


def test_a_state_comes_back_from_its_file_to_the_last_bit(run, saved):
    path, context = saved
    back = state_file.load(str(path), run)
    assert back.tokens == context.tokens
    again = reading.resized(run.model, back, context.capacity)
    jax.tree.map(np.testing.assert_array_equal, again.state, context.state)
    assert turn(Session(run, back), b"!") == turn(Session(run, context), b"!")
    assert path.stat().st_size < 60_000  # of 19 tokens, whatever room the cache had


def test_a_state_in_bfloat16_comes_back_to_the_last_bit(tmp_path):
    run = reopened("attention", dtype="bfloat16")
    context = reading.read(run.model, reading.empty(run.model), [256])
    state_file.save(str(tmp_path / "x"), context, run)
    back = reading.resized(run.model, state_file.load(str(tmp_path / "x"), run), context.capacity)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(back.state)} == {"bfloat16", "int32"}
    jax.tree.map(np.testing.assert_array_equal, back.state, context.state)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", CAUSAL_MIXERS)
def test_a_state_of_any_mixer_comes_back_to_the_last_bit(mixer, tmp_path):
    """Of random numbers, and of a model without parameters: what a state holds is its shape's and dtype's."""
    config = preset("tiny")
    config.model.mixer, config.model.vocab_size, config.model.dtype = mixer, 320, "bfloat16"
    model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    run, rng = Run(model, BYTES, config, 7, "f" * 64), np.random.default_rng(0)
    empty = reading.empty(model, 40)
    state = jax.tree.map(lambda leaf: rng.normal(0, 100, leaf.shape).astype(leaf.dtype), empty.state)
    context = reading.resized(model, empty._replace(state=state, tokens=tuple(range(30))), 30)
    state_file.save(str(tmp_path / "x"), context, run)
    back = state_file.load(str(tmp_path / "x"), run)
    jax.tree.map(np.testing.assert_array_equal, back, context)
    assert [leaf.dtype for leaf in jax.tree.leaves(back.state)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def test_prompts_go_on_from_a_context_as_from_its_tokens(run, saved):
    _, context = saved
    ends = [list(b" and"), list(b", which")]
    after = answer(run.model, [Request(end, 8, GREEDY) for end in ends], context=context, batch_size=1)
    whole = answer(run.model, [Request([*context.tokens, *end], 8, GREEDY) for end in ends])
    assert after.tokens == whole.tokens and after.prefill_tokens == sum(map(len, ends))


def test_a_state_of_another_model_is_refused_by_what_differs(run, saved):
    path, _ = saved
    others = {
        "parameters are of step 7, and these are of step 8": dataclasses.replace(run, step=8, fingerprint="e" * 64),
        "other parameters": dataclasses.replace(run, fingerprint="e" * 64),
        r"model.norm_epsilon: 1e-05 there, 0.001 here": reopened(norm_epsilon=1e-3),
        "model.mixer: 'gla,attention,.*' there, 'gla' here; model.num_layers: 3 there, 1 here": reopened("gla"),
    }
    for message, other in others.items():
        with pytest.raises(UsageError, match=message):
            state_file.load(str(path), other)
    state_file.load(str(path), reopened(remat="full"))  # of which no state depends


def damaged(content, kind):
    header = 8 + int.from_bytes(content[:8], "little")
    return {
        "cut": content[:-10],
        "empty": b"",
        "a flipped byte": content[:-10] + bytes([content[-10] ^ 1]) + content[-9:],
        "a flipped byte of tokens": content[:header] + bytes([content[header] ^ 1]) + content[header + 1 :],
        "another step": content.replace(b'\\"step\\": 7', b'\\"step\\": 8'),
        "another format": content.replace(b"zoo state 1", b"zoo state 2"),
        "other arrays": safetensors.numpy.save(
            {"tokens": np.ones(3, np.int32)}, {"format": "sequence-zoo state 1", "belongs_to": "{}", "sha256": ""}
        ),
        "no state": safetensors.numpy.save({"x": np.ones(3)}),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "no state, or a damaged one"),
        ("empty", "no state, or a damaged one"),
        ("a flipped byte", "differs from its digest"),
        ("a flipped byte of tokens", "differs from its digest"),
        ("another step", "differs from its digest"),
        ("another format", "no state of zoo.generate"),
        ("other arrays", "no state, or a damaged one"),
        ("no state", "no state of zoo.generate"),
    ],
)
def test_a_damaged_state_is_refused(run, saved, kind, message, tmp_path):
    content = saved[0].read_bytes()
    (tmp_path / "x").write_bytes(damaged(content, kind))
    with pytest.raises(UsageError, match=message) as error:
        state_file.load(str(tmp_path / "x"), run)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_no_file_is_refused(run, saved, tmp_path):
    for path, message in (
        (tmp_path, "it is a directory"),
        (tmp_path / "none", "No such file"),
        ("/dev/zero", "device"),
    ):
        with pytest.raises(UsageError, match=message):
            state_file.load(str(path), run)
    with pytest.raises(RunError, match="cannot be written"):
        state_file.save(str(tmp_path / "none" / "x"), saved[1], run)
    with pytest.raises(UsageError, match="nothing was read yet"):
        state_file.save(str(tmp_path / "x"), reading.empty(run.model), run)
    assert not list(tmp_path.iterdir())
