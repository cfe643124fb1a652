"""Images for training and evaluation: uint8 batches that depend on (seed, step) alone.

Images are uint8 [n h w c], decoded once into memory; `from_uint8` and `to_uint8` take
them to float32 and back. A batch is a function of its step, so a resumed run needs no
iterator state and hosts that slice it agree on the whole. All randomness is raw Philox
output: unlike the methods of `Generator`, NumPy promises never to change it.
"""

import contextlib
import dataclasses
import difflib
import functools
import glob
import gzip
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]  # images, labels
Source = str | os.PathLike | None  # where the data are

SPLITS = ("train", "test", "all")
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
_ORDER, _FLIP, _DISCS = range(3)  # one stream of random numbers for each purpose


def from_uint8(images: Any) -> Any:
    """Scales uint8 to float32 in [-1, 1], x / 127.5 - 1; for NumPy and JAX arrays."""
    if images.dtype != np.uint8:
        raise ValueError(f"images to scale must be uint8, got {images.dtype}.")
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(x: Any) -> np.ndarray:
    """Scales [-1, 1] to uint8, (x + 1) * 127.5 clipped to [0, 255] and truncated.

    As improved-diffusion does; no exact inverse of `from_uint8`: in float32, 1..63 come
    back as 0..62. So compare samples with real images as they are stored.
    """
    return ((np.asarray(x, np.float32) + 1) * 127.5).clip(0, 255).astype(np.uint8)


def _draw(stream: int, seed: int, index: int, count: int) -> np.ndarray:
    """Draws uint64 [count] keyed by (seed, index); streams are 2^192 blocks apart."""
    key, counter = (np.array(v, np.uint64) for v in ([seed, index], [0, 0, 0, stream]))
    return np.random.Philox(key=key, counter=counter).random_raw(count)


@functools.lru_cache(maxsize=4)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.argsort(_draw(_ORDER, seed, epoch, n), kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a dataset in memory, made and checked by `from_arrays` and `load`.

    In training, epoch e visits the examples in an order drawn from (seed, e), and batch
    `step` is examples [step * b, (step + 1) * b) of the epochs laid end to end: it may
    straddle two, nothing repeats within an epoch and nothing is dropped. In evaluation,
    batches follow the stored order, once, and the last one may be short.
    """

    images: np.ndarray  # uint8 [n h w c]
    labels: np.ndarray  # int32 [n]
    batch_size: int
    seed: int
    train: bool
    flip: bool
    start_step: int

    @property
    def num_examples(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`: {"image": uint8 [b h w c], "label": int32 [b]}."""
        n, b = self.num_examples, self.batch_size
        if step < 0 or (not self.train and step * b >= n):
            raise ValueError(f"step must be at least 0 and in the data, got {step}.")
        rows = np.arange(step * b, min((step + 1) * b, n))
        if self.train:
            epoch, offset = divmod(step * b, n)
            rows = _permutation(self.seed, epoch, n)[offset : offset + b]
            more = _permutation(self.seed, epoch + 1, n)[: b - len(rows)]
            rows = np.append(rows, more)  # that is enough: b <= n
        images = self.images.take(rows, axis=0)
        if self.flip and self.train:
            chosen = np.flatnonzero(_draw(_FLIP, self.seed, step, b) % 2)
            # Moving pixels whole takes half the time of moving their bytes.
            pixels = images.view(f"V{images.shape[-1]}")
            pixels[chosen] = pixels[chosen, :, ::-1]
        return {"image": images, "label": self.labels.take(rows)}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        steps = range(self.start_step, -(-self.num_examples // self.batch_size))
        return map(self.batch, itertools.count(steps.start) if self.train else steps)


def from_arrays(
    images: Any,
    labels: Any = None,
    *,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    flip: bool = False,
    start_step: int = 0,
) -> Batches:
    """Batches of images in memory, [n h w c] or [n h w]; without labels, all are 0.

    Args:
        train: endless and shuffled, instead of one pass in order.
        flip: mirror each example with probability 1/2. Ignored unless `train`, so that
            one config serves both: evaluation sees images as they are.
        start_step: where iteration starts, to resume a run.

    Raises:
        ValueError: if an argument is not as described or out of range.
    """
    images, labels = _checked(images, labels)
    if batch_size < 1 or (train and batch_size > len(images)):
        raise ValueError(f"batch_size must be in [1, {len(images)}], got {batch_size}.")
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, got {seed}, {start_step}.")
    return Batches(images, labels, batch_size, seed, train, flip, start_step)


def load(
    name: str,
    split: str = "train",
    *,
    path: Source = None,
    image_size: int | None = None,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    flip: bool = False,
    start_step: int = 0,
) -> Batches:
    """Decodes one split of a dataset into memory.

    Args:
        name: a key of `DATASETS`.
        split: "train", "test" or "all"; for "tfds" also the dataset's own names.
        path: where the data are; for "tfds" the dataset's name, as "cifar10:3.0.2".
        image_size: side of the square images. "folder" needs it and "tfds" may have it,
            to resize to; "synthetic" draws at it; others only check it.
        batch_size, seed, train, flip, start_step: as in `from_arrays`.

    Raises:
        ValueError: if an argument is out of range or the data are not as they must be.
    """
    _check_choice("dataset", name, tuple(DATASETS))
    if name != "tfds":
        _check_choice("split", split, SPLITS)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}.")
    images, labels = DATASETS[name](split, path, image_size)
    options = dict[str, Any](seed=seed, train=train, flip=flip, start_step=start_step)
    batches = from_arrays(images, labels, batch_size=batch_size, **options)
    h, w, _ = batches.image_shape
    if image_size is not None and (h, w) != (image_size, image_size):
        raise ValueError(f"image_size of {name} must be {h} x {w}, got {image_size}.")
    return batches


def _checked(images: Any, labels: Any) -> Arrays:
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


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{hint}")


def _check_folder(path: Source) -> Path:
    if not path or not Path(path).expanduser().is_dir():
        raise ValueError(f"config.data.path must be a folder for this, got {path}.")
    return Path(path).expanduser()


@contextlib.contextmanager
def _reading(rule: str) -> Iterator[None]:
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
    """The 1,797 digits of scikit-learn, 8 x 8 x 1."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    rows = _rows_of(split, np.arange(len(images)) % 10 == 9)
    return images[rows], labels[rows]


def _synthetic(split: str, path: Source, image_size: int | None) -> Arrays:
    """512 soft discs on a darker ground; the label is the colour of the disc."""
    seeds = {"train": [0], "test": [1]}.get(split, [0, 1])
    draws = np.concatenate([_draw(_DISCS, seed, 0, 512 * 6) for seed in seeds])
    colours = np.array([[240, 80, 60], [80, 220, 100], [90, 110, 250], [250, 220, 80]])
    labels = np.arange(512 * len(seeds)) % len(colours)
    x, images = np.linspace(0, 1, image_size or 16), []
    for colour, u in zip(colours[labels], draws.reshape(-1, 6) / 2.0**64, strict=True):
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
    with _reading(f"{file} must be a whole file"):
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
        parts.append(_checked(images, _read_idx(folder, f"{stem}-labels", 1)))
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


def _decode(file: Path, size: int) -> np.ndarray:
    """Reads a file as uint8 [size size c]; c is 1 if the file is greyscale, else 3."""
    from PIL import Image, ImageOps

    with _reading(f"{file} must be a whole image"), Image.open(file) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
            return _fit((np.asarray(image) >> 8).astype(np.uint8)[..., None], size)
        if image.mode in ("1", "L", "LA"):
            return _fit(np.asarray(image.convert("L"))[..., None], size)
        if image.mode == "P":  # straight to RGB, PIL warns of transparent colours
            image = image.convert("RGBA")
        return _fit(np.asarray(image.convert("RGB")), size)


def _class_names(files: list[Path]) -> list[str]:
    if all(len(file.parts) > 1 for file in files):
        return [file.parts[0] for file in files]
    marked = all("_" in file.name for file in files)
    return [file.name.split("_")[0] if marked else "" for file in files]


def _folder(split: str, path: Source, image_size: int | None) -> Arrays:
    """Images whose classes are sub-folders, else prefixes of the names as in cat_1.png.

    Sub-folders train and test (or val), if there are both, are the splits; classes are
    numbered over both together.
    """
    root, found = _check_folder(path), []
    if image_size is None:
        raise ValueError("image_size of a folder of images must be given, got None.")
    test = next((root / k for k in ("test", "val") if (root / k).is_dir()), None)
    parts = [root / "train", test] if test and (root / "train").is_dir() else [root]
    for part in parts:  # glob follows links, as rglob does not, and skips hidden files
        names = sorted(map(Path, glob.glob("**", root_dir=part, recursive=True)))
        found += [(part, name) for name in names if name.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"{root} must hold images, {SUFFIXES}, got none.")
    _, labels = np.unique(_class_names([f for _, f in found]), return_inverse=True)
    held_out = np.array([part == test for part, _ in found])
    rows = _rows_of(split, held_out if parts[1:] else np.arange(len(found)) % 10 == 9)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda i: _decode(Path(*found[i]), image_size), rows))
    shape = image_size, image_size, max(image.shape[-1] for image in images)
    return np.stack([np.broadcast_to(x, shape) for x in images]), labels[rows]


def _npz(split: str, path: Source, image_size: int | None) -> Arrays:
    """arr_0 and arr_1, as improved-diffusion writes, or images and labels; or .npy."""
    rule = f"{path} must be a .npz or .npy file of plain arrays"
    with _reading(rule), Path(path or "").expanduser().open("rb") as file:
        data = np.load(file, allow_pickle=False)
        arrays = {"images": data} if isinstance(data, np.ndarray) else dict(data)
    keys = ("images", "labels") if "images" in arrays else ("arr_0", "arr_1")
    if keys[0] not in arrays:
        raise ValueError(f"{path} must have images or arr_0, got {list(arrays)}.")
    images, labels = _checked(arrays[keys[0]], arrays.get(keys[1]))
    rows = _rows_of(split, np.arange(len(images)) % 10 == 9)
    return images[rows], labels[rows]


def _tfds(split: str, path: Source, image_size: int | None) -> Arrays:
    """A dataset prepared by TFDS as array_record, which is read without TensorFlow."""
    with _reading("this needs tensorflow-datasets, `pip install jax_diffusion[tfds]`"):
        import tensorflow_datasets as tfds
    # We look ourselves what is there: TFDS would ask the net, and wait for it.
    home = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    name, _, version = str(path or "NAME").partition(":")
    infos = Path(home, name).glob(f"{version or '[0-9]*'}/dataset_info.json")
    ready = [f.parent.name for f in infos if '"array_record"' in f.read_text()]
    if not ready:
        command = f"tfds build {name} --file_format=array_record --data_dir={home}"
        raise ValueError(f"TFDS data must be prepared by `{command}`, got no {path}.")
    name = f"{name}:{max(ready, key=tfds.core.Version)}"
    images, labels = [], []
    with _reading(f"{name} must have split {split!r} with images of one shape"):
        parts = "train+test" if split == "all" else split
        source: Any = tfds.data_source(name, split=parts, data_dir=home, download=False)
        rows = list(range(len(source)))
        for start in range(0, len(rows), 1000):
            for example in source.__getitems__(rows[start : start + 1000]):
                image = example["image"]
                images.append(_fit(image, image_size) if image_size else image)
                labels.append(example.get("label", 0))
        return np.stack(images), np.array(labels)


DATASETS: dict[str, Callable[..., Arrays]] = dict(
    digits=_digits, synthetic=_synthetic, idx=_idx, folder=_folder, npz=_npz, tfds=_tfds
)
