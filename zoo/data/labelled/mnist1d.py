"""MNIST-1D (Greydanus & Kobak, arXiv:2011.14439): digits as curves of 40 points, shifted, scaled, sheared and noisy.

The authors' package makes them: 4,000 rows to train on, 1,000 to validate. Published accuracies: logistic regression
32 %, MLP 68 %, CNN 94 %, GRU 91 %, people 96 %; with shuffled points 32, 68, 56 and 57 %.
"""

import dataclasses
import random

import numpy as np

from zoo.data.labelled.stored import LabelledRows, Part
from zoo.data.stored import folder_of_package, source
from zoo.settings import setting


@dataclasses.dataclass
class Options:
    shuffle: bool = setting(False, "the points of all rows in one random order")
    seed: int = setting(42, "of the rows; 42 is the authors'", at_least=0, at_most=2**32 - 1)


@source("mnist1d", Options)
def mnist1d(config, options):
    folder_of_package("mnist1d", "mnist1d", "mnist1d")
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.shuffle_seq, arguments.seed = options.shuffle, options.seed
    states = random.getstate(), np.random.get_state()  # the package seeds those of the whole process
    try:
        made = make_dataset(arguments)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    parts = [
        Part(
            made[x][:, :, None], [str(label) for label in made[y]], [f"mnist1d: {x}[{i}]" for i in range(len(made[x]))]
        )
        for x, y in (("x", "y"), ("x_test", "y_test"))
    ]
    return LabelledRows("mnist1d", config.train.context_length, *parts)
