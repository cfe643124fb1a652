"""Vectors and token sequences beside images, which say what is wanted of a network.

    cond         float [n, d], a vector for each image; zeros mean none
    tokens       float [n, k, d], a sequence of k vectors for each image
    tokens_mask  bool [n, k], which of them count; needed where lengths differ

They stand in a .npz beside `images` and `labels`; or in a file cond.npz of a folder of
images, with `names`, the paths of the images below the folder, as text [n]. Rows are
matched by name, never by position. Data sets of TFDS have none.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_diffusion import checks
from jax_diffusion.runtime import files

CONDITIONING = ("cond", "tokens", "tokens_mask")
SIDECAR = "cond.npz"  # in a folder of images
Conditioning = dict[str, np.ndarray]


def as_conditioning(given: Mapping[str, Any], n: int | None = None) -> Conditioning:
    """Checks conditioning and brings it to one form.

    Args:
        given: some of the arrays of the module by name; numbers of any real type.
        n: how many images there are; None for any number.

    Returns:
        "cond" float32 [n, d], "tokens" float32 [n, k, d] and "tokens_mask" bool [n, k],
        as far as they are given; the mask always comes with tokens, and tokens that it
        leaves out are zeros.

    Raises:
        ValueError: if they are not as described; it begins with the array's name.

    >>> found = as_conditioning({"tokens": np.ones((5, 2, 3))}, 5)
    >>> {name: a.shape for name, a in found.items()}
    {'tokens': (5, 2, 3), 'tokens_mask': (5, 2)}
    """
    found: Conditioning = {}
    for name, axes in (("cond", "[n, d]"), ("tokens", "[n, k, d]")):
        if given.get(name) is None:
            continue
        array = _as_array(name, given[name], f"numbers {axes}", "iuf")
        if array.ndim != axes.count(",") + 1 or not array.size:
            raise ValueError(f"{name} must be numbers {axes}, got {array.shape}.")
        with np.errstate(over="ignore"):  # what overflows is refused below
            found[name] = np.ascontiguousarray(array, np.float32)
    mask = given.get("tokens_mask")
    if "tokens" in found:
        tokens = found["tokens"]
        if mask is None:
            mask = np.ones(tokens.shape[:2], bool)
        mask = _as_array("tokens_mask", mask, "bool [n, k]", "b")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"tokens_mask must be bool {[*tokens.shape[:2]]}, as tokens, got "
                f"{[*mask.shape]}."
            )
        found["tokens"] = np.where(mask[:, :, None], tokens, np.float32(0))
        found["tokens_mask"] = np.ascontiguousarray(mask)
    elif mask is not None:
        raise ValueError("tokens_mask needs tokens, got it alone.")
    for name, array in found.items():
        if n is not None and len(array) != n:
            raise ValueError(
                f"{name} must have a row for each of the {n} images, got {len(array)}."
            )
        wrong = np.flatnonzero(~np.isfinite(array).all(axis=(*range(1, array.ndim),)))
        if wrong.size:
            unless = " where they count" if name == "tokens" else ""
            raise ValueError(
                f"{name} must be finite{unless}, got other numbers in {len(wrong)} of "
                f"{len(array)} rows, the first in row {wrong[0]}."
            )
    if len({len(a) for a in found.values()}) > 1:
        counts = " and ".join(f"{len(a)} of {name}" for name, a in found.items())
        raise ValueError(f"cond must have as many rows as tokens, got {counts}.")
    return found


def _as_array(name: str, given: Any, rule: str, kinds: str) -> np.ndarray:
    """`given` as an array of one of these kinds of dtype."""
    try:
        array = np.asarray(given)
    except ValueError:  # rows of several lengths
        array = np.empty(0, object)
    if array.dtype == object:
        if name == "tokens":
            raise ValueError(
                "tokens_mask must be given where lengths of tokens differ, with tokens "
                "padded to one length, got rows of several lengths."
            )
        raise ValueError(f"{name} must be {rule}, got rows of several lengths.")
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name} must be {rule}, got {array.dtype}.")
    return array


def read_conditioning(path: Any, field: str = "cond") -> Conditioning:
    """Reads the arrays of the module from a .npz file; its others are left alone.

    Args:
        path: the file.
        field: what names it, for errors.

    Raises:
        ValueError: if it is no such file, or holds none of them, or wrong ones.
    """
    rule = "a .npz file with cond, or with tokens and perhaps tokens_mask"
    checks.path(field, path, rule)
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{field} must be {rule}, got {str(path)!r}, which is no file."
        )
    given = read_arrays(field, file)
    if not {"cond", "tokens"} & given.keys():
        raise ValueError(f"{field} must be {rule}, got neither in {str(path)!r}.")
    with of_file(file):
        return as_conditioning(given)


def read_sidecar(root: Path, paths: Sequence[str]) -> Conditioning:
    """Reads the file `SIDECAR` of a folder of images, a row for each of them.

    Args:
        root: the folder.
        paths: of all images in it, which begin with the folder's.

    Returns:
        As `as_conditioning`, in the order of the paths; empty without such a file.

    Raises:
        ValueError: if names are missing or repeated, if an image has no row or a row no
            image, or if the arrays are wrong.
    """
    file = root / SIDECAR
    if not file.is_file():
        return {}
    given = read_arrays("path", file, ("names", *CONDITIONING))
    names = given.pop("names", None)
    if names is None or names.dtype.kind != "U" or names.ndim != 1 or not given:
        raise ValueError(
            f"{file} must have names, text [n], and cond or tokens, got "
            f"{'other names' if names is not None and given else 'no such arrays'}."
        )
    places = {name: row for row, name in enumerate(names.tolist())}
    if len(places) < len(names):
        raise ValueError(
            f"names of {file} must differ, got {len(names)} names of which "
            f"{len(places)} differ."
        )
    own = [Path(path).relative_to(root).as_posix() for path in paths]
    missing, over = [n for n in own if n not in places], {*places} - {*own}
    if missing or over:
        first = f", such as {(missing or sorted(over))[0]!r}"
        raise ValueError(
            f"names of {file} must be those of the {len(own)} images below the folder, "
            f"got {len(missing)} images without a row and {len(over)} rows without an "
            f"image{first}."
        )
    rows = np.array([places[name] for name in own])
    with of_file(file):
        found = as_conditioning(given, len(names))
    return {name: array[rows] for name, array in found.items()}


def read_arrays(
    field: str, file: Path, names: Sequence[str] = CONDITIONING
) -> dict[str, np.ndarray]:
    """Returns those arrays of a .npz file that have these names, as they are.

    Raises:
        ValueError: if it is no such file of plain arrays; it begins with the field.
    """
    try:
        return files.read_npz(file, names)
    except ValueError as error:
        told = error.__cause__ or error
        if "allow_pickle" in str(told) or "pickle" in str(told).lower():
            told = "objects, as of rows of several lengths, which are padded instead"
        rule = f"{field} must be a .npz file of plain arrays"
        raise ValueError(f"{rule}, got {str(file)!r}: {told}.") from error


@contextlib.contextmanager
def of_file(path: Any) -> Iterator[None]:
    """Names the file in errors about its arrays: "labels of a.npz must be ..."."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name in ("images", "labels", *CONDITIONING):
            raise ValueError(f"{name} of {path} {rest}") from error
        raise


def record_of(conditioning: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what a checkpoint says of conditioning: shape and digest of each array.

    >>> record_of({"cond": np.zeros((5, 3), np.float32)})["cond"]["shape"]
    [3]
    """
    return {
        name: {
            "shape": [*array.shape[1:]],
            "digest": hashlib.sha256(np.ascontiguousarray(array).data).hexdigest(),
        }
        for name, array in conditioning.items()
    }
