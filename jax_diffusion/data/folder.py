"""Folders of image files: as training data, and images of anybody as they are.

`open_folder` is the reader "folder" of `DATASETS`: square images of one size, with
labels and splits. `open_images` opens a folder, a .npz or a .npy of images to be
evaluated: neither resized nor cropped, neither split nor shuffled, without labels.
Files are decoded when they are asked for, so a folder may be larger than memory.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jax_diffusion import checks
from jax_diffusion.data.arrays import check_folder, read_image_file
from jax_diffusion.data.classes import class_order, label_table
from jax_diffusion.data.conditioning import read_sidecar
from jax_diffusion.data.decode import (
    Decoder,
    fit,
    height_and_width,
    in_threads,
    reading,
)
from jax_diffusion.data.examples import (
    Arrays,
    DamagedImageError,
    Examples,
    ImageSize,
    Source,
    check_images,
    check_split,
)
from jax_diffusion.data.find import digest_of_files, find_images, readable_suffixes
from jax_diffusion.data.layout import read_layout
from jax_diffusion.runtime import files

HEADERS = 64  # files of a folder, at most, whose headers say whether all are gray


class PackedStrings:
    """A sequence of millions of strings in one piece of memory.

    Each takes its own bytes and 8 more, where a list would take about 60 more.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self._bytes[self._ends[row] : self._ends[row + 1]])


@dataclasses.dataclass(frozen=True, eq=False)
class Folder(Examples):
    """Image files, decoded when they are asked for.

    Attributes:
        paths: paths of the n files.
        labels: int32 [n].
        image_size: (h, w) that images are resized and cropped to, or the side of a
            square. None leaves them as they are; then all must be as large as the first
            one.
        decoder: decodes them.
        class_names, labeled, left_out, old_class_names, conditioning: as of `Examples`.
            A lone class has a name, but its images count as without labels: any folder
            has a name.
        beside: paths of the files of other splits; what has colors among them counts,
            so that all splits have images of one shape.
    """

    paths: PackedStrings
    labels: np.ndarray
    image_size: ImageSize
    decoder: Decoder = dataclasses.field(default_factory=Decoder)
    class_names: tuple[str, ...] | None = None
    labeled: bool = True
    left_out: str = ""
    old_class_names: tuple[str, ...] | None = None  # pyright: ignore
    beside: PackedStrings | None = None
    conditioning: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c); c is 3 if any image of any split has colors.

        Gray images are repeated then. Headers are read until one has colors: of a
        folder of colored images one or a few, of gray images all. Files without a whole
        header do not count.
        """

        def are_gray(rows: list[int]) -> bool:
            found = True
            for row in rows if not colored else ():
                with contextlib.suppress(DamagedImageError):
                    own = row < len(self)
                    path = self.paths[row] if own else others[row - len(self)]
                    found = found and self.decoder.is_gray(path)
            if not found:
                colored.append(True)  # which tells the other threads to stop
            return found

        others = self.beside or PackedStrings([])
        n, colored = len(self) + len(others), []
        # A folder of gray images that has a few colored ones has them in one place.
        sample = np.unique(np.linspace(0, n - 1, HEADERS).astype(int))
        gray = are_gray(sample.tolist()) and all(in_threads(are_gray, np.arange(n)))
        if self.image_size is None:
            h, w, _ = self.decoder.decode(self.paths[0]).shape
        else:
            h, w = height_and_width(self.image_size)
        return h, w, 1 if gray else 3

    @functools.cached_property
    def digest(self) -> str:
        """Of names and sizes of the files: nothing is read."""
        return digest_of_files([self.paths[row] for row in range(len(self))])

    def read(self, rows: np.ndarray) -> Arrays:
        """Decodes the images of these rows, int [k].

        Raises:
            DamagedImageError: if a file cannot be decoded.
            ValueError: if one is not of the first one's size where `image_size` is
                None, or has values that the decoder refuses.
        """
        images = np.empty((len(rows), *self.image_shape), np.uint8)

        def fill(places: list[int]) -> None:
            for i in places:
                images[i] = self._decode(int(rows[i]))

        in_threads(fill, np.arange(len(rows)))
        return images, self.labels[rows]

    def _decode(self, row: int) -> np.ndarray:
        """One image, uint8 [h w c], of the size of all and the channels of its file."""
        image = self.decoder.decode(self.paths[row])
        if self.image_size is not None:
            return fit(image, self.image_size)
        (h, w), (height, width) = self.image_shape[:2], image.shape[:2]
        if (height, width) != (h, w):
            raise ValueError(
                f"images must be of one size, got {h} x {w} ({self.paths[0]}) and "
                f"{height} x {width} ({self.paths[row]})."
            )
        return image


def open_folder(
    split: str,
    path: Source,
    image_size: ImageSize,
    *,
    decoder: Decoder | None = None,
) -> Folder:
    """Opens a folder of images whose classes are sub-folders, or prefixes of names.

    Without sub-folders, the class of `cat_1.png` is "cat"; without underscores, images
    have no labels. Classes are numbered in the order of their names, over all splits:
    numbers as numbers, the rest as text. Sub-folders "train", "val" and "test" (or
    "training", "valid", "validation", "testing", in any case) are the splits. Of three,
    "val" belongs to "all" only; of two, the other one is "test". Without splits, and of
    a lone "train", every tenth image is for "test". A folder that only wraps another
    one is looked through. See `layout`. Vectors and tokens of all images of the folder
    may lie in it as cond.npz, see `conditioning`.

    Args:
        split: "train", "test" or "all".
        path: the folder, with images at any depth; or one image file, without a label.
        image_size: (h, w) of the images in pixels, or the side of square ones.
        decoder: decodes them; by default transparent pixels get white.

    Raises:
        ValueError: if there is no such folder, no image or no `image_size`, or if the
            sub-folders may mean several things.
    """
    if image_size is None:
        check_split(split)
        check_folder(path)
        raise ValueError("image_size of a folder of images must be given, got None.")
    return read_folder(split, path, image_size, decoder)


def read_folder(
    split: str, path: Source, image_size: ImageSize, decoder: Decoder | None = None
) -> Folder:
    """`open_folder`; without an `image_size`, all images must be of one size."""
    check_split(split)
    if is_image_file(path):
        alone = PackedStrings([str(Path(path or "").expanduser())])
        label, decoder = np.zeros(1, np.int32), decoder or Decoder()
        return Folder(alone, label, image_size, decoder, labeled=False)
    root = check_folder(path)
    found = find_images(root)
    paths = _not_empty("path", root, found.paths)
    conditioning = read_sidecar(root, paths)
    if conditioning:
        found.left_out[".npz"] -= 1
    layout = read_layout(root, [path[len(str(root)) + 1 :] for path in paths])
    labels, class_names = np.zeros(len(paths), np.int32), None
    if layout.classes is not None:
        class_names = class_order(layout.classes)
        labels = label_table(layout.classes, class_names)
    rows = layout.rows(split)
    others = np.setdiff1d(np.arange(len(paths)), rows)
    return Folder(
        PackedStrings(paths[i] for i in rows),
        labels[rows],
        image_size,
        decoder or Decoder(),
        class_names,
        labeled=len(class_names or ()) > 1,
        left_out=found.left_out_in_words,
        old_class_names=layout.old_class_names,
        beside=PackedStrings(paths[i] for i in others),
        conditioning={name: array[rows] for name, array in conditioning.items()},
    )


def is_image_file(path: Source) -> bool:
    """Tells whether a path is that of an image file, by its suffix."""
    file = Path(path or "").expanduser()
    return file.suffix.lower() in readable_suffixes() and file.is_file()


def _not_empty(field: str, root: Path, paths: list[str]) -> list[str]:
    """Returns the paths, or raises ValueError, by a field's name, if there are none."""
    if not paths:
        rule = f"{field} must hold images, {readable_suffixes()}"
        raise ValueError(f"{rule}, got none in {str(root)!r}.")
    return paths


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """Images of one size as they are, opened by `open_images`.

    If any image has colors, gray ones are repeated to three channels.

    Attributes:
        path: the folder or file.
        image_shape: (h, w, c), with c = 1 or 3 for a folder.
        stored: uint8 [n h w c], or the files of a folder.
    """

    path: Path
    image_shape: tuple[int, ...]
    stored: np.ndarray | Folder

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Returns the images uint8 [k h w c] of rows int [k], decoded on all cores.

        Raises:
            ValueError: if a file cannot be decoded, or its image is not of the first
                one's size.
        """
        if isinstance(self.stored, Folder):
            return self.stored.read(rows)[0]
        return np.asarray(self.stored)[rows]

    def batches(
        self, batch_size: int, start: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {"image": uint8 [b h w c]} of all images, in order, from row `start`.

        Raises:
            ValueError: if an argument is out of range, or as `read` does.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}.")
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be in [0, {len(self)}], got {start}.")
        rows = np.arange(len(self))
        firsts = range(start, len(self), batch_size)
        return ({"image": self.read(rows[i : i + batch_size])} for i in firsts)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 in hex: of a file's bytes; of a folder's names and bytes, in order.

        The names are those below the folder, which may be moved. Bytes count, not
        pixels: nothing is decoded, and the same pixels in another format differ.
        """
        if isinstance(self.stored, np.ndarray):
            return _sha256(os.fspath(self.path))
        paths, digest = self.stored.paths, hashlib.sha256()
        chunks = in_threads(
            lambda rows: [_sha256(paths[i]) for i in rows], np.arange(len(paths))
        )
        for i, found in enumerate(itertools.chain.from_iterable(chunks)):
            name = Path(paths[i]).relative_to(self.path).as_posix()
            digest.update(os.fsencode(name) + b"\0" + bytes.fromhex(found))
        return digest.hexdigest()


def _sha256(file: str) -> str:
    with reading(f"{file} must be a readable file"):
        return files.sha256_of_file(file)


def open_images(
    path: str | os.PathLike, *, decoder: Decoder | None = None
) -> StoredImages:
    """Opens a folder of images, or a file of an array of images, as they are.

    Args:
        path: a folder of image files at any depth, in order of their paths, see
            `find.find_images`. Or a .npz with uint8 [n h w c] or [n h w] as "images" or
            "arr_0". Or a .npy of such an array, which is mapped and not read.
        decoder: decodes the files; by default transparent pixels get white.

    Raises:
        ValueError: if there are no images there or they are not as described.
    """
    rule = "in a folder, or in a .npz or .npy file"
    checks.path("images", path, rule)
    place = Path(path).expanduser()
    if not place.exists():
        raise ValueError(f"images must be {rule}, got no {os.fspath(path)!r}.")
    if place.is_dir():
        paths = PackedStrings(_not_empty("images", place, find_images(place).paths))
        labels = np.zeros(len(paths), np.int32)
        found = Folder(paths, labels, None, decoder or Decoder())
        return StoredImages(place, found.image_shape, found)
    images, _ = read_image_file(place, "images", with_labels=False)
    if images.ndim == 3:
        images = images[..., None]
    images = (decoder or Decoder()).convert(images)
    check_images(f"images of {place}", images)
    return StoredImages(place, images.shape[1:], images)
