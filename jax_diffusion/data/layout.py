"""Splits and classes of a folder of images, from the paths of its files.

A folder that only wraps another one is looked through. Then its sub-folders are either
splits, which `SPLIT_FOLDERS` names, or classes; the splits in turn hold classes, or
none. A layout that could mean two things is refused with what was found, and so are
folders that may hold images to be held out, such as `dev` or `val2017`.
"""

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_diffusion.data.classes import in_words
from jax_diffusion.data.examples import every_tenth, rows_of_split

# Names of the sub-folders of splits, in any case.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
ROLES = {name: role for role, names in SPLIT_FOLDERS.items() for name in names}
TRAINED_ON = SPLIT_FOLDERS["train"]
# Other names of held-out images, which are not read.
OTHER_SPLITS = ("dev", "eval", "evaluation", "holdout", "hold-out", "hold_out")
_ANY = "|".join([*ROLES, *OTHER_SPLITS])
# Such as "val2017", "train-images" and CycleGAN's "testA"; or "images_test".
LIKE_A_SPLIT = re.compile(
    rf"(?i:(.*[\W_])?({_ANY}))|(?i:{_ANY})([\W\d_].*|[A-Z])", re.DOTALL
)
HELD_OUT = re.compile(
    rf"(?i:{'|'.join({*ROLES, *OTHER_SPLITS} - {*TRAINED_ON})})[\W_]?\d*"
)


class Layout(NamedTuple):
    """What the files of a folder are.

    Attributes:
        root: the folder.
        n: how many files there are.
        splits: row numbers of the files by split: "train", "val" and "test", as far as
            there are folders; None for a folder without splits.
        classes: the class of each file; None without classes.
        old_class_names: the classes in the order of version 0.1, which sorted numbers
            as text; () where it read other classes.
    """

    root: Path
    n: int
    splits: dict[str, Sequence[int]] | None
    classes: list[str] | None
    old_class_names: tuple[str, ...]

    def rows(self, split: str) -> np.ndarray:
        """Returns the row numbers of "train", "test" or "all", int [k].

        Raises:
            ValueError: if the split has none.
        """
        there = self.splits
        if there is None:
            return rows_of_split(split, every_tenth(self.n))
        wanted = {"train": ["train"], "test": ["test" if "test" in there else "val"]}
        rows = [there[name] for name in wanted.get(split, there) if name in there]
        if not rows:
            raise ValueError(
                f"split {split!r} must have a folder of its own in {self.root}, as "
                f"other splits have, got {in_words(there)}."
            )
        return np.concatenate(rows).astype(int)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Files of one split, or of a folder without splits.

    Attributes:
        where: the folder.
        rows: numbers of the files.
        rest: their paths below the folder.
    """

    where: Path
    rows: Sequence[int]
    rest: list[str]

    @functools.cached_property
    def tops(self) -> dict[str, bool]:
        """Sub-folders, and whether images lie in them directly; "" for loose images."""
        found: dict[str, bool] = {}
        for path in self.rest:
            top, sep, below = path.partition(os.sep)
            key = top if sep else ""
            found[key] = found.get(key, False) or os.sep not in below
        return found

    @property
    def wraps(self) -> str:
        """The sub-folder that is all there is, without images of its own; or ""."""
        only = next(iter(self.tops))
        return "" if len(self.tops) > 1 or self.tops[only] else only

    def inside(self, top: str) -> "_Part":
        """The files of one sub-folder."""
        start = top + os.sep
        places = [i for i, path in enumerate(self.rest) if path.startswith(start)]
        rows = [self.rows[i] for i in places]
        return _Part(
            self.where / top, rows, [self.rest[i][len(start) :] for i in places]
        )

    @property
    def kind(self) -> str:
        """Where classes can be read off: from "folders" or "prefixes"."""
        return "prefixes" if "" in self.tops else "folders"

    def classes(self) -> list[str] | None:
        """The class of each file, by sub-folder, else by prefix; None if neither.

        Raises:
            ValueError: if images lie beside folders of images.
        """
        if "" not in self.tops:
            if len(self.tops) == 1:  # it may wrap classes, with images beside them
                self.inside(next(iter(self.tops))).classes()
            return [path.partition(os.sep)[0] for path in self.rest]
        if len(self.tops) > 1:
            loose = [path for path in self.rest if os.sep not in path]
            folders = [top for top in self.tops if top]
            raise ValueError(
                f"images of {self.where} must all lie in folders of classes, or all "
                f"side by side, got {len(loose)} ({in_words(loose, 2)}) beside the "
                f"folders {in_words(folders)}."
            )
        if not all("_" in path for path in self.rest):
            return None
        return [path.partition("_")[0] for path in self.rest]


def read_layout(root: Path, names: Sequence[str]) -> Layout:
    """Finds out which files of a folder belong to which split and class.

    Args:
        root: the folder.
        names: the paths of all image files below it, sorted; at least one.

    Raises:
        ValueError: if images lie beside folders of images, if only some of the splits
            have classes, or if sub-folders may be splits as well as classes.
    """
    whole = _Part(root, range(len(names)), list(names))
    part, by_split = _outermost_splits(whole)
    parts = [*by_split.values()] or [part]
    check_held_out(parts, root)
    parts = _look_through(parts)
    parts = with_prefixes(parts)
    classes = find_classes(parts, root)
    listed: list[str] | None = None
    if classes is not None:
        named = {
            row: name
            for part, own in zip(parts, classes, strict=True)
            for row, name in zip(part.rows, own, strict=True)
        }
        listed = [named[row] for row in range(len(names))]
    splits: dict[str, Sequence[int]] | None = None
    if by_split.keys() - {"train"}:  # train alone only wraps
        splits = {role: part.rows for role, part in zip(by_split, parts, strict=True)}
    # Version 0.1 knew these folders of splits only, and looked through none.
    test = "test" if "test" in whole.tops else "val"
    old = {root / "train", root / test} if {"train", test} <= {*whole.tops} else {root}
    known = {part.where for part in parts}  # it knew no third split
    same = old <= known and (len(old) == len(known) or len(known) == 3)
    then = tuple(sorted({*listed} if listed and same else ()))
    return Layout(root, len(names), splits, listed, then)


def _look_through(parts: list[_Part], to_splits: bool = False) -> list[_Part]:
    """Enters the one folder that is all there is, while all parts call it the same.

    Args:
        parts: files of one split each.
        to_splits: whether to stop at folders that may be splits.
    """
    while len(wraps := {part.wraps for part in parts}) == 1:
        if (only := wraps.pop()) == "":
            break
        if to_splits and (only.lower() in ROLES or HELD_OUT.fullmatch(only)):
            break
        parts = [part.inside(only) for part in parts]
    return parts


def _outermost_splits(part: _Part) -> tuple[_Part, dict[str, _Part]]:
    """The part that has the splits, and these; a lone split may wrap all of them."""
    (part,) = _look_through([part], to_splits=True)
    found = find_splits(part)
    if len(found) == 1:
        inside, within = _outermost_splits(*found.values())
        if within.keys() - {"train"}:
            return inside, within
    return part, found


def find_splits(part: _Part) -> dict[str, _Part]:
    """The parts of a folder by split, in order; none if it has no splits."""
    roles = {top: ROLES[top.lower()] for top in part.tops if top.lower() in ROLES}
    others = [top or "loose images" for top in part.tops if top not in roles]
    rule = f"folders of {part.where} must be splits or classes"
    if roles and others:
        # A class may well be called "train", as in CIFAR-100.
        like = any(LIKE_A_SPLIT.fullmatch(name) for name in others)
        if [*roles.values()] == ["train"] and all(part.tops.values()) and not like:
            return {}
        raise ValueError(
            f"{rule}, got the splits {in_words(roles)} beside {in_words(others)}."
        )
    by_role = {role: top for top, role in roles.items()}
    if len(by_role) < len(roles):
        raise ValueError(f"{rule}, got a split twice: {in_words(roles)}.")
    return {
        role: part.inside(by_role[role]) for role in SPLIT_FOLDERS if role in by_role
    }


def check_held_out(parts: list[_Part], root: Path) -> None:
    """Checks that no folders within splits, or beside classes, may be splits.

    Raises:
        ValueError: if images would be trained on that may be held out.
    """
    for part in parts:
        folders = {path.rpartition(os.sep)[0] for path in part.rest} - {""}
        names = {*itertools.chain.from_iterable(f.split(os.sep) for f in folders)}
        found = {name for name in names if HELD_OUT.fullmatch(name)}
        tops = {top for top in part.tops if LIKE_A_SPLIT.fullmatch(top)}
        if len(tops) == len(part.tops) > 1 and not all(
            top.lower().startswith(TRAINED_ON) for top in tops
        ):
            found |= tops
        if found:
            raise ValueError(
                f"folders of {root} must be splits, called train, val or test, and in "
                f"them classes, got {in_words(sorted(found))} in {part.where}, which "
                "may be splits: move or rename them."
            )


def with_prefixes(parts: list[_Part]) -> list[_Part]:
    """Enters a lone folder of images whose names tell several classes apart."""
    (only, *more), *others = [[*part.tops] for part in parts]
    if more or not only or any(tops != [only] for tops in others):
        return parts
    inner = [part.inside(only) for part in parts]
    if any([*part.tops] != [""] for part in inner):
        return parts
    found = [part.classes() for part in inner]
    several = len({name for own in found for name in own or ()}) > 1
    return inner if several and all(found) else parts


def find_classes(parts: list[_Part], root: Path) -> list[list[str]] | None:
    """The classes of all files by part, None if no part has any.

    Raises:
        ValueError: if some parts have classes and others do not, or if a folder may be
            a class as well as the wrapping of one.
    """
    found = [part.classes() for part in parts]
    kinds = {part.kind if own else "" for part, own in zip(parts, found, strict=True)}
    if len(kinds) > 1:
        # One prefix for all files of a split ("IMG_0001.jpg") need not be a class.
        if "folders" not in kinds and all(len({*own}) == 1 for own in found if own):
            return None
        told = [
            f"{part.where.name} with {in_words(sorted({*own})) if own else 'none'}"
            for part, own in zip(parts, found, strict=True)
        ]
        raise ValueError(
            f"splits of {root} must all have folders of classes, or none of them, got "
            f"{', '.join(told)}."
        )
    if kinds == {""}:
        return None
    whole = [part.tops for part in parts if not part.wraps]
    nested = {top for tops in whole for top, direct in tops.items() if not direct}
    for part in parts if len(parts) > 1 else ():
        if part.wraps and part.wraps not in nested:
            names = {top for other in parts if other is not part for top in other.tops}
            raise ValueError(
                f"{part.where / part.wraps} must be a class that other splits have, or "
                "hold the folders of all classes in every split, got only folders in "
                f"it, and in other splits {in_words(sorted(names))}."
            )
    return [own for own in found if own]
