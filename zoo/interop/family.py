"""What a family's file declares: fields of config.json and our settings, the table of tensors, and what it refuses.

A field is a `Field` that says what one of our settings does, or an `Only`: values beside which there is nothing that
we could do. What is no renaming is a function, `read` (their fields to our settings) and `write` (back). What they
leave out shows by itself: what `write` makes of a model has to `read` as the same model again (`unsaid`).
"""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from zoo import config as zoo_config
from zoo.config import ModelConfig, mlp_width
from zoo.errors import UsageError
from zoo.interop.table import Rule, multiplied
from zoo.model import LanguageModel
from zoo.settings import declarations, shown
from zoo.terminal import brief

SETTINGS = dict(declarations(ModelConfig))
_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}

# Fields that say nothing about the function of a trained model: of training, of serving, of the file itself.
HARMLESS = {
    "architectures", "auto_map", "bos_token_id", "chunk_size", "chunk_size_feed_forward", "classifier_dropout", "dtype",
    "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "label2id", "max_position_embeddings", "model_type", "output_attentions", "output_hidden_states", "pad_token_id",
    "problem_type", "return_dict", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version",
    "unk_token_id", "use_cache", "_name_or_path", "_attn_implementation_autoset", "attention_dropout", "resid_pdrop",
    "embd_pdrop", "hidden_dropout", "pretraining_tp", "num_logits_to_keep",
    # of what computes it
    "fuse_cross_entropy", "fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "attn_mode", "use_l2warp",
    "residual_in_fp32", "use_mamba_kernels", "use_mambapy", "use_associative_scan", "rms_norm", "fused_add_norm",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Field:
    """A setting of ours under another name; `default`: where config.json says nothing (None: our own)."""

    setting: str
    default: Any = None


@dataclasses.dataclass(frozen=True, init=False)
class Only:
    """What alone can be expressed; the first is what an absent field means."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)


class Fields:
    """A config.json that is being read. Whoever takes a field knows what it means; what is left, nobody does."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self.values, self.prefix, self.problems = dict(values), prefix, []
        self._taken: set[str] = set()

    def take(self, name: str, default: Any, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value, or `default` where it is absent or null; of another type than `kind` (default's): a problem."""
        self._taken.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind or type(default),)
        if float in kinds and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) not in kinds:
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            self.refuse(name, f"got {shown(value)}, expected {expected}")
            return default
        return value

    def only(self, name: str, *values: Any) -> Any:
        """A problem unless the value is one of these; what it is, the first where it is absent."""
        self._taken.add(name)
        value = self.values.get(name, values[0])
        if value is None and values[0] in (False, 0):
            value = values[0]
        if not any(value == other and type(value) is type(other) for other in values):
            *_, last = map(shown, values)
            others = [shown(other) for other in values[:-1]]
            self.refuse(name, f"{shown(value)}, of which only {', '.join([*others, last])} can be expressed")
        return value

    def refuse(self, name: str, problem: str) -> None:
        self.problems.append(f"{brief(self.prefix + name, 80)}: {brief(problem, 400)}")

    def section(self, name: str) -> "Fields":
        """Fields of an object in it; absent, of none. Its problems are `name`'s."""
        inner = Fields(self.take(name, {}, dict), f"{self.prefix}{name}.")
        inner.problems = self.problems
        return inner

    def rest(self, known: Iterable[str] = ()) -> list[str]:
        return [name for name in self.values if name not in self._taken and name not in known]


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      name: their model_type.
      architecture: their class of language models, which an export names.
      fields: of config.json.
      settings: ours, which are the same for all its models; `mixer` where it is one family in every layer.
      rules: the table, or a function of our model that makes it, where sizes cut tensors.
      read: (their fields, our settings so far), which it completes.
      write: (our settings, the mixers of the repeating unit, their fields so far), which it completes.
      unread: regular expressions of tensors that a file may hold and that nothing needs: buffers.
      renamed: regular expressions of names that some files have, and the table's name in their place.
      factors: (their fields, our model) -> what of our parameters an import multiplies, by `ours` of the rules: numbers
        that a config has and our model does not.
      harmless: fields beside HARMLESS that change nothing.
      fixed: fields that an export writes whatever the model is, where their default would be another.
      hybrid: mixers of its layers, where they differ.
      exports: whether it is a format to write.
    """

    name: str
    architecture: str
    fields: Mapping[str, Field | Only]
    settings: Mapping[str, Any]
    rules: Sequence[Rule] | Callable[[ModelConfig], Sequence[Rule]]
    read: Callable[[Fields, dict[str, Any]], None] | None = None
    write: Callable[[dict[str, Any], list[Any], dict[str, Any]], None] | None = None
    unread: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    factors: Callable[[Mapping[str, Any], ModelConfig], Mapping[str, float]] | None = None
    harmless: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hybrid: tuple[str, ...] = ()
    exports: bool = True

    @property
    def mixers(self) -> tuple[str, ...]:
        """Of its layers."""
        return self.hybrid or (self.settings["mixer"],)

    def rules_of(self, model: ModelConfig, values: Mapping[str, Any] | None = None) -> Sequence[Rule]:
        """The table; `values`: of the config.json that weights are imported with."""
        rules = self.rules(model) if callable(self.rules) else self.rules
        if self.factors is None or values is None:
            return rules
        factors = {name: factor for name, factor in self.factors(values, model).items() if factor != 1.0}
        return [
            dataclasses.replace(one, transform=multiplied(one.transform, [factors.get(name, 1.0) for name in one.ours]))
            if any(name in factors for name in one.ours)
            else one
            for one in rules
        ]


# --- Their config to ours ---------------------------------------------------------------------------------------------


def to_model(family: Family, values: Mapping[str, Any], ignore: Iterable[str] = ()) -> tuple[ModelConfig, list[str]]:
    """Our model, and the fields that were ignored.

    Raises:
      UsageError: naming every field that cannot be expressed, that is none, or that is out of range.
    """
    fields, found, broken = Fields(values), dict(family.settings), False
    for name, field in family.fields.items():
        if isinstance(field, Only):
            fields.only(name, *field.values)
            continue
        declared = SETTINGS.get(field.setting)
        if declared is None:
            fields.refuse(name, f"needs the setting model.{field.setting}, which there is not")
            continue
        # Null is "nothing of it" where 0 means that here; absent is their default. A 0 of theirs is a number.
        default = (
            declared.default if field.default is None or (name in values and 0 in declared.special) else field.default
        )
        value = fields.take(name, default, declared.kind)
        given = values.get(name) is not None
        if problem := (dataclasses.replace(declared, special={}) if given else declared).problem(value):
            fields.refuse(name, problem)
        broken |= bool(problem)
        found[field.setting] = value
    if not broken and family.read:  # it computes with them
        try:
            family.read(fields, found)
        except (TypeError, ValueError, ArithmeticError, KeyError, IndexError) as error:  # of what nests in a field
            if isinstance(error, UsageError):
                raise
            broken = True
            fields.problems.append(f"a field holds what it cannot ({type(error).__name__}: {brief(error)})")
    unknown, ignore = fields.rest(HARMLESS | set(family.harmless)), set(ignore)
    on = [name for name in unknown if values[name] not in (None, False, 0, "", [], {}) and name not in ignore]
    for name in on if not broken else ():  # else nobody has taken what is left
        fields.refuse(name, f"{shown(values[name])} is not known here; --ignore={brief(name, 80)} goes on without it")
    for name in sorted(ignore.difference(unknown)) if not broken else ():
        what = "is read, and cannot be ignored" if name in values else "there is no such field"
        fields.refuse(name, f"{what}; leave it out of --ignore")
    zoo_config.refuse(fields.problems)
    model = with_settings(ModelConfig(), found)
    zoo_config.validate_model(model)
    return model, unknown


def with_settings(model: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """A copy with these, by dotted names. UsageError: there is no such setting."""
    model = copy.deepcopy(model)
    for name, value in settings.items():
        *sections, last = name.split(".")
        section = model
        for part in sections:
            section = getattr(section, part, None)
        if not hasattr(section, last):
            raise UsageError(f"this model needs the setting model.{name}={shown(value)}, which there is not")
        setattr(section, last, value)
    return model


# --- And back ---------------------------------------------------------------------------------------------------------


def to_fields(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Their fields, as far as the family knows; whether that is all, `unsaid` tells."""
    settings = zoo_config.leaves(model)
    settings["d_ff"] = mlp_width(model, zoo_config.places(model)[-1])
    fields = {
        name: field.values[0] if isinstance(field, Only) else settings.get(field.setting)
        for name, field in family.fields.items()
    }
    if family.write:
        blocks = _abstract(model).units.blocks
        family.write(settings, [block.mixer if block.has_mixer else None for block in blocks], fields)
    return fields | family.fixed


def unsaid(family: Family, model: ModelConfig) -> list[str]:
    """What of `model` the family's fields do not say, as "model.window: 64, None"; nothing: it is the same model."""
    try:
        again, _ = to_model(family, to_fields(family, model))
    except UsageError as error:
        return [line.strip() for line in str(error).splitlines()]
    again = dataclasses.replace(again, **{name: getattr(model, name) for name in (*zoo_config.HOW, "dropout", "dtype")})
    here = _function(model)
    if here == _function(again):
        return []
    before, after = zoo_config.leaves(model), zoo_config.leaves(again)
    found = []
    for name in before:
        if before[name] != after[name] and _function(with_settings(again, {name: before[name]})) != _function(again):
            found.append(f"model.{name}: {shown(before[name])}, of which it has {shown(after[name])}")
    return found or ["several settings of the model together"]


def _abstract(model: ModelConfig) -> LanguageModel:
    return _abstract_of(json.dumps(dataclasses.asdict(model)))


@functools.lru_cache(16)
def _abstract_of(text: str) -> LanguageModel:
    model = zoo_config.from_json(json.dumps({"model": json.loads(text)})).model
    return nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))


def _function(model: ModelConfig) -> dict[Any, Any] | str:
    """All that tells models apart which compute different things: classes, numbers and shapes in them."""
    try:
        abstract = _abstract(model)
    except (UsageError, ValueError) as error:
        return str(error)
    found: dict[Any, Any] = {}
    _walk(abstract, (), found)
    return found


def _walk(node: Any, path: tuple[Any, ...], found: dict[Any, Any]) -> None:
    if isinstance(node, nnx.Variable):
        found[path] = tuple(node.shape)
    elif isinstance(node, nnx.Module):
        found[path] = type(node).__qualname__
        for name, value in vars(node).items():
            if not name.startswith("_") and name not in ("tokenizer_size", "saved_names", "pattern", "num_units"):
                _walk(value, (*path, name), found)
    elif isinstance(node, list | tuple | nnx.List):
        for i, value in enumerate(node):
            _walk(value, (*path, i), found)
    elif isinstance(node, int | float | str | bool | type(None)):
        found[path] = node
    elif isinstance(node, jax.Array | np.ndarray):
        found[path] = node.shape


def shortest_pattern(layers: Sequence[str]) -> str:
    """What, repeated, makes these layers, as `model.mixer` has it."""
    count = len(layers)
    period = next(p for p in range(1, count + 1) if count % p == 0 and list(layers) == list(layers[:p]) * (count // p))
    return ",".join(layers[:period])


def ratio(part: int, whole: int) -> float:
    """part / whole, such that int(ratio * whole) is `part` again."""
    found = part / whole
    return found if int(found * whole) == part else math.nextafter(found, math.inf)
