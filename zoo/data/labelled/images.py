"""Images as sequences of pixels, in rows from the top, or of patches: a folder for each class, or two .npy files.

    images?path=pets                                pets/cat/1.png, pets/dog/7.jpg, ...
    images?path=x.npy&labels=y.npy&patch=4          [N, height, width] or [N, height, width, channels], and [N]

A step has the channels of a pixel, 1 or 3, or patch x patch x channels numbers. All images have one size.
"""

import dataclasses
import os
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from zoo import files
from zoo.data.labelled.stored import LabelledRows, Part, split
from zoo.data.stored import source
from zoo.errors import UsageError
from zoo.settings import setting
from zoo.terminal import one_line

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".webp")
LARGEST_IMAGE = 1 << 24  # pixels; more are no sequence


@dataclasses.dataclass
class Options:
    path: str = setting("", "a folder with a folder for each class, or a .npy file of images")
    labels: str = setting("", "beside a .npy file: the .npy file of their classes")
    patch: int = setting(1, "the side of a patch, which is one step", unit="pixel", at_most=4096)
    color: bool = setting(False, "red, green and blue of a folder's images; else they are read as grey")


@source("images", Options)
def images(config, options):
    path = files.expand(options.path)
    if not options.path or path.endswith(".npy") != bool(options.labels):
        raise UsageError(
            "data.source: images takes a folder, as in images?path=pets, or two files, as in "
            "images?path=x.npy&labels=y.npy"
        )
    read = _arrays(path, files.expand(options.labels)) if options.labels else _folder(path, options.color)
    rows = zip(read.inputs, read.names, strict=True)
    part = read._replace(inputs=[_steps(image, options.patch, where) for image, where in rows])
    return LabelledRows("images", config.train.context_length, *split(part, config.data.validation_fraction))


def _steps(image: np.ndarray, patch: int, where: str) -> np.ndarray:
    """[height, width, C] as patches [n, patch * patch * C]."""
    height, width, channels = image.shape
    if height % patch or width % patch:
        raise UsageError(f"{where}: {height} x {width} pixels do not divide into patches of {patch}; choose a divisor")
    squares = image.reshape(height // patch, patch, width // patch, patch, channels).swapaxes(1, 2)
    return squares.reshape(-1, patch * patch * channels)


def _folder(path: str, color: bool) -> Part:
    if not os.path.isdir(path):
        raise UsageError(f"data.source: images: no folder {path!r}; expected one with a folder for each class")
    inputs, labels, names = [], [], []
    for label in sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith(".")):
        for file in sorted(pathlib.Path(path, label).iterdir()):
            if file.suffix.lower() not in ENDINGS:
                continue
            inputs.append(_image(file, color))
            labels.append(label)
            names.append(one_line(file))
            if inputs[-1].shape != inputs[0].shape:
                (height, width, _), (h, w, _) = inputs[-1].shape, inputs[0].shape
                raise UsageError(
                    f"{names[-1]}: {height} x {width} pixels, and {names[0]} has {h} x {w}; expected one size"
                )
    if not inputs:
        raise UsageError(f"data.source: images: {path!r} has no folders of images ({', '.join(ENDINGS)})")
    return Part(inputs, labels, names)


def _image(path: pathlib.Path, color: bool) -> np.ndarray:
    """uint8 [height, width, 1 or 3]."""
    try:
        with files.open_regular(path) as file, Image.open(file) as image:
            if image.width * image.height > LARGEST_IMAGE:
                raise UsageError(f"{one_line(path)}: {image.width} x {image.height} pixels, expected fewer; scale it")
            pixels = np.asarray(image.convert("RGB" if color else "L"))
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"{one_line(path)}: cannot be read as an image: {one_line(error)}") from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _arrays(path: str, labels_path: str) -> Part:
    pixels, labels = _array(path, "iufb"), _array(labels_path, "iubU")
    if pixels.ndim not in (3, 4) or labels.ndim != 1 or len(pixels) != len(labels):
        raise UsageError(
            f"{one_line(path)}: shape {pixels.shape}, and the labels have {labels.shape}; expected [N, height, width] "
            "or [N, height, width, channels], and [N]"
        )
    pixels = pixels.reshape(*pixels.shape[:3], -1)
    return Part(pixels, [str(x) for x in labels.tolist()], [f"{one_line(path)}[{i}]" for i in range(len(pixels))])


def _array(path: str, kinds: str) -> np.ndarray:
    """An array of one of numpy's kinds."""
    try:
        files.check_regular(os.stat(path))
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{one_line(path)}: cannot be read as .npy: {one_line(error)}") from error
    if found.dtype.kind not in kinds:
        expected = "numbers" if "f" in kinds else "whole numbers or text"
        raise UsageError(f"{one_line(path)}: an array of {found.dtype}, expected {expected}")
    return found
