"""Generation: the state stands for the prefix, and rows do not see one another, nor who had their place before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from zoo.config import preset
from zoo.errors import UsageError
from zoo.generate import Request, Sampling, answer, generate
from zoo.generate.decoding import decode
from zoo.generate.engine import STEPS_PER_CALL
from zoo.generate.reading import prefill
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
    [pytest.param({}, marks=pytest.mark.slow), {"positions": "learned", "max_positions": 120}],
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
    programs = prefill._cache_size(), decode._cache_size()
    write(model, [prompt(64)], 17, seed=1)
    assert (prefill._cache_size(), decode._cache_size()) == programs


def test_costs_count_the_prompts_own_tokens_and_the_state():
    model = build("gla,gla,attention")
    result = generate(model, [prompt(5), prompt(9)], STEPS_PER_CALL)
    state = model.init_state(2, 32 + STEPS_PER_CALL)
    assert result.prefill_tokens == 14 and result.decode_tokens == 2 * STEPS_PER_CALL
    assert result.state_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert result.prefill_seconds > 0 and result.decode_seconds > 0


# --- A queue for the rows ---------------------------------------------------------------------------------------------


def test_a_text_is_the_same_whoever_had_its_row_before():
    """Rows of 2 for 5 prompts that end at different times, of a model with caches and states."""
    model, lengths = build("gla,gla,attention"), (3, 20, 17, 1, 30)
    requests = [
        Request(prompt(length, seed=length), max_tokens, Sampling(temperature), seed=3)
        for length, max_tokens, temperature in zip(lengths, (20, 40, 3, 17, 33), (1, 0, 1, 1, 0.5), strict=True)
    ]
    together, ended = answer(model, requests), []
    result = answer(model, requests, batch_size=2, on_end=lambda *text: ended.append(text[:3]))
    assert result.tokens == together.tokens and [len(text) for text in result.tokens] == [20, 40, 3, 17, 33]
    assert (result.decode_tokens, together.decode_tokens) == (2 * 6 * STEPS_PER_CALL, 5 * 3 * STEPS_PER_CALL)
    assert sorted(ended) == [(n, "length", text) for n, text in enumerate(result.tokens)]
    assert [text for text, *_ in ended] == [0, 2, 1, 3, 4]  # as they were finished
    left = answer(model, requests, batch_size=2, skip=lambda text: text not in (1, 3))
    assert left.tokens == [[], together.tokens[1], [], together.tokens[3], []]


def test_samples_of_a_prompt_read_it_once():
    model, first, other = build("gla"), prompt(9, seed=1), prompt(12, seed=2)
    result = generate(model, [first, other], 20, samples=3, batch_size=4, seed=3)
    assert result.prefill_tokens == 9 + 12 and len({tuple(text) for text in result.tokens}) == 6
    assert [result.tokens[0], result.tokens[3]] == generate(model, [first, other], 20, seed=3).tokens


def test_whoever_hears_a_token_may_end_its_text():
    heard = []

    def on_token(text, token):
        heard.append((text, token))
        return text == 1 and len(heard) > 20

    result = generate(build("gla"), [prompt(9, seed=1), prompt(12, seed=2)], 20, seed=3, on_token=on_token)
    assert result.ended == ["length", "stop"] and [len(text) for text in result.tokens] == [20, 5]
    assert result.tokens == [[token for text, token in heard if text == n] for n in (0, 1)]


def test_a_penalty_is_for_what_stands_in_prompt_and_text_but_not_for_the_end():
    model, first = build("gla"), prompt(9, seed=1)
    requests = [Request(first, 20, Sampling(0, repetition_penalty=penalty)) for penalty in (1e6, 1.0)]
    penalised, plain = answer(model, requests).tokens
    assert len({*first, *penalised[:12]}) == len({*first}) + 12
    assert plain == write(model, [first], 20, temperature=0)[0] and len({*first, *plain[:12]}) < len({*first}) + 12
    again = next(i for i, token in enumerate(plain) if token in first + plain[:i])  # though it was there, the likeliest
    ends = Request(first + plain[:again], 20, Sampling(0, repetition_penalty=1e6))
    assert answer(model, [ends, ends], stop_id=plain[again]).tokens == [[], []]


def test_log_probabilities_are_the_models_own():
    model, first = build("gla"), prompt(9, seed=1)
    settings = Sampling(temperature=3.0, top_k=5, repetition_penalty=1.5)
    result = generate(model, [first], 20, settings, seed=3, logprobs=3)
    graphdef, parameters = nnx.split(model)
    logits = jax.jit(lambda tokens: nnx.merge(graphdef, parameters)(tokens)[0])(jnp.asarray([first + result.tokens[0]]))
    by_model = np.asarray(logits, np.float64)[0, len(first) - 1 : -1]
    by_model -= np.log(np.exp(by_model).sum(-1, keepdims=True))
    for expected, token, chance in zip(by_model, result.tokens[0], result.chances[0], strict=True):
        assert chance.chosen == pytest.approx(expected[token], abs=1e-3)
        assert [i for i, _ in chance.likeliest] == np.argsort(-expected)[:3].tolist()
        assert [value for _, value in chance.likeliest] == pytest.approx(np.sort(expected)[:-4:-1], abs=1e-3)


# --- What cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"min_p": 1.1}, "min_p: got 1.1, expected at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected at least 1e-06"),
        ({"samples": 0}, "samples: got 0, expected at least 1"),
        ({"seed": 2**32}, "seed: got 4294967296, expected at least 0 and at most 4294967295"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1 text"),
        ({"logprobs": VOCAB + 1}, f"logprobs: got {VOCAB + 1}, expected a number of tokens from 0 to {VOCAB}"),
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


def loop_over_tokens(model, monkeypatch):
    """The equation of the loop in the program that a request runs."""
    traced = []

    def trace(*inputs, **static):
        traced.append(jax.make_jaxpr(functools.partial(decode.__wrapped__, inputs[0], **static))(*inputs[1:]))
        return decode(*inputs, **static)

    monkeypatch.setattr("zoo.generate.engine.decode", trace)
    monkeypatch.setattr("zoo.generate.engine._compile", lambda *inputs, **static: 0.0)
    write(model, [prompt(4)], 2)
    (loop,) = (e for e in traced[0].eqns if e.primitive.name == "scan" and e.params["length"] == STEPS_PER_CALL)
    return loop


@pytest.mark.parametrize("mixer", ["gla", "rwkv7"])
def test_the_loop_over_tokens_is_given_each_layers_matrices(mixer, monkeypatch):
    """On a CPU: not the stack of them, of which it would copy a layer's at every token."""
    model = build(mixer, num_layers=3, d_ff=64)
    stacked = {leaf.shape for leaf in jax.tree.leaves(nnx.state(model.units)) if leaf.ndim > 2}
    shapes = [variable.aval.shape for variable in loop_over_tokens(model, monkeypatch).invars]
    assert not stacked & set(shapes)
    assert all(shapes.count(shape[1:]) >= 3 for shape in stacked)


def test_memory_is_checked_with_the_parameters_and_their_copies(monkeypatch):
    model, asked = build("gla", num_layers=3), []
    monkeypatch.setattr("zoo.memory.check", lambda what, needed, devices, advice: asked.append(needed))
    write(model, [prompt(4)], 2)
    state = jax.tree.leaves(jax.eval_shape(lambda: model.init_state(1, 64)))
    parameters, of_units = (jax.tree.leaves(nnx.state(part, nnx.Param)) for part in (model, model.units))
    numbers = sum(leaf.size for leaf in (*state, *parameters, *of_units))
    assert asked[0] == pytest.approx(4 * numbers, rel=1e-3)
