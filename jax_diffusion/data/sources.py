"""Where images come from: readers of data sets, by name in `DATASETS`.

A reader decodes a split into memory, uint8 [n h w c] and integer labels [n]. Readers in
`LAZY` also open one without doing so: the images are then decoded when they are asked
for, by row, and equal to those that would be in memory.
"""

import contextlib
import dataclasses
import functools
import gzip
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]  # images, labels
Source = str | os.PathLike | None  # where the data are

SPLITS = ("train", "test", "all")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
ORDER, FLIP, DISCS = range(3)  # one stream of random numbers for each purpose
LOOKED_AT = 64  # files of a folder, at most, whose headers say if all are grey
CHUNK = 32  # images that a thread decodes at a time

# Not `tfds build`: that wants Apache Beam and mlcroissant besides TensorFlow.
PREPARE = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('{}', "
    "data_dir='{}', file_format='array_record').download_and_prepare()\""
)


def draw(stream: int, seed: int, index: int, count: int) -> np.ndarray:
    """Draws uint64 [count] keyed by (seed, index); streams are 2^192 blocks apart."""
    key, counter = (np.array(v, np.uint64) for v in ([seed, index], [0, 0, 0, stream]))
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def check_arrays(images: Any, labels: Any) -> Arrays:
    """Images as uint8 [n h w c] and labels as int32 [n], if that is what they are."""
    x = np.asarray(images)
    x = x[..., None] if x.ndim == 3 else x
    if x.dtype != np.uint8 or x.ndim != 4 or not x.size:
        raise ValueError(f"images must be uint8 [n h w c], got {x.dtype} {x.shape}.")
    y = np.zeros(len(x), int) if labels is None else np.asarray(labels)
    if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
        raise ValueError(f"labels must be {len(x)} integers, got {y.dtype} {y.shape}.")
    if y.min() < 0 or y.max() >= 2**31:
        raise ValueError(f"labels must be in [0, 2^31), got {y.min()} to {y.max()}.")
    return np.ascontiguousarray(x), y.astype(np.int32)


def _check_folder(path: Source) -> Path:
    if not path or not Path(path).expanduser().is_dir():
        raise ValueError(f"config.data.path must be a folder for this, got {path}.")
    return Path(path).expanduser()


@contextlib.contextmanager
def reading(rule: str) -> Iterator[None]:
    """Makes one sentence of whatever a decoder raises, which none of them documents."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{rule}, got {error!r}.") from error


def _rows_of(split: str, held_out: np.ndarray) -> np.ndarray:
    """Row numbers of a split, where `held_out` [n] says which rows are for "test"."""
    rows = {"train": ~held_out, "test": held_out}.get(split, held_out | True)
    if not rows.any():
        raise ValueError(f"split {split!r} must have examples, got 0 of {len(rows)}.")
    return np.flatnonzero(rows)


def _digits(split: str, path: Source, image_size: int | None) -> Arrays:
    """The 1,797 digits of scikit-learn, 8 x 8 x 1; or means of blocks, 4 x 4 x 1."""
    spec: Any = importlib.util.find_spec("sklearn")  # its import takes half a second
    file = Path(spec.submodule_search_locations[0], "datasets/data/digits.csv.gz")
    pixels, labels = np.split(np.loadtxt(file, delimiter=","), [64], axis=1)
    size = 4 if image_size == 4 else 8
    pixels = pixels.reshape(-1, size, 8 // size, size, 8 // size, 1).mean(axis=(2, 4))
    images = np.rint(pixels * (255 / 16)).astype(np.uint8)
    rows = _rows_of(split, np.arange(len(images)) % 10 == 9)
    return images[rows], labels[rows, 0].astype(int)


def _synthetic(split: str, path: Source, image_size: int | None) -> Arrays:
    """512 soft discs on a darker ground; the label is the colour of the disc."""
    seeds = {"train": [0], "test": [1]}.get(split, [0, 1])
    draws = np.concatenate([draw(DISCS, seed, 0, 512 * 6) for seed in seeds])
    colours = np.array([[240, 80, 60], [80, 220, 100], [90, 110, 250], [250, 220, 80]])
    labels = np.arange(512 * len(seeds)) % len(colours)
    x, images, draws = np.linspace(0, 1, image_size or 16), [], draws.reshape(-1, 6)
    for colour, u in zip(colours[labels], draws / 2.0**64, strict=True):
        dx, dy = x - 0.3 - 0.4 * u[0], x[:, None] - 0.3 - 0.4 * u[1]
        square = (dx * dx + dy * dy) / (0.1 + 0.15 * u[2]) ** 2
        disc = np.clip(2 - square, 0, 1)[..., None]
        images.append((disc * colour + (1 - disc) * 80 * u[3:]).astype(np.uint8))
    return np.stack(images), labels


def _read_idx(folder: Path, stem: str, ndim: int) -> np.ndarray:
    ends = [f"{mark}idx{ndim}-ubyte{gz}" for mark in "-." for gz in ("", ".gz")]
    file = next((f for end in ends if (f := folder / (stem + end)).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} must hold {stem}{ends[0]}[.gz], got no such file.")
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


def _idx(split: str, path: Source, image_size: int | None) -> Arrays:
    """A folder of MNIST's four files, where "test" is called t10k."""
    folder, parts = _check_folder(path), []
    for stem in {"train": ["train"], "test": ["t10k"]}.get(split, ["train", "t10k"]):
        images = _read_idx(folder, f"{stem}-images", 3)
        parts.append(check_arrays(images, _read_idx(folder, f"{stem}-labels", 1)))
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _fit(array: np.ndarray, size: int) -> np.ndarray:
    """Resizes and crops [h w c] to [size size c], as improved-diffusion."""
    from PIL import Image

    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = [round(x * scale) for x in image.size]
    left, top = ((x - size) // 2 for x in shape)
    array = np.asarray(image.resize(shape, Image.Resampling.BICUBIC))
    return array[top : top + size, left : left + size].reshape(size, size, -1)


def is_grey(image: Any) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def decode(file: str) -> np.ndarray:
    """Reads a file as uint8 [h w c]; c is 1 if the file is greyscale, else 3."""
    from PIL import Image, ImageOps

    with reading(f"{file} must be a whole image"), Image.open(file) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
            return (np.asarray(image) >> 8).astype(np.uint8)[..., None]
        if is_grey(image):
            return np.asarray(image.convert("L"))[..., None]
        if image.mode == "P":  # straight to RGB, PIL warns of transparent colours
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))


def find_images(root: Path) -> list[str]:
    """Paths of the images below a folder, in order of their parts; follows links."""
    found = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(os.path.join(folder, name))
    return sorted(found, key=lambda path: path.replace(os.sep, "\0"))


def _class_names(names: list[str]) -> list[str]:
    if all(os.sep in name for name in names):
        return [name.partition(os.sep)[0] for name in names]
    files = [os.path.basename(name) for name in names]
    marked = all("_" in file for file in files)
    return [file.partition("_")[0] if marked else "" for file in files]


def in_threads(function: Callable[[list[int]], Any], rows: np.ndarray) -> list[Any]:
    """`function` of every few rows, in order, computed on all cores."""
    chunks = [rows[i : i + CHUNK].tolist() for i in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # no thread outlives the call
        return [*pool.map(function, chunks)]


class _Strings:
    """Millions of strings in one piece of memory, 8 bytes each besides their own."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self._bytes[self._ends[row] : self._ends[row + 1]])


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """Image files, decoded when they are asked for."""

    paths: _Strings
    labels: np.ndarray  # int32 [n]
    image_size: int

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        """Grey if a sample of the files is; then `read` holds the others to it."""
        from PIL import Image

        grey, sample = True, np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)
        for row in np.unique(sample).tolist():
            path = self.paths[row]
            with reading(f"{path} must be a whole image"), Image.open(path) as image:
                grey = grey and is_grey(image)
        return self.image_size, self.image_size, 1 if grey else 3

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def _decode(self, rows: np.ndarray) -> list[np.ndarray]:
        size, paths = self.image_size, self.paths
        parts = in_threads(
            lambda some: [_fit(decode(paths[i]), size) for i in some], rows
        )
        return [*itertools.chain.from_iterable(parts)]

    def read(self, rows: np.ndarray) -> Arrays:
        """Decodes the images of these rows."""
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        for i, image in enumerate(self._decode(rows)):
            if image.shape[-1] > images.shape[-1]:
                path = self.paths[int(rows[i])]
                raise ValueError(
                    f"{path} must be grey, as a sample of the files is, got colours; "
                    "in_memory=True looks at all of them."
                )
            images[i] = image
        return images, self.labels[rows]

    def read_all(self) -> Arrays:
        """Decodes all images, in colour if one of them is."""
        images = self._decode(np.arange(len(self)))
        shape = *images[0].shape[:2], max(image.shape[-1] for image in images)
        return np.stack([np.broadcast_to(x, shape) for x in images]), self.labels


def _folder(split: str, path: Source, image_size: int | None) -> Folder:
    """Images whose classes are sub-folders, else prefixes of the names as in cat_1.png.

    Sub-folders train and test (or val), if there are both, are the splits; classes are
    numbered over both together.
    """
    root = _check_folder(path)
    if image_size is None:
        raise ValueError("image_size of a folder of images must be given, got None.")
    test = next((root / k for k in ("test", "val") if (root / k).is_dir()), None)
    parts = [root / "train", test] if test and (root / "train").is_dir() else [root]
    found = [find_images(part) for part in parts]
    paths = [*itertools.chain.from_iterable(found)]
    if not paths:
        raise ValueError(f"{root} must hold images, {SUFFIXES}, got none.")
    inside = zip(parts, found, strict=True)
    names = [path[len(str(part)) + 1 :] for part, of in inside for path in of]
    classes = _class_names(names)
    numbers = {name: i for i, name in enumerate(sorted(set(classes)))}
    labels = np.fromiter((numbers[name] for name in classes), np.int32, len(classes))
    held_out = np.arange(len(paths)) % 10 == 9
    if parts[1:]:
        held_out = np.repeat([False, True], [len(part) for part in found])
    rows = _rows_of(split, held_out)
    return Folder(_Strings(paths[i] for i in rows), labels[rows], image_size)


def _npz(split: str, path: Source, image_size: int | None) -> Arrays:
    """arr_0 and arr_1, as improved-diffusion writes, or images and labels; or .npy."""
    rule = f"{path} must be a .npz or .npy file of plain arrays"
    with reading(rule), Path(path or "").expanduser().open("rb") as file:
        data = np.load(file, allow_pickle=False)
        arrays = {"images": data} if isinstance(data, np.ndarray) else dict(data)
    keys = ("images", "labels") if "images" in arrays else ("arr_0", "arr_1")
    if keys[0] not in arrays:
        raise ValueError(f"{path} must have images or arr_0, got {list(arrays)}.")
    images, labels = check_arrays(arrays[keys[0]], arrays.get(keys[1]))
    rows = _rows_of(split, np.arange(len(images)) % 10 == 9)
    return images[rows], labels[rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds:
    """Records of TFDS, read and decoded when they are asked for."""

    records: Any  # their random-access source
    rule: str  # what they must be, for errors
    image_size: int | None  # to resize to

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        return self._decode([0])[0].shape[1:]

    @property
    def num_classes(self) -> int:
        """As many as are declared, be they in the split or not."""
        label = dict(self.records.dataset_info.features).get("label")
        found = 1 if label is None else getattr(label, "num_classes", None)
        if found is None:
            rule = "labels must be of a ClassLabel, or in_memory be True"
            raise ValueError(f"{rule}, got {label}.")
        return found

    @property
    def labels(self) -> np.ndarray:
        return self.read_all()[1]

    def _decode(self, rows: list[int]) -> Arrays:
        with reading(self.rule):
            images, labels = [], []
            for example in self.records.__getitems__(rows):
                image = example["image"]
                images.append(
                    _fit(image, self.image_size) if self.image_size else image
                )
                labels.append(example.get("label", 0))
            return check_arrays(np.stack(images), np.array(labels))

    def read(self, rows: np.ndarray) -> Arrays:
        """Decodes the images and labels of these rows."""
        none = np.empty((0, *self.image_shape), np.uint8), np.empty(0, np.int32)
        parts = [none, *in_threads(self._decode, rows)]
        with reading(self.rule):  # or else there are several shapes
            images, labels = zip(*parts, strict=True)
            return np.concatenate(images), np.concatenate(labels)

    def read_all(self) -> Arrays:
        return self.read(np.arange(len(self)))


def _prepared(path: Source) -> Path:
    """The folder of a version that is there as array_record, the newest one."""
    from tensorflow_datasets.core import Version

    # We look ourselves what is there: TFDS would ask the net, and wait for it.
    home = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    name, _, version = os.path.expanduser(path or "NAME").partition(":")
    folder = Path(home, name)
    infos = [
        f / "dataset_info.json" for f in (folder, *folder.glob(version or "[0-9]*"))
    ]
    infos = [f for f in infos if f.is_file() and '"array_record"' in f.read_text()]
    ready = [info.parent for info in infos]
    if not ready:
        command = PREPARE.format("NAME" if os.path.isabs(name) else name, home)
        raise ValueError(f"TFDS data must be prepared by `{command}`, got no {path}.")
    return folder if folder in ready else max(ready, key=lambda f: Version(f.name))


def _tfds(split: str, path: Source, image_size: int | None) -> Tfds:
    """A data set that TFDS prepared as array_record, read without TensorFlow.

    `path` is its name in $TFDS_DATA_DIR, or else in ~/tensorflow_datasets, as cifar10
    or cifar10:3.0.2; or its folder, as /data/cifar10 or /data/cifar10/3.0.2. Builders
    that yield PIL images prepare without TensorFlow; official ones need it once, for
    `PREPARE`.
    """
    with reading("this needs tensorflow-datasets, `pip install jax_diffusion[tfds]`"):
        import tensorflow_datasets as tfds
    folder = _prepared(path)
    rule = f"{folder} must have split {split!r} with images of one shape"
    with reading(rule):
        parts = "train+test" if split == "all" else split
        builder: Any = tfds.builder_from_directory(folder)
        return Tfds(builder.as_data_source(split=parts), rule, image_size)


LAZY: dict[str, Callable[..., Folder | Tfds]] = dict(folder=_folder, tfds=_tfds)


def _decoded(name: str) -> Callable[..., Arrays]:
    return lambda *args: LAZY[name](*args).read_all()


DATASETS: dict[str, Callable[..., Arrays]] = {k: _decoded(k) for k in LAZY}
DATASETS |= dict(digits=_digits, synthetic=_synthetic, idx=_idx, npz=_npz)
