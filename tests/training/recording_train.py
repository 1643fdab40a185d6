"""zoo.train that writes down each batch it trains on, and takes its time, so that a test can stop it in between.

    recording_train.py RECORD SECONDS_PER_STEP --config=... --workdir=...

RECORD gets a line a batch: its step and a hash of each of its rows.
"""

import dataclasses
import hashlib
import json
import sys
import time

from zoo import data, train

record, pause = open(sys.argv[1], "a", buffering=1), float(sys.argv[2])
original = data.training_dataset


@dataclasses.dataclass(frozen=True)
class Recorded:
    dataset: data.TrainingDataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def iterator(self, start_step=None):
        if start_step is None:  # the yardstick reads what the run has read, and trains on nothing
            yield from self.dataset.iterator()
            return
        for step, batch in enumerate(self.dataset.iterator(start_step), start_step):
            rows = zip(batch["tokens"], batch["targets"], strict=True)
            hashes = [hashlib.sha256(a.tobytes() + b.tobytes()).hexdigest() for a, b in rows]
            record.write(json.dumps([step, hashes]) + "\n")
            time.sleep(pause)
            yield batch


data.training_dataset = lambda *arguments: Recorded(original(*arguments))
sys.argv[1:3] = []
train.run()
