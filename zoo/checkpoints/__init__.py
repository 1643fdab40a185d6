"""Checkpoints that can be trusted: written in the background, digested when complete, passed over when damaged.

    WORKDIR/checkpoints/<step>/params/, opt/, meta/     Orbax items
    WORKDIR/checkpoints/<step>/DIGEST.json              sha256 of every file above, written last

Orbax restores an array with a flipped byte without a word, so a checkpoint counts only if its digest stands and
agrees, and if its evaluation loss is finite. A save cut off at any moment leaves no digest, and an older checkpoint is
deleted only after a newer one has its digest: there is always a good one to go back to. Folders and files of other
names are left alone.
"""

from zoo.checkpoints.checkpointer import Checkpoint, Checkpointer, SaveError
from zoo.checkpoints.folder import complete_steps
from zoo.checkpoints.leaves import check_parameters, named_leaves, shapes, with_leaves
from zoo.checkpoints.runs import ORIGIN, Run, evaluation_loss, load_run, newest_meta, read_config

__all__ = [
    "ORIGIN",
    "Checkpoint",
    "Checkpointer",
    "Run",
    "SaveError",
    "check_parameters",
    "complete_steps",
    "evaluation_loss",
    "load_run",
    "named_leaves",
    "newest_meta",
    "read_config",
    "shapes",
    "with_leaves",
]
