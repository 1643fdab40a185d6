"""HGRN2 (fla's `hgrn2`): model.layers.N.attn.{q,f,i,o}_proj, g_norm, and model.lower_bounds, a row a layer.

The mixer's own norm has epsilon 1e-5 whatever norm_eps says. Refused: no lower bounds, short convolutions, heads
wider for keys than for values.
"""

from typing import Any

from zoo.interop.families import fla
from zoo.interop.family import Fields, Only
from zoo.interop.table import linears, rule, same

EPSILON = 1e-5


def _read(fields: Fields, found: dict[str, Any]) -> None:
    width = found["d_model"]
    ratio, heads = fields.take("expand_ratio", 0, int), fields.take("num_heads", 0, int)
    if "expand_ratio" not in fields.values and not heads:
        ratio = 128
    heads = heads or (width // ratio if ratio else 0)
    if not heads or heads * (ratio or width // heads) != width:
        fields.refuse("num_heads", f"{heads} heads of {ratio} are not hidden_size = {width}, as they have to be")
    found["hgrn2.num_heads"] = max(1, heads)
    if found["norm_epsilon"] != EPSILON:
        found["hgrn2.norm_epsilon"] = EPSILON


def _write(settings: dict[str, Any], mixer: Any, fields: dict[str, Any]) -> None:
    fields["num_heads"], fields["expand_ratio"] = mixer.heads, mixer.width


FAMILIES = [
    fla.family(
        "hgrn2",
        "HGRN2ForCausalLM",
        mixer="hgrn2",
        has_attention=False,
        fields={"use_lower_bound": Only(True), "use_short_conv": Only(False), "elementwise_affine": Only(True)},
        settings={},
        rules=[
            *fla.AROUND,
            rule("model.lower_bounds", "units.blocks.0.mixer.bound"),
            *linears(fla.MIXER, "mixer.", {"q_proj": "q", "f_proj": "forget", "i_proj": "v", "o_proj": "out"}),
            *same(fla.MIXER, "mixer.", {"g_norm.weight": "norm.scale"}),
        ],
        read=_read,
        write=_write,
    )
]
