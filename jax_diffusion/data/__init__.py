"""Images for training and evaluation: uint8 batches that depend on (seed, step) alone.

Images are uint8 [n h w c], in memory or decoded when they are asked for; `from_uint8`
and `to_uint8` take them to float32 and back. A batch is a function of its step, so a
resumed run needs no iterator state, and hosts that ask for some rows of it agree on the
whole. All randomness is raw Philox output: unlike the methods of `Generator`, NumPy
promises never to change it.
"""

import dataclasses
import difflib
import functools
import math
import sys
import threading
from collections.abc import Callable, Collection, Generator
from typing import Any

import numpy as np

from jax_diffusion.data import sources

Arrays = sources.Arrays  # these are part of what this module offers
Source = sources.Source
DATASETS = sources.DATASETS
SPLITS = sources.SPLITS

Batch = dict[str, np.ndarray]  # {"image": uint8 [b h w c], "label": int32 [b]}

MAX_IN_MEMORY = 2 * 2**30  # bytes of images that `load` decodes unless told to
THREADS = 2  # that make batches ahead, each with decoders on all cores
PREFETCH_BATCHES = 4  # batches that are made ahead
ROUNDINGS = ("floor", "round")


def from_uint8(images: Any) -> Any:
    """Scales uint8 to float32 in [-1, 1], x / 127.5 - 1; for NumPy and JAX arrays."""
    if images.dtype != np.uint8:
        raise ValueError(f"images to scale must be uint8, got {images.dtype}.")
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(x: Any, rounding: str = "floor") -> np.ndarray:
    """Scales [-1, 1] to uint8, (x + 1) * 127.5 clipped to [0, 255].

    "round" is the exact inverse of `from_uint8`; in float32, "floor" takes 1..63 to
    0..62. So compare samples with real images as they are stored.

    Args:
        rounding: "floor" truncates, as the codes of Ho et al. and OpenAI do; "round"
            takes the nearest, as that of DDIM.

    Raises:
        ValueError: for another rounding.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}.")
    half = 0.5 if rounding == "round" else 0.0
    scaled = (np.asarray(x, np.float32) + 1) * 127.5 + half
    return scaled.clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.argsort(sources.draw(sources.ORDER, seed, epoch, n), kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """Decoded images and their labels, as `check_arrays` returns them."""

    images: np.ndarray  # uint8 [n h w c]
    labels: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    def read(self, rows: np.ndarray) -> Arrays:
        """Copies of the images and labels of these rows."""
        return self.images.take(rows, axis=0), self.labels.take(rows)

    def read_all(self) -> Arrays:
        return self.images, self.labels


Examples = InMemory | sources.Folder | sources.Tfds


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a data set, made and checked by `from_arrays` and `load`.

    In training, epoch e visits the examples in an order drawn from (seed, e), and batch
    `step` is examples [step * b, (step + 1) * b) of the epochs laid end to end: it may
    straddle two, nothing repeats within an epoch and nothing is dropped. In evaluation,
    batches follow the stored order, once, and the last one may be short.

    Iteration is `stream(start_step)`.
    """

    examples: Examples
    batch_size: int
    seed: int
    train: bool
    flip: bool
    start_step: int

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @property
    def num_classes(self) -> int:
        return self.examples.num_classes

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.examples.image_shape

    @property
    def in_memory(self) -> bool:
        return isinstance(self.examples, InMemory)

    @property
    def images(self) -> np.ndarray:
        """All images, uint8 [n h w c]; decoded for this unless they are in memory."""
        return self.examples.read_all()[0]

    @property
    def labels(self) -> np.ndarray:
        """All labels, int32 [n]; those of TFDS are read with the images."""
        return self.examples.labels

    def batch(self, step: int, rows: Any = None) -> Batch:
        """Batch number `step`: {"image": uint8 [b h w c], "label": int32 [b]}.

        Args:
            step: from 0, and within the data unless `train`.
            rows: increasing positions in [0, batch_size), default all. Only these are
                decoded and returned, equal to those rows of the whole batch, so each
                host may ask for its own. A short last batch has no more than its rows.

        Raises:
            ValueError: if an argument is out of range or an image cannot be decoded.
        """
        n, b = self.num_examples, self.batch_size
        if step < 0 or (not self.train and step * b >= n):
            raise ValueError(f"step must be at least 0 and in the data, got {step}.")
        chosen = np.arange(step * b, min((step + 1) * b, n))
        if self.train:
            epoch, offset = divmod(step * b, n)
            chosen = _permutation(self.seed, epoch, n)[offset : offset + b]
            if len(chosen) < b:  # the next epoch has enough: b <= n
                more = _permutation(self.seed, epoch + 1, n)[: b - len(chosen)]
                chosen = np.append(chosen, more)
        rows = _check_rows(rows, b)
        rows = rows[: np.searchsorted(rows, len(chosen))]
        images, labels = self.examples.read(chosen[rows])
        if self.flip and self.train:  # drawn for all rows, whoever asks
            flips = sources.draw(sources.FLIP, self.seed, step, b)[rows] % 2
            # Moving pixels whole takes half the time of moving their bytes.
            pixels, flipped = images.view(f"V{images.shape[-1]}"), np.flatnonzero(flips)
            pixels[flipped] = pixels[flipped, :, ::-1]
        return {"image": images, "label": labels}

    def stream(self, first: int, rows: Any = None) -> Generator[Batch, None, None]:
        """Batches first, first + 1, ...: without end in training, else to the last one.

        Unless the images are in memory, threads decode the next few batches meanwhile.
        They begin with the first `next` and end when the generator is closed, by its
        `close()` or because nothing refers to it any more.

        Args:
            first: the step of the first batch.
            rows: as in `batch`.
        """
        if first < 0:
            raise ValueError(f"first must be at least 0, got {first}.")
        make = self.batch
        if rows is not None:
            rows = _check_rows(rows, self.batch_size)
            make = functools.partial(self.batch, rows=rows)
        end = sys.maxsize if self.train else -(-self.num_examples // self.batch_size)
        steps = range(first, end)
        if self.in_memory:
            return (make(step) for step in steps)
        return _read_ahead(make, steps)

    def __iter__(self) -> Generator[Batch, None, None]:
        return self.stream(self.start_step)


def _check_rows(rows: Any, batch_size: int) -> np.ndarray:
    """Positions in a batch as an array; None means all."""
    every = np.arange(batch_size)
    if rows is None:
        return every
    found = np.asarray(rows)
    valid = np.array_equal(found, np.intersect1d(found, every))  # which sorts
    if not valid or found.dtype.kind not in "iu":
        raise ValueError(
            f"rows must be integers that increase in [0, {batch_size}), got {rows!r}."
        )
    return found


def _read_ahead(
    make: Callable[[int], Batch], steps: range
) -> Generator[Batch, None, None]:
    """make(step) of every step, made ahead by threads that end with the generator."""
    try:
        import grain
    except ImportError as error:
        rule = "reading ahead needs grain, `pip install jax_diffusion[grain]`"
        raise ValueError(f"{rule}, got {error!r}.") from error
    threads, closing = set(), threading.Event()

    def work(step: int) -> Any:
        threads.add(threading.current_thread())
        return None if closing.is_set() else make(step)

    # The default would make 500 batches ahead, on 16 threads.
    options = grain.ReadOptions(
        num_threads=THREADS, prefetch_buffer_size=PREFETCH_BATCHES
    )
    made = grain.MapDataset.range(steps.start, steps.stop).map(work)
    batches = iter(made.to_iter_dataset(options))
    try:
        yield from batches
    finally:
        closing.set()
        batches.close()  # which does not wait for batches that are begun
        for thread in list(threads):
            thread.join()


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
    examples = InMemory(*sources.check_arrays(images, labels))
    return _batches(examples, batch_size, seed, train, flip, start_step)


def load(
    name: str,
    split: str = "train",
    *,
    path: Source = None,
    image_size: int | None = None,
    in_memory: bool | None = None,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    flip: bool = False,
    start_step: int = 0,
) -> Batches:
    """Opens one split of a data set, decoded into memory if it fits.

    Args:
        name: a key of `DATASETS`.
        split: "train", "test" or "all"; for "tfds" also the data set's own names.
        path: where the data are; for "tfds" a name, as "cifar10:3.0.2", or a folder.
        image_size: side of the square images. "folder" needs it and "tfds" may have it,
            to resize to; "synthetic" draws at it; others only check it.
        in_memory: decode all images now, instead of those of a batch when it is asked
            for, which "folder" and "tfds" can. The batches are the same. By default,
            these two are decoded now up to `MAX_IN_MEMORY` bytes (2 GiB), and the
            others always.
        batch_size, seed, train, flip, start_step: as in `from_arrays`.

    Raises:
        ValueError: if an argument is out of range or the data are not as they must be.
    """
    _check_choice("dataset", name, tuple(DATASETS))
    if name != "tfds":
        _check_choice("split", split, SPLITS)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}.")
    examples = _open(name, split, path, image_size, in_memory)
    batches = _batches(examples, batch_size, seed, train, flip, start_step)
    h, w, _ = batches.image_shape
    if image_size is not None and (h, w) != (image_size, image_size):
        raise ValueError(f"image_size of {name} must be {h} x {w}, got {image_size}.")
    return batches


def _open(
    name: str,
    split: str,
    path: Source,
    image_size: int | None,
    in_memory: bool | None,
) -> Examples:
    """Examples of a split, decoded if they are to be in memory."""
    if name not in sources.LAZY:
        if in_memory is False:
            raise ValueError(
                f"in_memory must be None or True for {name!r}, got {in_memory}: only "
                f"{tuple(sources.LAZY)} are decoded when asked for."
            )
        return InMemory(*sources.check_arrays(*DATASETS[name](split, path, image_size)))
    examples = sources.LAZY[name](split, path, image_size)
    if in_memory is None:
        in_memory = len(examples) * math.prod(examples.image_shape) <= MAX_IN_MEMORY
    if not in_memory:
        return examples
    return InMemory(*sources.check_arrays(*examples.read_all()))


def _batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    train: bool,
    flip: bool,
    start_step: int,
) -> Batches:
    n = len(examples)
    if batch_size < 1 or (train and batch_size > n):
        raise ValueError(f"batch_size must be in [1, {n}], got {batch_size}.")
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed and start_step must be >= 0, got {seed}, {start_step}.")
    return Batches(examples, batch_size, seed, train, flip, start_step)


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{hint}")
