"""Image files: finding, decoding, resizing and cropping them, on all cores."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")  # in any case
CHUNK = 32  # images that a thread decodes at a time

T = TypeVar("T")


@contextlib.contextmanager
def reading(rule: str) -> Iterator[None]:
    """Turns any error of a decoder into a ValueError: "RULE, got ERROR."

    Decoders document none of what they raise, hence any error.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{rule}, got {error!r}.") from error


def find_images(root: Path) -> list[str]:
    """Returns the paths of all image files below a folder, in order of their parts.

    Files count by their suffix, see `SUFFIXES`. Links are followed; hidden files and
    folders are left out.
    """
    found = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(os.path.join(folder, name))
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))


def is_gray(image: Any) -> bool:
    """Tells whether an image of Pillow has a single channel of brightness."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def decode(file: str) -> np.ndarray:
    """Decodes an image file, turned upright by its EXIF orientation.

    Of a GIF, the first frame counts. Of 16 bits a channel, the upper 8 are kept.
    Transparency is dropped.

    Returns:
        uint8 [h w c], with c = 1 if the file is grayscale and 3 if not.

    Raises:
        ValueError: if the file cannot be decoded.
    """
    from PIL import Image, ImageOps

    with reading(f"{file} must be a whole image"), Image.open(file) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
            return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
        if is_gray(image):
            return np.asarray(image.convert("L"))[..., None]
        if image.mode == "P":  # straight to RGB, Pillow warns of transparent colors
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


def fit(array: np.ndarray, size: int) -> np.ndarray:
    """Resizes an image so that its shorter side is `size`, and crops the center.

    The same filters in the same order as improved-diffusion's `image_datasets.py`:
    halving by box filters, then bicubic.

    Args:
        array: uint8 [h w c].
        size: side of the result, in pixels.

    Returns:
        uint8 [size size c].
    """
    from PIL import Image

    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = [round(x * scale) for x in image.size]
    left, top = ((x - size) // 2 for x in shape)
    array = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    return array[top : top + size, left : left + size].reshape(size, size, -1)


def in_threads(function: Callable[[list[int]], T], rows: np.ndarray) -> list[T]:
    """Calls `function` on chunks of `rows` int [n], on all cores.

    Returns:
        One result for each chunk of at most `CHUNK` rows, in order.
    """
    chunks = [rows[i : i + CHUNK].tolist() for i in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # no thread outlives the call
        return [*pool.map(function, chunks)]
