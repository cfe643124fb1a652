"""Images for training and evaluation.

| file | what it does |
| --- | --- |
| `pixels` | `from_uint8`, `to_uint8`: uint8 as stored <-> float32 in [-1, 1] |
| `batches` | `Batches`, `from_arrays`: batches that depend on (seed, step) alone |
| `examples` | what a reader returns: arrays, or `Examples` that are read by row |
| `arrays` | readers "digits", "synthetic", "idx" (MNIST's files) and "npz" (or .npy) |
| `conditioning` | vectors and token sequences beside images, checked and matched |
| `layout` | splits and classes of a folder |
| `classes` | names of classes: their order, and labels matched by name |
| `folder` | reader "folder"; `open_images`: anybody's images as they are |
| `tfds` | reader "tfds": TensorFlow Datasets without TensorFlow |
| `find` | `find_images`: the image files below a folder, and what is left out |
| `damaged` | finding damaged images beforehand, and going on without them |
| `decode` | decoding, resizing and cropping image files |
| `philox` | random numbers that no release of NumPy may change |

This module has `load`, which opens a data set by its name in `DATASETS`, and
`parse_source`, the syntax of images on command lines. A config has the arguments of
`load`, for example

    config.data = dict(name="digits", batch_size=64)
    config.data = dict(name="folder", path="photos", image_size=64, batch_size=64)
    config.data = dict(name="idx", path="data/fashion-mnist", batch_size=128)
    config.data = dict(name="npz", path="images.npz", batch_size=128)
    config.data = dict(name="tfds", path="cifar10:3.0.2", batch_size=128)

A folder without splits keeps every tenth image for "test". Splits are folders called
train, val (valid, validation) and test, and each may have folders of classes, which
need config.model.num_classes=N.

Vectors or token sequences that a network is told of each image (config.model.cond_dim
or token_dim) stand in the .npz as cond, tokens and tokens_mask, or in a file cond.npz
of the folder, with the paths of its images as names; see `conditioning`.

Images that are not in memory are read ahead of the training step by grain, which
`pip install 'jax_diffusion[grain]'` installs.
"""

import inspect
import math
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_diffusion import checks, registry
from jax_diffusion.data.arrays import load_digits, load_idx, load_npz, load_synthetic
from jax_diffusion.data.batches import PREFETCH_BATCHES, Batch, Batches, from_arrays
from jax_diffusion.data.classes import (
    LOGGER,
    SHOWN,
    describe,
    fit_labels,
    in_words,
    is_number,
    label_table,
    match,
    numbers_called,
    tell,
)
from jax_diffusion.data.conditioning import (
    CONDITIONING,
    Conditioning,
    as_conditioning,
    read_conditioning,
    record_of,
)
from jax_diffusion.data.damaged import WithoutDamaged, check_examples
from jax_diffusion.data.decode import Color, Decoder, height_and_width
from jax_diffusion.data.examples import (
    SPLITS,
    Arrays,
    DamagedImageError,
    Examples,
    ImageSize,
    InMemory,
    Source,
    check_arrays,
)
from jax_diffusion.data.folder import (
    StoredImages,
    is_image_file,
    open_folder,
    open_images,
    read_folder,
)
from jax_diffusion.data.pixels import ROUNDINGS, from_uint8, to_uint8
from jax_diffusion.data.tfds import open_tfds

__all__ = [
    "CONDITIONING",
    "DATASETS",
    "LOGGER",
    "MAX_IN_MEMORY",
    "PREFETCH_BATCHES",
    "ROUNDINGS",
    "SHOWN",
    "SPLITS",
    "WITHOUT_PATH",
    "Arrays",
    "Batch",
    "Batches",
    "Conditioning",
    "DamagedImageError",
    "Decoder",
    "Examples",
    "InMemory",
    "Source",
    "StoredImages",
    "arrays",
    "as_conditioning",
    "batches",
    "check",
    "check_arrays",
    "classes",
    "conditioning",
    "damaged",
    "decode",
    "describe",
    "examples",
    "find",
    "fit_labels",
    "folder",
    "from_arrays",
    "from_uint8",
    "in_words",
    "is_number",
    "label_table",
    "layout",
    "load",
    "load_npz",
    "match",
    "numbers_called",
    "open_images",
    "open_stored",
    "parse_source",
    "philox",
    "pixels",
    "read_conditioning",
    "record_of",
    "source_name",
    "tfds",
    "to_uint8",
]

DATASETS: dict[str, Callable[..., Arrays | Examples]] = dict(
    digits=load_digits,
    synthetic=load_synthetic,
    idx=load_idx,
    npz=load_npz,
    folder=open_folder,
    tfds=open_tfds,
)

WITHOUT_PATH = ("digits", "synthetic")
ON_ERROR = ("stop", "skip")  # what `load` does about a damaged image
MAX_IN_MEMORY = 2 * 2**30  # bytes of images that `load` decodes unless told to


def load(
    name: str,
    split: str = "train",
    *,
    path: Source = None,
    image_size: ImageSize = None,
    background: Color | None = None,
    max_value: int | float | None = None,
    in_memory: bool | None = None,
    on_error: str = "stop",
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    flip: bool = False,
    start_step: int = 0,
) -> Batches:
    """Opens one split of a data set, decoded into memory if it fits.

    Args:
        name: a key of `DATASETS`; or "package.module:function", a reader
            f(split, path, image_size) of your own, see `data.examples`.
        split: "train", "test" or "all"; for "tfds" also the data set's own names.
        path: where the data are; for "tfds" a name, as "cifar10:3.0.2", or a folder.
        image_size: (h, w) of the images in pixels, or the side of square ones. "folder"
            needs it and "tfds" may have it, to resize to; "synthetic" draws at it; for
            other data sets it is only compared with their size.
        background: the color behind transparent pixels: a name that Pillow knows, such
            as "black" or "#ff8800", or (r, g, b) in [0, 255]. None: white for files of
            images, while arrays with alpha stay images of two or four channels.
        max_value: the value that is white in images of more than 8 bits a channel, such
            as 4095 for 12 bits. None: of files of 16 bits the upper 8 are kept, which
            is told in a warning, and arrays other than uint8 are refused.
        in_memory: True decodes all images at once; False decodes each batch when it is
            needed, which only readers that return `Examples` can, such as "folder" and
            "tfds". The batches are the same. Default: True up to `MAX_IN_MEMORY` bytes
            (2 GiB).
        on_error: "stop" raises at an image that cannot be decoded; "skip" takes the
            next whole image in stored order for it, with that one's label, and counts
            it in `Batches.examples.damaged`.
        batch_size, seed, train, flip, start_step: as in `from_arrays`.

    Raises:
        ValueError: if an argument is out of range or the data are not as they must be.

    >>> batches = load("digits", batch_size=128, seed=1)
    >>> batches.num_examples, batches.num_classes, batches.image_shape
    (1618, 10, (8, 8, 1))
    """
    checks.choice("on_error", on_error, ON_ERROR)
    check_path(path)
    if in_memory is not None:
        checks.boolean("in_memory", in_memory)
    if path and name in WITHOUT_PATH:
        raise ValueError(f"path must be left out for {name!r}, got {path!r}.")
    examples = open_examples(name, split, path, image_size, background, max_value)
    if isinstance(examples, InMemory):
        if in_memory is False:
            raise ValueError(
                f"in_memory must be None or True for {name!r}, got False: its reader "
                "returns arrays; 'folder' and 'tfds' are decoded when asked for."
            )
    else:
        if on_error == "skip":
            examples = WithoutDamaged(examples)
        if in_memory is None:
            size = len(examples) * math.prod(examples.image_shape)
            in_memory = size <= MAX_IN_MEMORY
        if in_memory:
            examples = InMemory.of(examples)
    batches = Batches.checked(
        examples,
        batch_size=batch_size,
        seed=seed,
        train=train,
        flip=flip,
        start_step=start_step,
    )
    h, w, _ = batches.image_shape
    if image_size is not None and (h, w) != height_and_width(image_size):
        raise ValueError(f"image_size of {name} must be {h} x {w}, got {image_size}.")
    tell(f"{source_name(name, path)}, {split}", batches.examples)
    return batches


def open_examples(
    name: str,
    split: str = "train",
    path: Source = None,
    image_size: ImageSize = None,
    background: Color | None = None,
    max_value: int | float | None = None,
) -> Examples:
    """Opens one split of a data set; arguments and errors are those of `load`.

    Returns:
        `InMemory` of a reader that returns arrays; else what the reader returns.
    """
    reader = registry.lookup("dataset", name, DATASETS)
    check_path(path)
    size = None if image_size is None else height_and_width(image_size)
    decoder = Decoder(background, max_value)
    rule = "a reader (split, path, image_size) -> (images, labels) or data.Examples"
    with registry.outside("name", name, rule):
        takes = inspect.signature(reader).parameters
        found = reader(
            *(split, path, size[0] if size and size[0] == size[1] else size),
            **({"decoder": decoder} if "decoder" in takes else {}),
        )
        if isinstance(found, Examples):
            return found
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(f"it returns {registry.short(found)}.")
        images, labels = np.asarray(found[0]), found[1]
    images = decoder.convert(images)  # a wrong max_value is no fault of the reader
    with registry.outside("name", name, rule):
        return InMemory.of((images, labels))


def check_path(path: Any) -> None:
    """Raises ValueError unless `path` may be given to a reader of a data set."""
    missing = path is None or (isinstance(path, str) and not path)
    if not missing:  # for which readers have words of their own
        checks.path("path", path, "a string or an os.PathLike")


def check(
    name: str,
    split: str = "all",
    *,
    path: Source = None,
    image_size: ImageSize = None,
    background: Color | None = None,
    max_value: int | float | None = None,
) -> list[str]:
    """Reads all images of a data set, with a progress bar, before a training does.

    Args:
        name, split, path, image_size, background, max_value: as `load` takes them.

    Returns:
        A sentence for each image that cannot be read, which names its file.

    Raises:
        ValueError: if the data set cannot be opened.

    >>> check("digits")
    []
    """
    options = (path, image_size, background, max_value)
    return check_examples(open_examples(name, split, *options))


def open_stored(source: str | os.PathLike, field: str = "images") -> Examples:
    """Opens all images of PATH or NAME:PATH at the size that they have, with labels.

    Args:
        source: as `parse_source` takes it.
        field: what the images are, for errors.

    Raises:
        ValueError: if it cannot be read.
    """
    name, path = parse_source(source, field, must_exist=True)
    if name != "folder":
        return load(name, "all", path=path, batch_size=1, train=False).examples
    found = read_folder("all", path, None)
    tell(source_name(name, path), found)
    return found


def source_name(name: str, path: Source) -> str:
    """Returns NAME:PATH, or NAME for data that need no path."""
    return f"{name}:{os.fspath(path)}" if path else name


def parse_source(
    text: str | os.PathLike, field: str = "images", *, must_exist: bool = False
) -> tuple[str, str | None]:
    """Parses images on a command line, PATH or NAME:PATH, to the arguments of `load`.

    Args:
        text: "NAME:PATH" or "NAME", with NAME a key of `DATASETS`; or the path of a
            folder or of an image file, which are of the data set "folder", or of a .npz
            or .npy file, which is of "npz"; or "package.module:function" or
            "package.module:function:PATH" with a reader of your own. For a folder
            whose name is also that of a data set, write "./digits".
        field: what the images are, for errors.
        must_exist: whether a path that is missing is refused here, by the field's name.

    Returns:
        Name and path; the path is None if there is none.

    Raises:
        ValueError: if it is none of these, or missing.

    >>> parse_source("folder:photos"), parse_source("samples.npz")
    (('folder', 'photos'), ('npz', 'samples.npz'))
    >>> parse_source("digits")
    ('digits', None)
    """
    rule = (
        "a folder, an image, a .npz or .npy file, or NAME:PATH with NAME one of "
        f"{sorted(DATASETS)} or 'package.module:function'"
    )
    checks.path(field, text, rule)
    text = os.fspath(text)
    name, _, path = text.partition(":")
    place = os.path.expanduser(text)
    arrays = text.lower().endswith((".npz", ".npy")) and not os.path.isdir(place)
    if name not in DATASETS and arrays:
        name, path = "npz", text
    if name in DATASETS:
        there = not path or os.path.exists(os.path.expanduser(path))
        if must_exist and name in ("folder", "idx", "npz") and not there:
            raise ValueError(f"{field} must exist, got {path!r}, where nothing is.")
        return name, path or None
    if text and (os.path.isdir(place) or is_image_file(text)):
        return "folder", text
    if own := re.fullmatch(r"([\w.]+:\w+)(?::(.*))?", text):
        return own[1], own[2] or None
    absent = "" if os.path.exists(place) else ", which does not exist"
    end = registry.hint(name, DATASETS)
    raise ValueError(f"{field} must be {rule}, got {text!r}{absent}{end}")
