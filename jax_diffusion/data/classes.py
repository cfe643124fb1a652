"""Names of classes: their order, and labels that mean the same in two places.

A label is a number, and what it means depends on who has numbered the classes. Where
both sides know names, labels are matched by name; else numbers must do, and they are
checked against the range that a network knows.
"""

import dataclasses
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from jax_diffusion.data.examples import Arrays, Batch, Examples, InMemory, Wrapped

Names = tuple[str, ...]

LOGGER = logging.getLogger("jax_diffusion.data")
SHOWN = 10  # classes that a line lists, at most


def class_order(names: Iterable[str]) -> Names:
    """Sorts the names of classes, each once: numbers as numbers, then the rest as text.

    >>> class_order(["10", "9", "cat", "9", "ant"])
    ('9', '10', 'ant', 'cat')
    """
    return tuple(
        sorted({*names}, key=lambda name: (not is_number(name), _value(name), name))
    )


def is_number(name: str) -> bool:
    """Tells whether a name consists of digits."""
    return name.isascii() and name.isdecimal()


def _value(name: str) -> int:
    return int(name) if is_number(name) else 0


def numbers_called(names: Sequence[str] | None) -> list[int] | None:
    """Returns the numbers that are the names of classes; None unless all are numbers.

    None also if two names are the same number, or one is too large for a label.

    >>> numbers_called(["1", "02"]), numbers_called(["1", "cat"])
    ([1, 2], None)
    """
    if not names or not all(is_number(name) for name in names):
        return None
    found = [int(name) for name in names]
    return found if len({*found}) == len(found) and max(found) < 2**31 else None


def in_words(names: Collection[Any], most: int = 5) -> str:
    """Lists names, shortened where there are many: "ant, bee, ... (12)"."""
    shown = [printable(str(name)) for name in list(names)[:most]]
    rest = [f"... ({len(names)})"] if len(names) > most else []
    return ", ".join([*shown, *rest])


def printable(name: str) -> str:
    """Returns a name without line breaks or bytes that are no text."""
    return name if name.isprintable() else ascii(name)[1:-1]


class Relabeled(Wrapped):
    """Examples whose labels are numbered otherwise.

    Args:
        inner: images and labels.
        table: int32 [k], the new number of each class.
        class_names: by new number, if they have names.
    """

    def __init__(self, inner: Examples, table: np.ndarray, class_names: Names | None):
        super().__init__(inner)
        self._table, self._class_names = table, class_names

    @property
    def labels(self) -> np.ndarray:
        return self._table[self.inner.labels]

    @property
    def class_names(self) -> Names | None:
        return self._class_names

    @property
    def num_classes(self) -> int:
        names = self._class_names
        return int(self._table.max()) + 1 if names is None else len(names)

    def counts(self) -> np.ndarray | None:
        found = self.inner.counts()
        if found is None:
            return None
        known = self._table[: len(found)]
        used, n = found > 0, self.num_classes
        return np.bincount(known[used], found[used], minlength=n).astype(int)

    def read(self, rows: np.ndarray) -> Arrays:
        images, labels = self.inner.read(rows)
        return images, self._table[labels]

    def read_batch(self, rows: np.ndarray) -> Batch:
        batch = self.inner.read_batch(rows)
        return {**batch, "label": self._table[batch["label"]]}


def match(examples: Examples, class_names: Names | None, field: str) -> Examples:
    """Numbers the classes of examples as `class_names` does, by name.

    Args:
        examples: images and labels.
        class_names: names by label; None leaves the labels as they are. If the
            examples have no names, their labels are taken for names where all of these
            are numbers, and stay as they are elsewhere.
        field: what the examples are, for errors.

    Raises:
        ValueError: if they have images of a class that is not among these.
    """
    own, called = examples.class_names, numbers_called(class_names)
    if own is None and class_names is not None and called:
        most = examples.num_classes  # one more than the largest label, which is large
        if most > max(called) + 1:
            raise ValueError(
                f"{field} must be of the classes {in_words(class_names)}, got labels "
                f"up to {most - 1}."
            )
        own, class_names = range(most), tuple(class_names)
        table = np.full(most, -1, np.int32)
        for i, number in enumerate(called):
            if number < most:
                table[number] = i
    elif own is None or class_names is None or own == class_names:
        return examples
    else:
        table = label_table(own, class_names)
    counts = examples.counts()
    used = np.ones(len(own), bool) if counts is None else counts > 0
    unknown = [own[i] for i in np.flatnonzero(used & (table < 0))]
    if unknown:
        raise ValueError(
            f"{field} must be of the classes {in_words(class_names)}, got "
            f"{in_words(unknown)}."
        )
    return _renumbered(examples, table, class_names)


def fit_labels(
    examples: Examples,
    class_names: Names | None,
    num_labels: int,
    field: str,
    remedy: str = "",
) -> Examples:
    """Returns the examples with the labels that a network has for their classes.

    Args:
        examples: images and labels.
        class_names: what the labels of the network are called, if that is known; then
            classes are matched by name. Else the names of the examples' classes must
            be numbers, which are the labels then.
        num_labels: how many labels the network knows.
        field: what the examples are, for errors.
        remedy: end of the errors, such as "; give `label` instead".

    Raises:
        ValueError: if there are no labels, or some that the network does not know.
    """
    rule = f"{field} must have labels that the network knows"
    own = examples.class_names
    told = own and (own[0] in class_names if class_names else is_number(own[0]))
    if not examples.labeled and not told and not (own and num_labels == 1):
        raise ValueError(f"{rule}, got images without labels{remedy}.")
    if class_names is None and own is not None:
        if not all(is_number(name) for name in own):
            raise ValueError(
                f"{rule}, got the classes {in_words(own)} for a network whose classes "
                f"have numbers only{remedy}."
            )
        table = np.minimum([_value(name) for name in own], 2**31 - 1).astype(np.int32)
        examples = _renumbered(examples, table, None)
    elif class_names is not None:
        examples = match(examples, class_names[:num_labels], field)
    counts = examples.counts()
    most = examples.num_classes if counts is None else int(examples.labels.max()) + 1
    if most > num_labels:
        raise ValueError(
            f"labels of the {field} must be below {num_labels}, got {most - 1}{remedy}."
        )
    return examples


def tell(what: str, examples: Examples) -> None:
    """Logs what was read, for programs to print; see `describe`."""
    LOGGER.info("%s", f"{printable(what)}: {describe(examples)}")


def describe(examples: Examples) -> str:
    """Says in one line what a source holds: images, shape, classes, what is left out.

    Of conditioning it names the shape for one image.

    >>> images, labels = np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 1])
    >>> describe(InMemory(images, labels, class_names=("cat", "dog")))
    '3 images of 8 x 8 x 1, 2 classes (cat 1, dog 2)'
    """
    shape = " x ".join(map(str, examples.image_shape))
    line = f"{len(examples):,} image{'s' * (len(examples) != 1)} of {shape}, "
    if not examples.labeled:
        line += "no labels"
    else:
        counts, names = examples.counts(), examples.class_names
        n = examples.num_classes
        shown = [printable(str(name)) for name in (names or range(n))[:SHOWN]]
        if counts is not None:
            first = counts[:SHOWN].tolist()
            shown = [f"{k} {c:,}" for k, c in zip(shown, first, strict=False)]
        listed = ", ".join([*shown, *["..."] * (n > SHOWN)])
        line += f"{n:,} class{'es' * (n != 1)} ({listed})"
    for name, array in examples.conditioning.items():
        if array.dtype != bool:
            line += f", {name} of {' x '.join(map(str, array.shape[1:]))}"
    return line + (f"; left out: {examples.left_out}" if examples.left_out else "")


def _renumbered(
    examples: Examples, table: np.ndarray, class_names: Names | None
) -> Examples:
    if isinstance(examples, InMemory):
        labels = table[examples.labels]
        return dataclasses.replace(examples, labels=labels, class_names=class_names)
    return Relabeled(examples, table, class_names)


def label_table(own: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """Returns the number in `other` of each class of `own`, int32 [k]; -1 for none.

    >>> label_table(("cat", "dog"), ("ant", "cat")).tolist()
    [1, -1]
    """
    places = {name: i for i, name in enumerate(other)}
    return np.array([places.get(name, -1) for name in own], np.int32)
