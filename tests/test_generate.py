"""Generation: the state stands for the prefix, rows do not see one another, and tokens are drawn by the law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.config import preset
from zoo.data import tokenizer
from zoo.errors import UsageError
from zoo.generate import Sampling, generate, sample, sampler
from zoo.generate.__main__ import Printer
from zoo.generate.sampler import STEPS_PER_CALL
from zoo.model import LanguageModel

VOCAB = 64
MIXERS = ["attention", "linear_attention", "retnet", "gla", "gla,gla,attention"]


@functools.cache
def build(mixer, **settings):
    """Random weights with a lively output: large embeddings, and a head whose margins dwarf rounding."""
    config = preset("tiny").model
    config.mixer, config.vocab_size, config.d_model, config.tie_embeddings = mixer, VOCAB, 32, False
    config.num_layers = len(mixer.split(","))
    for name, value in settings.items():
        setattr(config, name, value)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 50.0
    model.head.kernel[...] *= 10.0
    return model


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def rerun_greedily(model, prompt, count):
    """The definition: the whole sequence anew for each token, without a state."""
    graphdef, parameters = nnx.split(model)
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt

    @jax.jit
    def next_token(parameters, tokens, length):
        model = nnx.merge(graphdef, parameters)
        hidden, _ = model.hidden(tokens)
        last = jax.lax.dynamic_slice_in_dim(hidden, length - 1, 1, axis=1)
        return jnp.argmax(model.logits(last)[0, 0])

    for length in range(len(prompt), len(prompt) + count):
        tokens[0, length] = next_token(parameters, tokens, length)
    return tokens[0, len(prompt) :].tolist()


def write(model, prompts, max_tokens, *, temperature=1.0, **rest):
    """The tokens alone."""
    return generate(model, prompts, max_tokens, Sampling(temperature), **rest).tokens


# The hybrid has attention's cache and a state.
@pytest.mark.parametrize(
    "mixer", [pytest.param(mixer, marks=[pytest.mark.slow] * (mixer != MIXERS[-1])) for mixer in MIXERS]
)
def test_greedy_text_after_2000_tokens_is_that_of_rerunning_the_sequence(mixer):
    model = build(mixer)
    written = write(model, [prompt(2000)], 20, temperature=0)[0]  # two calls of the program that decodes
    assert written == rerun_greedily(model, prompt(2000), 20)
    assert len(set(written)) > 4  # a text, not one token for ever


@pytest.mark.parametrize(
    "settings",
    [{}, {"positions": "learned", "max_positions": 120}],
    ids=["rope", "learned positions"],
)
def test_prompts_of_different_lengths_continue_as_if_alone(settings):
    model = build("gla,gla,attention", **settings)
    prompts = [prompt(length, seed=length) for length in (1, 9, 70, 32)]
    together = write(model, prompts, 20, temperature=0)
    assert together == [write(model, [p], 20, temperature=0)[0] for p in prompts]
    assert len({tuple(text) for text in together}) == len(prompts)


def test_a_seed_fixes_a_rows_text_whatever_the_other_rows_are():
    model = build("gla")
    first, other = prompt(9, seed=1), prompt(40, seed=2)
    alone = write(model, [first], 20, seed=3)
    assert alone == write(model, [first], 20, seed=3)
    assert alone[0] == write(model, [first, other], 20, seed=3)[0]
    assert alone != write(model, [first], 20, seed=4)
    same_prompt_twice = write(model, [first, first], 20, seed=3)
    assert same_prompt_twice[0] != same_prompt_twice[1]


def test_a_shorter_text_is_the_beginning_of_a_longer_one():
    model = build("gla")
    longest = write(model, [prompt(9)], 2 * STEPS_PER_CALL + 1, seed=3)[0]
    assert len(longest) == 2 * STEPS_PER_CALL + 1
    for count in (1, STEPS_PER_CALL, STEPS_PER_CALL + 1):
        assert write(model, [prompt(9)], count, seed=3)[0] == longest[:count]


def test_a_row_ends_at_the_stop_token_and_the_others_go_on():
    model = build("gla")
    prompts = [prompt(9, seed=1), prompt(12, seed=2)]
    free = write(model, prompts, 40, seed=3)
    stop = next(token for token in free[0] if token not in free[1])
    heard = [[], []]
    stopped = write(model, prompts, 40, seed=3, stop_id=stop, on_token=lambda row, token: heard[row].append(token))
    assert stopped == [free[0][: free[0].index(stop)], free[1]]
    assert heard == stopped


def test_generation_ends_when_all_rows_have_stopped():
    model = build("gla")
    allowed = np.arange(VOCAB) == 5
    result = generate(model, [prompt(9)], 10 * STEPS_PER_CALL, stop_id=5, allowed=allowed)
    assert result.tokens == [[]] and result.decode_tokens == STEPS_PER_CALL


def test_only_allowed_ids_that_the_tokenizer_knows_are_drawn():
    model, allowed = nnx.clone(build("gla")), np.arange(VOCAB) > 1
    model.tokenizer_size = 5  # the vocabulary is rounded up
    for temperature, allowed_too in ((0, allowed), (100.0, allowed), (100.0, None)):
        texts = write(model, [prompt(9)] * 4, 64, temperature=temperature, allowed=allowed_too)
        assert set().union(*texts) <= set(range(0 if allowed_too is None else 2, 5))
    assert set().union(*texts) == set(range(5))


def test_prompts_of_similar_lengths_share_their_programs():
    model = build("gla")
    write(model, [prompt(33)], 20)
    programs = sampler._prefill._cache_size(), sampler._decode._cache_size()
    write(model, [prompt(64)], 17, seed=1)
    assert (sampler._prefill._cache_size(), sampler._decode._cache_size()) == programs


def test_costs_count_the_prompts_own_tokens_and_the_state():
    model = build("gla,gla,attention")
    result = generate(model, [prompt(5), prompt(9)], STEPS_PER_CALL)
    state = model.init_state(2, 32 + STEPS_PER_CALL)
    assert result.prefill_tokens == 14 and result.decode_tokens == 2 * STEPS_PER_CALL
    assert result.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert result.prefill_seconds > 0 and result.decode_seconds > 0


# --- Sampling ---------------------------------------------------------------------------------------------------------


def law(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities that the settings mean, token by token (no ties in `logits`)."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    weights = {i: np.exp((logits[i] - max(logits)) / temperature) for i in order}
    total = sum(weights.values())
    kept, held = {}, 0.0
    for i in order:
        if kept and held >= top_p:
            break
        kept[i] = weights[i]
        held += weights[i] / total
    return np.array([kept.get(i, 0.0) for i in range(len(logits))]) / sum(kept.values())


def draws(logits, count, **settings):
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(jax.jit(functools.partial(sample, sampling=Sampling(**settings)))(rows, keys))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.7},
    ],
    ids=str,
)
def test_tokens_are_drawn_by_the_law(settings):
    logits, count = np.array([0.3, 2.0, -1.0, 1.2, 0.9, -3.0, 1.9]), 20_000
    expected = law(logits, **settings)
    frequency = np.bincount(draws(logits, count, **settings), minlength=len(logits)) / count
    assert (frequency[expected == 0] == 0).all()
    assert (abs(frequency - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count)).all()


# Denormal as float64 and as float32, and either side of what counts as 0.
SHARPEST = [{"temperature": t} for t in (0, 1e-320, 1e-45, 1e-38, 1e-30, 9.9e-7, 1e-6, 1e-4)]
SHARPEST += [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-50}]


@pytest.mark.parametrize("settings", SHARPEST)
def test_the_sharpest_settings_take_the_likeliest(settings):
    rows = jnp.asarray([[0.3, 2.0, -jnp.inf, 1.9], [0.3e38, 2.0e38, -jnp.inf, 1.9e38]] * 50)
    keys = jax.random.split(jax.random.key(0), len(rows))
    assert (jax.jit(functools.partial(sample, sampling=Sampling(**settings)))(rows, keys) == 1).all()


def test_among_equals_a_temperature_of_0_takes_the_first_and_none_above_it_prefers_one():
    for temperature in (0, 1e-30):
        assert (draws([-1.0, 3.0, 3.0, 3.0], 100, temperature=temperature) == 1).all()
    assert set(draws([-1.0, 3.0, 3.0, 3.0], 500, temperature=1e-5)) == {1, 2, 3}


def test_the_highest_temperature_draws_all_alike_and_nothing_impossible():
    for temperature in (1e25, 1e300):
        counts = np.bincount(draws([1e3, -1e3, 0.0, -np.inf], 3000, temperature=temperature), minlength=4)
        assert counts[3] == 0 and (abs(counts[:3] - 1000) < 120).all()


def test_the_nucleus_holds_just_enough():
    """Probabilities 1/2, 1/4, 1/8, 1/8: each top_p keeps the fewest that reach it."""
    logits = np.log([0.125, 0.5, 0.125, 0.25])
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.74, {1, 3})):
        assert set(draws(logits, 500, top_p=top_p)) == kept
    assert len(set(draws(logits, 500, top_p=0.8))) == 3
    assert set(draws(logits, 500, top_p=0.9)) == {0, 1, 2, 3}


def test_among_equals_top_k_keeps_just_k():
    assert len(set(draws([1.0, 1.0, 1.0, 1.0], 500, top_k=2))) == 2


def test_impossible_tokens_stay_impossible():
    assert set(draws([1.0, -np.inf, 1.0, -np.inf], 500, top_k=4, top_p=0.999)) == {0, 2}


# --- What cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a share in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"max_tokens": 0}, "max_tokens: got 0, expected at least 1"),
        ({"prompts": []}, "got none"),
        ({"prompts": [[1], []]}, "prompt 1: no tokens"),
        ({"allowed": np.ones(5, bool)}, r"allowed: got the shape \(5,\), expected \(64,\)"),
        ({"allowed": np.zeros(VOCAB, bool)}, "allowed: no id that the tokenizer knows is left"),
        ({"prompts": [[VOCAB]]}, f"expected 0 to {VOCAB - 1}"),
        ({"max_tokens": 112}, "9 tokens and max_tokens = 112 exceed the model's 120 learned positions"),
    ],
)
def test_bad_settings_are_named(settings, message):
    model = build("gla,gla,attention", positions="learned", max_positions=120)
    with pytest.raises(UsageError, match=message):
        sampling = Sampling(**{name: value for name, value in settings.items() if hasattr(Sampling, name)})
        request = {name: value for name, value in settings.items() if not hasattr(Sampling, name)}
        generate(model, **({"prompts": [prompt(9)], "max_tokens": 4, "sampling": sampling} | request))


def test_characters_are_printed_when_they_are_whole(capsys):
    prompt, text = "> é".encode()[:-1], "é漢".encode()[1:] + b"\xff\xe6"  # begun in the prompt; no UTF-8; unfinished
    printer = Printer([list(prompt)], tokenizer.load("bytes"))
    shown = [capsys.readouterr().out]
    for byte in text:
        printer.on_token(0, byte)
        shown.append(capsys.readouterr().out)
    printer.finish([[]])
    shown.append(capsys.readouterr().out)
    assert shown == ["> ", "é", "", "", "漢", "\ufffd", "", "\ufffd\n"]


def test_several_texts_are_printed_in_order(capsys):
    printer = Printer([list(b"one "), list(b"two ")], tokenizer.load("bytes"))
    for row, token in ((0, 65), (1, 66), (0, 67)):
        printer.on_token(row, token)
    printer.finish([[65, 67], [66]])
    assert capsys.readouterr().out == "--- 1 of 2 ---\none AC\n--- 2 of 2 ---\ntwo B\n"


def test_control_characters_are_shown_not_obeyed_unless_raw(capsys):
    prompt, tokens = list(b"a\x1b"), [list(b"[31m\n\tb\x9b"), list(b"\x07")]
    for raw in (False, True):
        printer = Printer([prompt, []], tokenizer.load("bytes"), raw)
        for token in tokens[0]:
            printer.on_token(0, token)
        printer.finish(tokens)
        output = capsys.readouterr().out
        assert ("\x1b" in output) == ("\x07" in output) == raw
    printer = Printer([prompt], tokenizer.load("bytes"))
    assert capsys.readouterr().out == "a\\x1b"
