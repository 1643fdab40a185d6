"""Weights in and out: models of transformers, of flash-linear-attention and of their authors' packages.

    families/    one file a family: fields of config.json and our settings, the table of tensors, what it refuses
    family       what such a file declares, and how a config is read, written and compared by it
    table        rules from tensors to parameters, and back
    files        folders of safetensors, opened with distrust
    importing, exporting, tokenizer, card      the two commands (docs/interop.md)

Only safetensors, JSON and tokenizer.json are read; no pickle, and no code that a folder brings.
"""

from zoo.interop.exporting import Exported, export_run
from zoo.interop.importing import Imported, import_model

__all__ = ["Exported", "Imported", "export_run", "import_model"]
