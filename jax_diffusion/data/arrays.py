"""Data sets that are arrays: digits, synthetic discs, MNIST's files, .npz and .npy.

Each reader `load_*(split, path, image_size)` returns images uint8 [n h w c] and labels
int [n] of one split.
"""

import contextlib
import dataclasses
import gzip
import importlib.util
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_diffusion import checks
from jax_diffusion.data import philox
from jax_diffusion.data.classes import class_order, label_table
from jax_diffusion.data.conditioning import as_conditioning, of_file, read_arrays
from jax_diffusion.data.decode import Decoder, height_and_width, reading
from jax_diffusion.data.examples import (
    Arrays,
    ImageSize,
    InMemory,
    Source,
    check_arrays,
    check_split,
    every_tenth,
    rows_of_split,
)
from jax_diffusion.runtime import files

MAX_SYNTHETIC = 512  # pixels of a side: 512 such images take 400 MB


def load_digits(split: str, path: Source, image_size: ImageSize) -> Arrays:
    """Reads the 1,797 digits that scikit-learn brings along, 8 x 8 x 1, ten classes.

    Every tenth image is for "test". With `image_size=4`, each pixel is the mean of a
    2 x 2 block: the low-resolution half of a super-resolution pair. `path` is unused.
    """
    check_split(split)
    spec: Any = importlib.util.find_spec("sklearn")  # its import takes half a second
    file = Path(spec.submodule_search_locations[0], "datasets/data/digits.csv.gz")
    pixels, labels = np.split(np.loadtxt(file, delimiter=","), [64], axis=1)
    size = 4 if image_size == 4 else 8
    pixels = pixels.reshape(-1, size, 8 // size, size, 8 // size, 1).mean(axis=(2, 4))
    images = np.rint(pixels * (255 / 16)).astype(np.uint8)
    rows = rows_of_split(split, every_tenth(len(images)))
    return images[rows], labels[rows, 0].astype(int)


def load_synthetic(split: str, path: Source, image_size: ImageSize) -> Arrays:
    """Draws 512 soft discs on a darker ground; the label is the color of the disc.

    "train" and "test" have 512 images each, of four classes, [n 16 16 3] unless
    `image_size` says otherwise. `path` is unused.
    """
    check_split(split)
    seeds = {"train": [0], "test": [1]}.get(split, [0, 1])
    draws = np.concatenate(
        [philox.draw(philox.DISCS, seed, 0, 512 * 6) for seed in seeds]
    )
    colors = np.array([[240, 80, 60], [80, 220, 100], [90, 110, 250], [250, 220, 80]])
    labels = np.arange(512 * len(seeds)) % len(colors)
    h, w = height_and_width(image_size or 16)
    checks.integer("image_size", max(h, w), at_most=MAX_SYNTHETIC)
    (y, x), images = (np.linspace(0, 1, n) for n in (h, w)), []
    draws = draws.reshape(-1, 6)
    for color, u in zip(colors[labels], draws / 2.0**64, strict=True):
        dx, dy = x - 0.3 - 0.4 * u[0], y[:, None] - 0.3 - 0.4 * u[1]
        square = (dx * dx + dy * dy) / (0.1 + 0.15 * u[2]) ** 2
        disc = np.clip(2 - square, 0, 1)[..., None]
        images.append((disc * color + (1 - disc) * 80 * u[3:]).astype(np.uint8))
    return np.stack(images), labels


def load_idx(split: str, path: Source, image_size: ImageSize) -> Arrays:
    """Reads a folder of MNIST's four IDX files, gzipped or not; "test" is called t10k.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    check_split(split)
    folder, parts = check_folder(path, "idx"), []
    for stem in {"train": ["train"], "test": ["t10k"]}.get(split, ["train", "t10k"]):
        images = _read_idx(folder, f"{stem}-images", 3)
        parts.append(check_arrays(images, _read_idx(folder, f"{stem}-labels", 1)))
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def check_folder(path: Source, reader: str = "folder") -> Path:
    """Returns an existing folder as a Path, "~" expanded; else raises ValueError.

    Args:
        path: the folder.
        reader: whose it is, for errors.
    """
    place = Path(path).expanduser() if path else None
    if place is None or not place.is_dir():
        got = "None" if place is None else f"{str(path)!r}"
        if place is not None:
            got += (
                ", which is no folder" if place.exists() else ", which does not exist"
            )
        raise ValueError(f"path must be a folder for the reader {reader!r}, got {got}.")
    return place


def _read_idx(folder: Path, stem: str, ndim: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes with `ndim` dimensions."""
    ends = [f"{mark}idx{ndim}-ubyte{gz}" for mark in "-." for gz in ("", ".gz")]
    file = next((f for end in ends if (f := folder / (stem + end)).is_file()), None)
    if file is None:
        rule = f"path must hold {stem}{ends[0]}[.gz]"
        raise ValueError(f"{rule}, got no such file in {str(folder)!r}.")
    with reading(f"{file} must be a whole file"):
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
    magic, start = bytes([0, 0, 8, ndim]), 4 + 4 * ndim  # 8: unsigned bytes
    if data[:4] != magic:
        raise ValueError(f"{file} must start with {magic}, got {data[:4]}.")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    if len(data) != (size := start + math.prod(shape)):
        raise ValueError(f"{file} must hold {size} bytes, got {len(data)}.")
    return np.frombuffer(data, np.uint8)[start:].reshape(shape)


def load_npz(
    split: str, path: Source, image_size: ImageSize, *, decoder: Decoder | None = None
) -> InMemory:
    """Reads images, labels and conditioning of a .npz file, or images of a .npy file.

    Every tenth image is for "test". See `read_image_file` for the names of the arrays,
    and `data.conditioning` for cond, tokens and tokens_mask.
    Labels are integers, or names of classes as text. `decoder` converts images of more
    than 8 bits, and those with alpha.

    Raises:
        ValueError: if the file or its arrays are not as described.
    """
    check_split(split)
    images, labels = read_image_file(path)
    names = None
    if labels is not None and labels.dtype.kind == "U" and labels.ndim == 1:
        names = class_order(labels.tolist())
        labels = label_table(labels.tolist(), names)
    images = (decoder or Decoder()).convert(images, str(path))
    with of_file(path):
        found = InMemory.of((images, labels))
        file, given = Path(path or "").expanduser(), {}
        if zipfile.is_zipfile(file):
            given = read_arrays("path", file)
        more = as_conditioning(given, len(found))
    rows = rows_of_split(split, every_tenth(len(found)))
    return dataclasses.replace(
        found,
        images=found.images[rows],
        labels=found.labels[rows],
        class_names=names,
        conditioning={name: array[rows] for name, array in more.items()},
    )


def read_image_file(
    path: Source, field: str = "path", *, with_labels: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads images, and labels if there are any, from a .npz or .npy file.

    Args:
        path: a .npz file with "images" and perhaps "labels", or with "arr_0" and
            perhaps "arr_1" as improved-diffusion and guided-diffusion write them; its
            other arrays are not read. Or a .npy file, which is mapped into memory.
        field: what names the file, for errors.
        with_labels: False leaves the labels unread.

    Returns:
        Images and labels as they are stored, unchecked; labels may be None.

    Raises:
        ValueError: if it is no such file of plain arrays, or has no images.
    """
    checks.path(field, path, "a .npz or .npy file")
    file = Path(path or "").expanduser()
    rule = f"{field} must be a .npz or .npy file of plain arrays, got {str(path)!r}"
    if not file.exists():
        raise ValueError(f"{rule}, which does not exist.")
    with _reading(rule):
        with file.open("rb") as f:
            start = f.read(len(np.lib.format.MAGIC_PREFIX))
        if start == np.lib.format.MAGIC_PREFIX:
            return np.lib.format.open_memmap(file, mode="r"), None
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{rule}, which starts with {start}, or is cut off.")
    for names in (("images", "labels"), ("arr_0", "arr_1")):
        with _reading(rule):
            found = files.read_npz(file, names if with_labels else names[:1])
        if names[0] in found:
            return found[names[0]], found.get(names[1])
    with zipfile.ZipFile(file) as archive:
        there = [name.removesuffix(".npy") for name in archive.namelist()]
    raise ValueError(
        f"{field} must have arrays called images and perhaps labels, or arr_0 and "
        f"perhaps arr_1, got {there} in {str(path)!r}."
    )


@contextlib.contextmanager
def _reading(rule: str) -> Iterator[None]:
    """Turns any error of a reader into a ValueError: "RULE: ERROR."."""
    try:
        yield
    except Exception as error:  # whose cause tells what a sentence of its own says
        raise ValueError(f"{rule}: {error.__cause__ or error!r}.") from error
