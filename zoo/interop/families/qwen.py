"""Qwen-2 and Qwen-3 (transformers' `qwen2`, `qwen3`): Llama with biases on q, k, v, or norms on each head's q and k.

Refused: sliding windows, which are of some of the layers there.
"""

import dataclasses
from typing import Any

from zoo.interop.families import llama, rope
from zoo.interop.family import Field, Fields


def _read_qwen(fields: Fields, found: dict[str, Any]) -> None:
    llama.read_heads(fields, found)
    rope.read(fields, found)
    windowed = fields.only("use_sliding_window", False)
    if not windowed:  # what these say then is not used
        fields.take("sliding_window", None, int), fields.take("max_window_layers", None, int)
    if set(layers := fields.take("layer_types", [])) - {"full_attention"}:
        fields.refuse("layer_types", f"got {', '.join(sorted(map(str, set(layers))))}; all have to be full_attention")


def _write_qwen(settings: dict[str, Any], mixers: list[Any], fields: dict[str, Any]) -> None:
    llama.write_heads(mixers[0], fields)
    rope.write(settings, fields)
    fields["use_sliding_window"] = False


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
