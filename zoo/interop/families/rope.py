"""Rotary positions in a config.json of transformers: `rope_parameters`, or before release 5 `rope_theta`,
`rope_scaling` and `partial_rotary_factor`; kinds default, linear, llama3 and yarn. Contexts are in tokens.
"""

from typing import Any

from zoo.interop.family import Fields
from zoo.settings import shown

SCALING = "attention.rope_scaling."
# Their name of each number of a kind: ours, and what an absent one means (None: it has to be there).
NUMBERS: dict[str, dict[str, tuple[str, Any]]] = {
    "default": {},
    "linear": {"factor": ("factor", None)},
    "llama3": {
        "factor": ("factor", None),
        "low_freq_factor": ("low_frequency_factor", None),
        "high_freq_factor": ("high_frequency_factor", None),
        "original_max_position_embeddings": ("original_context", None),
    },
    "yarn": {
        "factor": ("factor", None),
        "original_max_position_embeddings": ("original_context", None),
        "beta_fast": ("beta_fast", 32.0),
        "beta_slow": ("beta_slow", 1.0),
        "attention_factor": ("attention_factor", 0.0),
        "truncate": ("truncate", True),
    },
}


def read(fields: Fields, found: dict[str, Any], fraction: float | None = None) -> None:
    """The settings of `attention` that say how q and k are turned.

    Args:
      fraction: of a head, where nothing says; None: the package's class turns all of it, whatever the config says.
    """
    outer = fields.take("rope_theta", 10_000.0), fields.take("partial_rotary_factor", fraction or 1.0)
    name = "rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling"
    fields.take("rope_parameters", {}, dict), fields.take("rope_scaling", {}, dict)
    inner = fields.section(name)
    found["attention.rope_base"] = inner.take("rope_theta", outer[0])
    found["attention.rotary_fraction"] = share = inner.take("partial_rotary_factor", outer[1])
    if fraction is None and share != 1.0:
        fields.refuse("partial_rotary_factor", f"got {shown(share)}, which the package does not read for this model")
    kind = inner.take("rope_type", inner.take("type", "default"))
    if kind not in NUMBERS:
        inner.refuse("rope_type", f"{shown(kind)}, of which only {', '.join(NUMBERS)} can be expressed")
        fields.take("original_max_position_embeddings", 0)
        return
    if kind != "default":
        found[f"{SCALING}kind"] = kind
    before = fields.take("max_position_embeddings", 0)
    for theirs, (ours, default) in NUMBERS[kind].items():
        if theirs == "original_max_position_embeddings":  # absent, it is what the config itself says
            value = inner.take(theirs, fields.take(theirs, before))
        else:
            value = inner.take(theirs, 0.0 if default is None else default)
        if default is None and not value:
            inner.refuse(theirs, f"is missing, which {kind} needs")
        found[SCALING + ours] = value
    for left in inner.rest():
        if inner.values[left] is not None:
            inner.refuse(left, f"{shown(inner.values[left])} cannot be expressed with {kind}")


def write(settings: dict[str, Any], fields: dict[str, Any]) -> None:
    """`rope_parameters`, for release 5, and what earlier ones read."""
    kind = settings[f"{SCALING}kind"]
    kind = "default" if kind == "none" else kind
    numbers = {theirs: settings[SCALING + ours] for theirs, (ours, _) in NUMBERS[kind].items()}
    numbers = {name: value for name, value in numbers.items() if not (name == "attention_factor" and value == 0.0)}
    base, fraction = settings["attention.rope_base"], settings["attention.rotary_fraction"]
    scaling = {"rope_type": kind} | numbers
    fields["rope_theta"] = base
    fields["rope_scaling"] = scaling if numbers else None
    fields["rope_parameters"] = {"rope_theta": base} | scaling
    fields["partial_rotary_factor"] = fields["rope_parameters"]["partial_rotary_factor"] = fraction
