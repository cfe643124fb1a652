"""What a reader of a data set returns: arrays, or `Examples` that are read by row.

A reader is a function `f(split, path, image_size)`. It returns either the arrays
(images uint8 [n h w c], labels int [n], or None without labels), or an instance of a
subclass of `Examples`, whose images are decoded only when they are asked for. A reader
of files may take `decoder` besides, a `decode.Decoder`.
"""

import abc
import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jax_diffusion import registry

Batch = dict[str, np.ndarray]  # "image", "label" and conditioning by name
Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [n h w c], labels int [n]
Source = str | os.PathLike | None  # where the data are
ImageSize = int | Sequence[int] | None  # side of squares, or (h, w); None if unknown

SPLITS = ("train", "test", "all")


class DamagedImageError(ValueError):
    """An image of a data set cannot be decoded; the message names its file."""


class Examples(abc.ABC):
    """Labeled images that are read by row; the base class of lazy readers.

    Attributes:
        labels: int32 [n].
        class_names: what the labels are called; None where they are numbers only.
        old_class_names: the names in the order in which version 0.1 numbered them; ()
            where it read other classes.
        labeled: whether the labels mean anything; without, all are 0.
        conditioning: vectors and tokens by name, [n, ...], see `data.conditioning`.
        left_out: files that are there and were not read, in words: "3 .txt, 1 hidden".
    """

    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    labeled: bool = True
    conditioning: Mapping[str, np.ndarray] = MappingProxyType({})
    left_out: str = ""

    @property
    def old_class_names(self) -> tuple[str, ...] | None:
        return self.class_names

    @property
    def stored_conditioning(self) -> Mapping[str, np.ndarray]:
        """`conditioning` of all images as the files have it, of damaged ones, too."""
        return self.conditioning

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c), which all images have."""

    @abc.abstractmethod
    def read(self, rows: np.ndarray) -> Arrays:
        """Returns images uint8 [k h w c] and labels int32 [k] of rows int [k].

        The arrays are the caller's to change. May be called by several threads at once.

        Raises:
            ValueError: if an image cannot be decoded.
        """

    def read_batch(self, rows: np.ndarray) -> Batch:
        """Returns "image", "label" and all conditioning of rows int [k], by name."""
        images, labels = self.read(rows)
        more = {name: a.take(rows, axis=0) for name, a in self.conditioning.items()}
        return {"image": images, "label": labels, **more}

    @property
    def num_classes(self) -> int:
        """Number of classes: of the names, else the largest label plus one."""
        if self.class_names is not None:
            return len(self.class_names)
        return int(self.labels.max()) + 1

    def counts(self) -> np.ndarray | None:
        """Returns how many images each class has; None if only decoding would tell."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @property
    def digest(self) -> str | None:
        """What the images and labels are known by, wherever they lie; None if unknown.

        A run is only continued with data of the same digest. It must be cheap.
        """
        return None

    @property
    def damaged(self) -> Mapping[int, str]:
        """What is wrong with each damaged image met and left out so far, by row."""
        return {}

    def read_all(self) -> Arrays:
        """Returns all images uint8 [n h w c] and labels int32 [n]."""
        return self.read(np.arange(len(self)))


class Wrapped(Examples):
    """Examples that are `inner`, but for what a subclass says otherwise."""

    def __init__(self, inner: Examples):
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.inner.image_shape

    @property
    def labels(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:  # pyright: ignore
        return self.inner.class_names

    @property
    def old_class_names(self) -> tuple[str, ...] | None:
        return self.inner.old_class_names

    @property
    def labeled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.labeled

    @property
    def conditioning(self) -> Mapping[str, np.ndarray]:  # pyright: ignore
        return self.inner.conditioning

    @property
    def stored_conditioning(self) -> Mapping[str, np.ndarray]:
        return self.inner.stored_conditioning

    @property
    def left_out(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.left_out

    @property
    def num_classes(self) -> int:
        return self.inner.num_classes

    @property
    def digest(self) -> str | None:
        return self.inner.digest

    @property
    def damaged(self) -> Mapping[int, str]:
        return self.inner.damaged

    def counts(self) -> np.ndarray | None:
        return self.inner.counts()

    def read(self, rows: np.ndarray) -> Arrays:
        return self.inner.read(rows)

    def read_batch(self, rows: np.ndarray) -> Batch:
        return self.inner.read_batch(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(Examples):
    """Decoded images and their labels, as `check_arrays` returns them.

    Attributes:
        images: uint8 [n h w c].
        labels, class_names, old_class_names, labeled, left_out, conditioning: as of
            `Examples`.
        source: what they were decoded from; None if they came as arrays.
    """

    images: np.ndarray
    labels: np.ndarray
    source: Examples | None = None
    class_names: tuple[str, ...] | None = None
    labeled: bool = True
    left_out: str = ""
    old_class_names: tuple[str, ...] | None = None  # pyright: ignore
    conditioning: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, found: Examples | tuple[Any, Any]) -> "InMemory":
        """Decodes examples, or checks the arrays that a reader has returned.

        Args:
            found: examples, or images and labels; the labels may be None.

        Raises:
            ValueError: if they cannot be decoded, or are not as `check_arrays` says.
        """
        if not isinstance(found, Examples):
            return cls(*check_arrays(*found), labeled=found[1] is not None)
        about = found.class_names, found.labeled, found.left_out, found.old_class_names
        batch = found.read_batch(np.arange(len(found)))
        arrays = check_arrays(batch.pop("image"), batch.pop("label"))
        return cls(*arrays, found, *about, conditioning=batch)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def read(self, rows: np.ndarray) -> Arrays:
        return self.images.take(rows, axis=0), self.labels.take(rows)

    @functools.cached_property
    def digest(self) -> str | None:
        """That of the source, or else of all images and labels."""
        if self.source is not None:
            return self.source.digest
        found = hashlib.sha256(f"arrays {self.images.shape}".encode())
        found.update(self.labels.data)
        found.update(np.ascontiguousarray(self.images).data)
        return found.hexdigest()

    @property
    def stored_conditioning(self) -> Mapping[str, np.ndarray]:
        """That of the source, whose damaged images have rows of others here."""
        source = self.source
        return self.conditioning if source is None else source.stored_conditioning

    @property
    def damaged(self) -> Mapping[int, str]:
        """Those of the source."""
        return {} if self.source is None else self.source.damaged

    def read_all(self) -> Arrays:
        """Returns all images and labels: the arrays themselves, no copies."""
        return self.images, self.labels


def check_arrays(images: Any, labels: Any) -> Arrays:
    """Checks images and labels and brings them to one form.

    Args:
        images: uint8 [n h w c] or [n h w], with n >= 1.
        labels: integers [n] in [0, 2^31); None labels all images 0.

    Returns:
        Contiguous images uint8 [n h w c], and labels int32 [n].

    Raises:
        ValueError: if they are not as described.
    """
    x = np.asarray(images)
    x = x[..., None] if x.ndim == 3 else x
    check_images("images", x)
    y = np.zeros(len(x), int) if labels is None else np.asarray(labels)
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(f"labels must be {len(x)} integers, got {y.dtype} {y.shape}.")
    if y.min() < 0 or y.max() >= 2**31:
        raise ValueError(f"labels must be in [0, 2^31), got {y.min()} to {y.max()}.")
    return np.ascontiguousarray(x), y.astype(np.int32)


def check_images(name: str, images: np.ndarray) -> None:
    """Raises ValueError unless images are uint8 [n h w c], with n >= 1.

    Images [n c h w] are refused, too: those with at most 5 rows, fewer than columns,
    whose last dimension is no number of channels that images have.

    Args:
        name: what they are, for errors.
        images: any array.
    """
    got = f"got {images.dtype} {images.shape}"
    if images.dtype.kind in "iuf" and images.dtype != np.uint8:
        advice = "other numbers are scaled from 0 to config.data.max_value, if given"
        raise ValueError(f"{name} must be uint8 [n h w c], {got}; {advice}.")
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(f"{name} must be uint8 [n h w c] with n >= 1, {got}.")
    _, h, w, c = images.shape
    odd = w == c or min(w, c) > 5 or (h in (1, 3) and c > 4)
    if h <= 5 and h < c and c not in (1, 3) and odd:
        advice = "x.transpose(0, 2, 3, 1) makes them so"
        raise ValueError(
            f"{name} must be [n h w c], {got}, which looks like [n c h w]; {advice}."
        )


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is in `SPLITS`."""
    if not isinstance(split, str) or split not in SPLITS:
        raise ValueError(
            f"split must be one of {SPLITS}, got {registry.short(split)}"
            f"{registry.hint(split, SPLITS)}"
        )


def rows_of_split(split: str, held_out: np.ndarray) -> np.ndarray:
    """Returns the row numbers int [k] of a split.

    Args:
        split: "train", "test", or "all".
        held_out: bool [n], the rows that belong to "test".

    Raises:
        ValueError: if the split has no rows.
    """
    rows = {"train": ~held_out, "test": held_out}.get(split, held_out | True)
    if not rows.any():
        raise ValueError(
            f"split {split!r} must have examples, got 0 of {len(rows)}; `split` 'all' "
            "has them all."
        )
    return np.flatnonzero(rows)


def every_tenth(n: int) -> np.ndarray:
    """Marks rows 9, 19, ... as the test images of data without splits: bool [n]."""
    return np.arange(n) % 10 == 9
