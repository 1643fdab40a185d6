"""What relates settings to each other, checked before anything is allocated."""

import dataclasses

from zoo.config.sections import Config, ModelConfig
from zoo.config.unit import MLP_LAYER, Place, mlp_width, pattern, places, positions
from zoo.errors import UsageError
from zoo.mixers import CAUSAL, MIXERS
from zoo.settings import INT_MAX, nearest, problems, shown

MAX_PATTERN = 256  # layers, each of which is compiled
MAX_PROBLEMS = 20  # lines of one error


def _model_problems(model: ModelConfig) -> list[str]:
    found = []
    layers = pattern(model)
    unknown = [name for name in dict.fromkeys(layers) if name not in MIXERS and name != MLP_LAYER]
    for name in unknown[:3]:
        known = nearest(name, [*MIXERS, MLP_LAYER])
        found.append(f"model.mixer: unknown mixer {shown(name)}; known, nearest first: {known}")
    if len(layers) > MAX_PATTERN:
        found.append(
            f"model.mixer: a pattern of {len(layers)} layers; expected at most {MAX_PATTERN}, tiled over the depth"
        )
    elif model.num_layers % len(layers):
        near = max(1, round(model.num_layers / len(layers))) * len(layers)
        found.append(
            f"model.num_layers: {model.num_layers} layers are no multiple of the {len(layers)} layers of the pattern "
            f"{shown(model.mixer)}; use {near}, or another pattern"
        )
    if found:
        return found  # what follows needs a pattern
    for family in dict.fromkeys(layers):
        if family != MLP_LAYER and model.direction not in MIXERS[family].directions:
            found.append(
                f"model.direction: {family} is {MIXERS[family].directions[0]} by its nature, and model.direction is "
                f"{model.direction}; set model.direction={MIXERS[family].directions[0]}, or another mixer"
            )
    if found:
        return found
    try:
        different = {place.name: place for place in places(model) if place.family != MLP_LAYER}
    except UsageError as error:
        return [str(error)]
    for name, place in different.items():
        where = f"model.{name}." if name == place.family else f"model.mixer: {shown(name)}: "
        mixer = MIXERS[place.family]
        wrong = mixer.check(place.settings, model.d_model) + mixer.check_direction(place.settings, model.direction)
        family = [f"{where}{problem}" for problem in wrong]
        found += family
        if not family and mlp_width(model, place) < 1 and model.mlp != "none":
            size = place.num_parameters(model.d_model) / model.d_model**2
            found.append(
                f"model.d_ff: {place.family}'s own parameters ({size:.1f} d_model^2) leave none of a layer's 12 "
                f"d_model^2 for the MLP; set model.d_ff, or model.mlp=none"
                + ", or, as they are those of both ways, model.direction_shared=true"
                * (place.copies > 1)
            )
    if model.head == "tokens" and (model.channels or model.patch > 1):
        name, value = ("channels", model.channels) if model.channels else ("patch", model.patch)
        found.append(f"model.{name}: got {value}, of numbers, and model.head=tokens reads tokens; leave it as it is")
    if model.positions == "learned" and model.max_positions == 0:
        found.append("model.max_positions: learned positions need a table; set it to at least train.context_length")
    return found


def _training_problems(config: Config, layers: list[Place]) -> list[str]:
    train, found = config.train, []
    if train.batch_size % train.accumulate_steps:
        found.append(
            f"train.accumulate_steps: {train.batch_size} sequences do not split into {train.accumulate_steps} "
            "microbatches; choose a divisor of train.batch_size"
        )
    length, context = positions(config.model, train.context_length), f"train.context_length = {train.context_length}"
    context += f" in patches of {config.model.patch}" if config.model.patch > 1 else ""
    if config.model.positions == "learned" and 0 < config.model.max_positions < length:
        found.append(
            f"model.max_positions: a table of {config.model.max_positions} is shorter than {context}; make it at least "
            "that"
        )
    for place in layers:
        if place.longest is not None and place.longest < length:
            found.append(
                f"model.{place.family}.length: {place.longest} is shorter than {context}; make it at least that"
            )
    causal, next_token = config.model.direction == CAUSAL, train.objective == "next_token"
    of_tokens = config.model.head == "tokens"
    if not (of_tokens or next_token):
        found.append(
            f"train.objective: model.head={config.model.head} predicts no tokens, masked or not; leave it at "
            "next_token, or set model.head=tokens"
        )
    if config.model.patch > 1 and train.context_length % config.model.patch:
        near = max(1, round(train.context_length / config.model.patch)) * config.model.patch
        found.append(
            f"train.context_length: {train.context_length} steps are no multiple of model.patch = "
            f"{config.model.patch}; use {near}, or another patch"
        )
    if of_tokens and next_token and not causal:
        found.append(
            "train.objective: a bidirectional model reads the next token, which it would predict; set "
            "train.objective=masked_tokens, or model.direction=causal"
        )
    if of_tokens and causal and not next_token:
        found.append(
            "train.objective: a causal model predicts a masked token from its left alone, as next_token lets it do of "
            "every token; set model.direction=bidirectional, or train.objective=next_token"
        )
    if not next_token and train.mask.masked + train.mask.random > 1:
        found.append(
            f"train.mask.random: {train.mask.random:g} and train.mask.masked = {train.mask.masked:g} are more than all "
            f"tokens to predict; use at most {1 - train.mask.masked:.4g}"
        )
    for name, rows in (("train.batch_size", train.batch_size), ("eval.batch_size", config.eval.batch_size)):
        if rows * train.context_length > INT_MAX:
            found.append(
                f"{name}: {rows} sequences of train.context_length = {train.context_length} are more than {INT_MAX} "
                "tokens in one batch; use fewer"
            )
    if train.distill.rank and not (train.distill.teacher and train.distill.stage == "logits"):
        found.append(
            f"train.distill.rank: got {train.distill.rank}, which is of a teacher's logits; set train.distill.teacher "
            "and train.distill.stage=logits, or leave it at 0"
        )
    axes = [name for name, size in dataclasses.asdict(config.mesh).items() if size == -1]
    if len(axes) > 1:
        default = "; mesh.data is -1 unless it is set" if "data" in axes else ""
        found.append(f"mesh: {' and '.join(axes)} are -1; at most one axis takes what the others leave{default}")
    return found


def unsettled(model: ModelConfig) -> list[str]:
    """Problems of a model whose sizes no data has settled."""
    found = []
    if model.head == "classes" and model.classes == 0:
        found.append("model.classes: got 0, expected the number of labels")
    if model.head == "values" and model.channels == 0:
        found.append("model.channels: got 0, expected the numbers of a step of the series")
    if model.head == "classes" and model.patch > 1 and model.channels == 0:
        found.append(f"model.patch: got {model.patch}, of numbers, and the model reads tokens; set it to 1")
    if model.head != "values" and model.vocab_size == model.channels == 0:
        found.append("model.vocab_size: got 0, expected the number of token ids, such as tokenizer.vocab_size")
    return found


def validate(config: Config) -> None:
    """Check everything that needs neither files nor devices: each setting by itself, then what relates them.

    Raises:
      UsageError: with every problem found, one a line.
    """
    refuse(problems(config))
    of_model = _model_problems(config.model)
    refuse(of_model + _training_problems(config, [] if of_model else places(config.model)))


def validate_model(model: ModelConfig) -> None:
    """`validate` of the model alone."""
    refuse(problems(model, "model.") or _model_problems(model))


def refuse(found: list[str]) -> None:
    """UsageError with the problems found, one a line; none is fine."""
    if found:
        raise UsageError("\n       ".join(found[:MAX_PROBLEMS]))
