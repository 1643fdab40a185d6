"""Qwen-2 and Qwen-3 (transformers' `qwen2`, `qwen3`): Llama with biases on q, k, v, or norms on each head's q and k.

Some layers may have a window: the pattern says it by places. Refused: windows of several sizes.
"""

import dataclasses
from typing import Any

from zoo.interop.families import llama, rope
from zoo.interop.family import Field, Fields, shortest_pattern

FULL, SLIDING = "full_attention", "sliding_attention"


def _read_qwen(fields: Fields, found: dict[str, Any]) -> None:
    llama.read_heads(fields, found)
    rope.read(fields, found)
    _read_windows(fields, found)


def _read_windows(fields: Fields, found: dict[str, Any]) -> None:
    """Layers of sliding_attention: listed, or those from max_window_layers on."""
    count, windowed = found["num_layers"], fields.take("use_sliding_window", False)
    window = fields.take("sliding_window", 0 if "sliding_window" in fields.values else 4096)
    first = fields.take("max_window_layers", 28)
    first = first if windowed and window else count
    layers = fields.take("layer_types", [SLIDING if i >= first else FULL for i in range(count)])
    if len(layers) != count or not all(layer in (FULL, SLIDING) for layer in layers):
        fields.refuse("layer_types", f"{len(layers)} layers for {count}, expected {FULL} or {SLIDING} of each")
    elif SLIDING in layers and not (windowed and window):
        fields.refuse(
            "layer_types", f"{SLIDING}, and no window: use_sliding_window or sliding_window says there is none"
        )
    elif SLIDING in layers:
        found["mixer"] = shortest_pattern(
            [f"attention@window={window}" if layer == SLIDING else "attention" for layer in layers]
        )


def _write_windows(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    windows = [mixer.window for mixer in mixers]
    fields["use_sliding_window"] = any(windows)
    fields["sliding_window"] = next(filter(None, windows), None)
    fields["layer_types"] = [SLIDING if w else FULL for w in windows] * (settings["num_layers"] // len(windows))


def _write_qwen(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    llama.write_heads(mixers[0], fields)
    rope.write(settings, fields)
    _write_windows(settings, mixers, fields)


def _read_qwen2(fields: Fields, found: dict[str, Any]) -> None:
    _read_qwen(fields, found)
    llama.set_biases(found, "q,k,v")


def _read_qwen3(fields: Fields, found: dict[str, Any]) -> None:
    _read_qwen(fields, found)
    llama.set_biases(found, "q,k,v,out" if fields.take("attention_bias", False) else "")


def _write_qwen3(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    _write_qwen(settings, mixers, fields)
    fields["attention_bias"] = bool(settings.get("attention.biases"))


FIELDS = llama.LLAMA.fields | {
    "vocab_size": Field("vocab_size", 151936),
    "intermediate_size": Field("d_ff", 22016),
    "num_key_value_heads": Field("attention.num_kv_heads", 32),
}
QWEN2 = dataclasses.replace(
    llama.LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields={name: field for name, field in FIELDS.items() if name != "head_dim"},
    read=_read_qwen2,
    write=_write_qwen,
)
QWEN3 = dataclasses.replace(
    llama.LLAMA,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=FIELDS | {"head_dim": Field("attention.head_dim", 128)},
    settings=llama.LLAMA.settings | {"attention.qk_norm": True},
    read=_read_qwen3,
    write=_write_qwen3,
)
FAMILIES = [QWEN2, QWEN3]
