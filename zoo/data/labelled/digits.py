"""Handwritten digits, 8 x 8 grey values in rows from the top: 64 steps of one channel, 10 classes.

scikit-learn ships them: the test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), of
1,797 images. They stand by writer, and are shuffled once; the last 360 validate.
"""

import numpy as np

from zoo.data.labelled.stored import LabelledRows, Part
from zoo.data.stored import folder_of_package, source

VALIDATION_ROWS = 360


@source("digits")
def digits(config, options):
    folder_of_package("sklearn", "scikit-learn", "digits")
    from sklearn.datasets import load_digits  # 2 s that only this source needs

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    rows = Part(
        pixels.reshape(len(labels), -1, 1),
        [str(label) for label in labels],
        [f"digits: image {i}" for i in range(len(labels))],
    )
    train, validation = rows.pick(order[:-VALIDATION_ROWS]), rows.pick(order[-VALIDATION_ROWS:])
    return LabelledRows("digits", config.train.context_length, train, validation)
