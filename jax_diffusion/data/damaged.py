"""Images that cannot be decoded: finding them beforehand, and going on without them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from jax_diffusion.data.decode import in_threads
from jax_diffusion.data.examples import (
    Arrays,
    Batch,
    DamagedImageError,
    Examples,
    Wrapped,
)

T = TypeVar("T")
CHECKED_TOGETHER = 256  # images between two updates of the progress bar


class WithoutDamaged(Wrapped):
    """Examples with the next whole image, in stored order, in place of a damaged one.

    There are as many rows as before, the last of which is followed by the first, and
    what a row holds depends on the files alone: batches stay a function of (seed,
    step), in memory or not. Label and conditioning are those of the image that is
    read, while `labels`, `conditioning` and `counts` are those of all images, of
    damaged ones, too.

    Args:
        inner: the examples.
    """

    def __init__(self, inner: Examples):
        super().__init__(inner)
        self._damaged: dict[int, str] = {}

    @property
    def damaged(self) -> Mapping[int, str]:
        return self._damaged

    def read(self, rows: np.ndarray) -> Arrays:
        """Returns images and labels of whole images only.

        Raises:
            ValueError: if no image is whole.
        """
        return self._read_whole(self.inner.read, rows)

    def read_batch(self, rows: np.ndarray) -> Batch:
        """Returns images, labels and conditioning of whole images, as `read` does."""
        return self._read_whole(self.inner.read_batch, rows)

    def _read_whole(self, read: Callable[[np.ndarray], T], rows: np.ndarray) -> T:
        n = len(self)
        while True:
            taken = np.array(rows)
            for i, row in enumerate(rows if self.damaged else ()):
                after = (
                    k % n for k in range(row, row + n) if k % n not in self.damaged
                )
                if (found := next(after, None)) is None:
                    example = next(iter(self.damaged.values()))
                    raise ValueError(
                        f"the data must have a whole image, got none: {example}"
                    )
                taken[i] = found
            try:
                return read(taken)
            except DamagedImageError as error:
                damaged = find_damaged(self.inner, taken, DamagedImageError)
                if not damaged:  # neither whole nor not: a disk that fails at times
                    raise ValueError(f"{error}") from error
                self._damaged.update(damaged)


def find_damaged(
    examples: Examples, rows: np.ndarray, kind: type[ValueError] = ValueError
) -> Mapping[int, str]:
    """Reads each of some images by itself, and returns the errors by row.

    Args:
        examples: images that are read by row.
        rows: int [k].
        kind: which errors count; others are raised.
    """

    def read(some: list[int]) -> dict[int, str]:
        found = {}
        for row in some:
            try:
                examples.read(np.array([row]))
            except kind as error:
                found[row] = str(error)
        return found

    return {row: text for part in in_threads(read, rows) for row, text in part.items()}


def check_examples(examples: Examples) -> list[str]:
    """Reads all images, with a progress bar; returns a sentence for each that fails."""
    from tqdm import tqdm

    found: list[str] = []
    with tqdm(total=len(examples), unit="image", disable=None) as bar:
        for first in range(0, len(examples), CHECKED_TOGETHER):
            rows = np.arange(first, min(first + CHECKED_TOGETHER, len(examples)))
            found += find_damaged(examples, rows).values()
            bar.update(len(rows))
    return found
