"""Images of anybody, to be scored as they are: a folder of files, or one of arrays.

Unlike `data.load`, this neither resizes nor crops, splits nor shuffles, and knows no
labels. Files are decoded when they are asked for, so a folder may be larger than
memory.
"""

import dataclasses
import functools
import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jax_diffusion.data import sources

MOMENTS = {"mu.npy", "sigma.npy"}  # in a .npz


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Images of one size, as `open_pictures` finds them.

    The first one decides if there are colours. Where it has them, grey images are
    repeated to three channels; where it is grey, all others must be.
    """

    path: Path
    image_shape: tuple[int, ...]  # (h, w, c), c being 1 or 3
    stored: np.ndarray | tuple[str, ...]  # uint8 [n h w c], or paths of files

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The images of these rows, uint8 [n h w c], decoded now and on all cores.

        Raises:
            ValueError: if a file cannot be decoded, or its image is not of the first
                one's size or has colours where that is grey.
        """
        if isinstance(self.stored, np.ndarray):
            return np.asarray(self.stored)[rows]
        files = self.stored
        images = np.empty((len(rows), *self.image_shape), np.uint8)

        def fill(places: list[int]) -> None:
            for i in places:
                images[i] = self._decode(files[rows[i]])

        sources.in_threads(fill, np.arange(len(rows)))
        return images

    def batches(
        self, batch_size: int, start: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """{"image": uint8 [b h w c]} of all images from number `start` on, in order.

        Raises:
            ValueError: if an argument is out of range, or as `read` does.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in [0, {len(self)}], got {start}.")
        rows = np.arange(len(self))
        firsts = range(start, len(self), batch_size)
        return ({"image": self.read(rows[i : i + batch_size])} for i in firsts)

    @functools.cached_property
    def sha256(self) -> str:
        """Of a file of arrays, of its bytes; of a folder, of names and bytes in order.

        The names are those below the folder: it may be moved. Bytes, not pixels, so
        nothing is decoded, but the same pixels in another format count as others.
        """
        if isinstance(self.stored, np.ndarray):
            return _hash(os.fspath(self.path)).hex()
        files, digest = self.stored, hashlib.sha256()
        parts = sources.in_threads(
            lambda some: [_hash(files[i]) for i in some], np.arange(len(files))
        )
        hashes = (found for part in parts for found in part)
        for file, found in zip(files, hashes, strict=True):
            name = Path(file).relative_to(self.path).as_posix()
            digest.update(os.fsencode(name) + b"\0" + found)
        return digest.hexdigest()

    def _decode(self, file: str) -> np.ndarray:
        image, (h, w, c) = sources.decode(file), self.image_shape
        first = self.stored[0]
        if image.shape[:2] != (h, w):
            raise ValueError(
                f"images must be of one size, got {h} x {w} ({first}) and "
                f"{image.shape[0]} x {image.shape[1]} ({file})."
            )
        if image.shape[2] > c:
            raise ValueError(
                f"images must be grey where the first one is ({first}), got colours "
                f"({file})."
            )
        return image


def open_pictures(path: str | os.PathLike) -> Pictures:
    """Opens a folder of images, or a file of an array of them.

    Args:
        path: a folder with `sources.SUFFIXES` at any depth, in order of their paths,
            without hidden ones; of a GIF, the first frame counts. Or a .npz with uint8
            [n h w c] or [n h w] as "images" or "arr_0", which improved-diffusion and
            guided-diffusion write; or a .npy, which is not read but mapped.

    Raises:
        ValueError: if there are no images there or they are not as described.
    """
    place = Path(path).expanduser()
    if not os.fspath(path) or not place.exists():
        raise ValueError(
            f"images must be in a folder, or in a .npz or .npy file, got no {path!r}."
        )
    if not place.is_dir():
        images = _array(place)
        return Pictures(place, images.shape[1:], images)
    files = tuple(sources.find_images(place))
    if not files:
        raise ValueError(f"{place} must hold images, {sources.SUFFIXES}, got none.")
    return Pictures(place, sources.decode(files[0]).shape, files)


def holds_moments(path: str | os.PathLike) -> bool:
    """Whether this is a .npz of moments of features, "mu" and "sigma".

    So do pytorch-fid and guided-diffusion write references. The latter have images
    besides, which `open_pictures` opens.
    """
    place = Path(path).expanduser()
    if not place.is_file() or not zipfile.is_zipfile(place):
        return False
    with zipfile.ZipFile(place) as archive:
        return set(archive.namelist()) >= MOMENTS


def _array(file: Path) -> np.ndarray:
    """The images that a .npz or .npy file holds, uint8 [n h w c]."""
    with sources.reading(f"{file} must be a .npz or .npy file of plain arrays"):
        if file.suffix == ".npy":
            images, names = np.lib.format.open_memmap(file, mode="r"), []
        else:
            with file.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
                names = arrays.files
                name = next((k for k in ("images", "arr_0") if k in names), None)
                images = None if name is None else arrays[name]  # and no other
    if images is None:
        raise ValueError(f"{file} must have images or arr_0, got {names}.")
    found = f"got {images.dtype} {images.shape}."
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"{file} must hold uint8 [n h w] or [n h w c] with c 1 or 3, {found}"
        )
    if not images.size:
        raise ValueError(f"{file} must hold an image at least, {found}")
    return images


def _hash(file: str) -> bytes:
    with sources.reading(f"{file} must be a readable file"), open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()
