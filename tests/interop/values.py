"""Weights of the golden models, drawn by their names in the file, with torch and without: none have to be kept."""

import zlib

import numpy as np

PROJECTIONS = 4


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = (
        np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    )  # frozen by numpy
    if len([size for size in shape if size > 1]) > 1:
        return random if "embed" in name else random * np.float32(shape[-1] ** -0.5)
    return np.float32(0.3) * random + np.float32("norm" in name and name.endswith("weight"))


def projections(name: str, gradient: np.ndarray) -> np.ndarray:
    """Its length, and what of it points in a few directions."""
    found = [np.linalg.norm(gradient)]
    for i in range(PROJECTIONS):
        found.append(np.vdot(draw(f"{i}{name}", gradient.shape).ravel(), gradient.ravel()))
    return np.asarray(found, np.float64)
