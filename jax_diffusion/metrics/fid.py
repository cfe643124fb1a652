"""FID: the Frechet distance between Gaussians that are fitted to two sets of features.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium". `moments` fits a Gaussian, `update` and `merge` do so batch by batch
and host by host, `frechet_distance` compares two, and `save_moments` and `load_moments`
keep them in the files of pytorch-fid and guided-diffusion.
"""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_diffusion import checks
from jax_diffusion.metrics.features import check_dimensions, check_features
from jax_diffusion.runtime import files

EIGH_ROUNDING = (
    16 * np.finfo(np.float64).eps
)  # relative to the largest eigenvalue; 4 eps were seen
KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # in files


class Moments(NamedTuple):
    """Count, mean and unbiased covariance of features.

    Attributes:
        count: number of images, n; 0 if unknown, as in the files of others.
        mean: float64 [d].
        cov: float64 [d, d]; zero for a single image.
    """

    count: int
    mean: np.ndarray
    cov: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Returns the moments of features [n, d], summed in float64.

    Raises:
        ValueError: unless n >= 2 and all features are finite.

    >>> moments(np.array([[0.0, 0], [2, 0], [0, 4], [2, 4]])).mean.tolist()
    [1.0, 2.0]
    """
    return _moments(check_features(features, least=2))


def update(known: Moments | None, features: np.ndarray) -> Moments:
    """Returns the moments of all batches so far together with one more.

    Args:
        known: moments of the batches so far; None before the first one.
        features: [n, d] of the next batch. A single row counts too: its covariance is
            zero until others join it.

    Raises:
        ValueError: unless n >= 1 and all features are finite, and as `merge` does.

    >>> found = None
    >>> for batch in np.split(np.arange(12.0).reshape(6, 2), 3):
    ...     found = update(found, batch)
    >>> found.count, found.mean.tolist()
    (6, [5.0, 6.0])
    """
    new = _moments(check_features(features, least=1))
    return new if known is None else merge(known, new)


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of two disjoint sets together, exactly (Chan et al. 1979).

    Raises:
        ValueError: if the features differ in dimension, a count is unknown, or these
            are no moments.
    """
    _check_moments("a", a)
    _check_moments("b", b)
    check_dimensions(len(a.mean), len(b.mean))
    if min(a.count, b.count) < 1:
        raise ValueError(f"merging needs known counts, got {a.count} and {b.count}.")
    n, apart = a.count + b.count, b.mean - a.mean
    between = np.outer(apart, apart) * (a.count * b.count / n)
    scatter = (a.count - 1) * a.cov + (b.count - 1) * b.cov + between
    return Moments(n, a.mean + apart * (b.count / n), scatter / (n - 1))


def _check_moments(name: str, moments: Moments) -> None:
    """Raises ValueError unless these are finite moments of features."""
    if not isinstance(moments, Moments):
        got = checks.shown(moments)
        raise ValueError(f"{name} must be Moments, as moments() returns, got {got}.")
    mean, cov = np.asarray(moments.mean), np.asarray(moments.cov)
    shaped = mean.ndim == 1 and mean.size and cov.shape == 2 * mean.shape
    if not shaped or not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(
            f"{name} must have a finite mean [d] and covariance [d, d], got "
            f"{checks.shown(mean)} and {checks.shown(cov)}."
        )


def _moments(features: np.ndarray) -> Moments:
    n, mean = len(features), features.mean(axis=0, dtype=np.float64)
    centered = np.subtract(features, mean, dtype=np.float64)
    return Moments(n, mean, centered.T @ centered / max(n - 1, 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Computes the Frechet distance, the squared 2-Wasserstein distance of Gaussians.

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    With Inception's "pool" features this is FID (Heusel et al. 2017, section 3). The
    trace of the root is computed as the nuclear norm of F_a^T F_b, where cov = F F^T:
    no number is squared before its root is taken, and singular covariances do no harm.

    Warns if a count is known and not above d: the covariance of so few images has a
    rank below d, and even two sets of one distribution are far apart.

    Args:
        a: moments of one set.
        b: moments of the other, with the same d.

    Returns:
        The distance, >= 0 up to rounding, in squared units of the features.

    Raises:
        ValueError: if the features differ in dimension, a matrix has negative
            eigenvalues and so is no covariance, or these are no moments.

    >>> a = Moments(100, np.zeros(2), np.diag([1.0, 4.0]))
    >>> b = Moments(100, np.ones(2), np.diag([4.0, 9.0]))
    >>> frechet_distance(a, b)  # |(1, 1)|^2 + (2 - 1)^2 + (3 - 2)^2
    4.0
    """
    _check_moments("a", a)
    _check_moments("b", b)
    d = len(a.mean)
    check_dimensions(d, len(b.mean))
    count = min(a.count or np.inf, b.count or np.inf)
    if count <= d:
        warnings.warn(
            f"a Frechet distance of {d} features needs more than {d} images a set, got "
            f"{count}: their covariance lacks directions, and the distance is far off.",
            stacklevel=2,
        )
    overlap = np.linalg.norm(_factor(a.cov).T @ _factor(b.cov), "nuc")
    spread = np.trace(a.cov) + np.trace(b.cov) - 2 * overlap
    return float(np.sum((a.mean - b.mean) ** 2) + spread)


def _factor(cov: np.ndarray) -> np.ndarray:
    """F [d, rank] with F F^T = cov [d, d]; eigenvalues of rounding are left out."""
    values, vectors = np.linalg.eigh(cov)
    if values[0] < -1e-4 * values[-1]:  # rounding to float32 leaves -1e-6
        raise ValueError(f"a covariance has no eigenvalues below 0, got {values[0]}.")
    kept = values > EIGH_ROUNDING * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def save_moments(path: str | Path, moments: Mapping[str, Moments]) -> None:
    """Writes moments to a .npz file that pytorch-fid and guided-diffusion read.

    The arrays are mu and sigma for "pool", mu_s and sigma_s for "spatial" if it is
    there, and our own `count`.

    Args:
        path: the file to write, whatever its suffix.
        moments: by kind of feature: "pool", and perhaps "spatial" of as many images.

    Raises:
        ValueError: without "pool", for other names, for what is no moments, and for
            counts that differ.
    """
    if not isinstance(moments, Mapping):
        raise ValueError(f"moments must be by name, got {checks.shown(moments)}.")
    for name, value in moments.items():
        _check_moments(name, value)
    counts = {m.count for m in moments.values()}
    if "pool" not in moments or set(moments) - set(KEYS) or len(counts) > 1:
        raise ValueError(
            "moments must be of pool, and of spatial for as many images, got "
            f"{[*moments]} with counts {sorted(counts)}."
        )
    arrays: Any = {"count": np.int64(counts.pop())}
    for name, (_, mean, cov) in moments.items():
        arrays |= dict(zip(KEYS[name], (mean, cov), strict=True))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(Path(path), lambda file: np.savez(file, **arrays))


def load_moments(path: str | Path) -> dict[str, Moments]:
    """Reads what `save_moments`, pytorch-fid or guided-diffusion wrote.

    Returns:
        "pool", and "spatial" if it is there; the count is 0 where the file has none.

    Raises:
        ValueError: if it is no such file, or holds numbers that are no moments.
    """
    wanted = ("count", *KEYS["pool"], *KEYS["spatial"])  # and no images
    found = files.read_npz(path, wanted)
    for name, array in found.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{path} must hold numbers, got {name} of {array.dtype}.")
        found[name] = array.astype(np.float64)
    count = found.pop("count", np.zeros(()))
    if count.shape or count < 0 or not float(count).is_integer():
        raise ValueError(f"{path} must have a count of images, got {count}.")
    moments = {}
    for name, keys in KEYS.items():
        if name != "pool" and not found.keys() & {*keys}:
            continue
        if not found.keys() >= {*keys}:
            rule = f"{path} must have {' and '.join(keys)}"
            raise ValueError(f"{rule}, got {sorted(found)}.")
        mean, cov = (found[key] for key in keys)
        odd = sum(np.sum(~np.isfinite(a)) for a in (mean, cov))
        if mean.ndim != 1 or not mean.size or cov.shape != 2 * mean.shape or odd:
            raise ValueError(
                f"{path} must have finite {keys[0]} [d] and {keys[1]} [d, d], got "
                f"shapes {mean.shape} and {cov.shape} with {odd} numbers that are not "
                "finite."
            )
        apart = np.abs(cov - cov.T).max()
        if apart > 1e-6 * np.abs(cov).max():
            rule = f"{path} must have a symmetric {keys[1]}"
            raise ValueError(f"{rule}, got {apart} apart.")
        moments[name] = Moments(int(count), mean, cov)
    return moments


def holds_moments(path: str | Path) -> bool:
    """Tells whether a file is a .npz of moments, "mu" and "sigma".

    So do pytorch-fid and guided-diffusion write references. Those of the latter hold
    images besides, which `jax_diffusion.data.open_images` opens.
    """
    place = Path(path).expanduser()
    if not place.is_file() or not zipfile.is_zipfile(place):
        return False
    with zipfile.ZipFile(place) as archive:
        return set(archive.namelist()) >= {f"{key}.npy" for key in KEYS["pool"]}
