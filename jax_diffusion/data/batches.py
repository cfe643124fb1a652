"""Batches of uint8 images that depend on (seed, step) alone.

A batch is a function of its step, so a resumed run needs no iterator state, and hosts
that ask for some rows of it agree on the whole. All randomness comes from
`data.philox`.
"""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from jax_diffusion import checks
from jax_diffusion.data import philox
from jax_diffusion.data.conditioning import CONDITIONING, as_conditioning
from jax_diffusion.data.examples import Batch, Examples, InMemory
from jax_diffusion.registry import hint

THREADS = 2  # that make batches ahead, each with decoders on all cores
PREFETCH_BATCHES = 4  # batches that are made ahead


@functools.lru_cache(maxsize=4)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.argsort(philox.draw(philox.ORDER, seed, epoch, n), kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a data set, made and checked by `from_arrays` and `load`.

    In training, epoch e visits the examples in an order drawn from (seed, e), and batch
    `step` is examples [step * b, (step + 1) * b) of the epochs laid end to end: it may
    straddle two epochs, nothing repeats within an epoch and nothing is dropped. In
    evaluation, batches follow the stored order, once, and the last one may be short.

    Iteration is `stream(start_step)`.

    Attributes:
        examples: the images and labels, in memory or decoded when they are asked for.
        batch_size: images in a batch, b.
        seed: of order and flips.
        train: endless and shuffled, instead of one pass in the stored order.
        flip: mirror each image with probability 1/2, in training only.
        start_step: the step of the first batch of an iteration.
        conditioning_names: the conditioning that batches have; None for all there is.
    """

    examples: Examples
    batch_size: int
    seed: int
    train: bool
    flip: bool
    start_step: int
    conditioning_names: tuple[str, ...] | None = None

    @classmethod
    def checked(
        cls,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        flip: bool,
        start_step: int,
    ) -> "Batches":
        """Makes batches after a check of the numbers; raises ValueError."""
        n = len(examples)
        if train and isinstance(batch_size, int | np.integer) and batch_size > n:
            raise ValueError(
                f"batch_size must be an integer in [1, {n}], the number of training "
                f"images, got {batch_size}."
            )
        checks.integer(
            "batch_size",
            batch_size,
            at_least=1,
            at_most=n if train else None,
        )
        checks.integer("seed", seed, at_least=0)
        checks.integer("start_step", start_step, at_least=0)
        for name, value in (("train", train), ("flip", flip)):
            checks.boolean(name, value)
        return cls(examples, batch_size, seed, train, flip, start_step)

    @property
    def num_examples(self) -> int:
        """Number of images, n."""
        return len(self.examples)

    @property
    def num_classes(self) -> int:
        """Number of classes: the largest label plus one, or as a data set declares."""
        return self.examples.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """What the labels are called; None where they are numbers only."""
        return self.examples.class_names

    @property
    def labeled(self) -> bool:
        """Whether the labels mean anything; without, all are 0."""
        return self.examples.labeled

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c)."""
        return self.examples.image_shape

    @property
    def conditioning(self) -> dict[str, np.ndarray]:
        """All vectors and tokens that batches have, [n, ...] by name."""
        return self._wanted(self.examples.conditioning)

    @property
    def stored_conditioning(self) -> dict[str, np.ndarray]:
        """The same as the files have it, in memory or not, for records of the data."""
        return self._wanted(self.examples.stored_conditioning)

    def _wanted(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = self.conditioning_names
        return {k: a for k, a in found.items() if names is None or k in names}

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded already."""
        return isinstance(self.examples, InMemory)

    @property
    def images(self) -> np.ndarray:
        """All images, uint8 [n h w c]; decoded for this unless they are in memory."""
        return self.examples.read_all()[0]

    @property
    def labels(self) -> np.ndarray:
        """All labels, int32 [n]; those of TFDS are read with the images."""
        return self.examples.labels

    def beside(self, rows: np.ndarray) -> Batch:
        """Returns "label" and conditioning of these rows, int [k], without images."""
        more = {name: array[rows] for name, array in self.conditioning.items()}
        return {"label": self.labels[rows], **more}

    def read(self, rows: np.ndarray) -> Batch:
        """Returns a batch of these rows of the data, int [k], as they are stored."""
        batch = self.examples.read_batch(rows)
        wanted = ("image", "label", *self.conditioning)
        return {name: batch[name] for name in wanted}

    def batch(self, step: int, rows: Any = None) -> Batch:
        """Returns batch number `step`: {"image": uint8 [b h w c], "label": int32 [b]}.

        Conditioning stands beside them by its names, see `data.conditioning`.

        Args:
            step: integer >= 0, and within the data unless `train`.
            rows: increasing positions in [0, batch_size), default all. Only these are
                decoded and returned, equal to those rows of the whole batch, so each
                host may ask for its own. A short last batch has no more than its rows.

        Raises:
            ValueError: if an argument is out of range or an image cannot be decoded.
        """
        n, b = self.num_examples, self.batch_size
        if step < 0 or (not self.train and step * b >= n):
            raise ValueError(f"step must be >= 0 and in the data, got {step}.")
        chosen = np.arange(step * b, min((step + 1) * b, n))
        if self.train:
            epoch, offset = divmod(step * b, n)
            chosen = _permutation(self.seed, epoch, n)[offset : offset + b]
            if len(chosen) < b:  # the next epoch has enough: b <= n
                more = _permutation(self.seed, epoch + 1, n)[: b - len(chosen)]
                chosen = np.append(chosen, more)
        rows = _check_rows(rows, b)
        rows = rows[: np.searchsorted(rows, len(chosen))]
        batch = self.read(chosen[rows])
        if self.flip and self.train:  # drawn for all rows, whoever asks
            flips = philox.draw(philox.FLIP, self.seed, step, b)[rows] % 2
            # Moving pixels whole takes half the time of moving their bytes.
            images, flipped = batch["image"], np.flatnonzero(flips)
            pixels = images.view(f"V{images.shape[-1]}")
            pixels[flipped] = pixels[flipped, :, ::-1]
        return batch

    def stream(self, first: int, rows: Any = None) -> Generator[Batch, None, None]:
        """Yields batches first, first + 1, ...: endless in training, else to the last.

        Unless the images are in memory, threads decode the next few batches meanwhile.
        They begin with the first `next` and end when the generator is closed, by its
        `close()` or because nothing refers to it any more.

        Args:
            first: the step of the first batch, >= 0.
            rows: as in `batch`.

        Raises:
            ValueError: if an argument is out of range; while iterating, if an image
                cannot be decoded or grain, which reads ahead, is not installed.
        """
        if first < 0:
            raise ValueError(f"first must be >= 0, got {first}.")
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
    """Returns positions in a batch as an array; None means all."""
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
    """Yields make(step) of every step, made ahead by threads that end with it."""
    try:
        import grain
    except ImportError as error:
        rule = "reading ahead needs grain, `pip install 'jax_diffusion[grain]'`"
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
    **conditioning: Any,
) -> Batches:
    """Makes batches of images that are in memory.

    Args:
        images: uint8 [n h w c] or [n h w].
        labels: integers [n]; without them, all are 0.
        batch_size: images in a batch, b; at most n in training.
        seed: of order and flips, >= 0.
        train: endless and shuffled, instead of one pass in order.
        flip: mirror each image left to right with probability 1/2. Right only where
            such an image could be one of the data: not for digits and letters, and not
            for Fashion-MNIST, whose shoes nearly all point to the left. Ignored unless
            `train`, so that one config serves both: evaluation sees images as they are.
        start_step: where iteration starts, to resume a run.
        conditioning: cond [n, d], tokens [n, k, d], tokens_mask bool [n, k]: what a
            network is told of each image, see `data.conditioning`.

    Raises:
        ValueError: if an argument is not as described or out of range.

    >>> batches = from_arrays(np.zeros((5, 8, 8, 3), np.uint8), batch_size=2)
    >>> batches.batch(7)["image"].shape, batches.num_classes
    ((2, 8, 8, 3), 1)
    """
    for name in conditioning:
        if name not in CONDITIONING:
            raise ValueError(f"there is no option {name!r}{hint(name, CONDITIONING)}")
    found = InMemory.of((images, labels))
    more = as_conditioning(conditioning, len(found))
    return Batches.checked(
        dataclasses.replace(found, conditioning=more),
        batch_size=batch_size,
        seed=seed,
        train=train,
        flip=flip,
        start_step=start_step,
    )
