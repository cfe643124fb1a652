"""How alike two sets of images are, from features of them; and their colours.

This module never sees a model: features come in as arrays [n, d], and raw pixels are
features too. All is in float64 on the host, but distances between points on the device.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

EIGH_ROUNDING = 16 * np.finfo(np.float64).eps  # of the largest; 4 were seen


class Moments(NamedTuple):
    """Count, mean and unbiased covariance of features, in float64."""

    count: int  # 0 if unknown, as in the files of others
    mean: np.ndarray  # [d]
    cov: np.ndarray  # [d, d]; zero of a single row


def moments(features: np.ndarray) -> Moments:
    """The moments of features [n, d].

    Raises:
        ValueError: unless there are two rows at least, all finite.
    """
    return _moments(_rows(features, least=2))


def update(known: Moments | None, features: np.ndarray) -> Moments:
    """The moments of all batches so far, None at first, and one more [n, d].

    A single row counts too: its covariance is zero until others join it.

    Raises:
        ValueError: unless there is a row and all are finite, and see `merge`.
    """
    new = _moments(_rows(features, least=1))
    return new if known is None else merge(known, new)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together, exactly (Chan et al. 1979).

    Raises:
        ValueError: if the features differ in dimension, or a count is unknown.
    """
    _check_dimensions(len(a.mean), len(b.mean))
    if min(a.count, b.count) < 1:
        raise ValueError(f"merging needs known counts, got {a.count} and {b.count}.")
    n, apart = a.count + b.count, b.mean - a.mean
    between = np.outer(apart, apart) * (a.count * b.count / n)
    scatter = (a.count - 1) * a.cov + (b.count - 1) * b.cov + between
    return Moments(n, a.mean + apart * (b.count / n), scatter / (n - 1))


def _moments(features: np.ndarray) -> Moments:
    n, mean = len(features), features.mean(axis=0, dtype=np.float64)
    centred = np.subtract(features, mean, dtype=np.float64)
    return Moments(n, mean, centred.T @ centred / max(n - 1, 1))


def _rows(features: np.ndarray, least: int) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < least or not features.size:
        raise ValueError(
            f"features must be [n, d] with n >= {least}, got shape {features.shape}."
        )
    if not np.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinity.")
    return features


def _check_dimensions(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"both sets must have equally many features, got {a} and {b}.")


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    The trace of the root is the nuclear norm of F_a^T F_b, where cov = F F^T: no number
    is squared before its root is taken, and singular covariances do no harm.

    Warns if a count is known and not above d: the covariance of so few rows has a rank
    below d, and even sets of one distribution are far apart.

    Raises:
        ValueError: if the features differ in dimension, or a matrix has negative
            eigenvalues and so is no covariance.
    """
    d = len(a.mean)
    _check_dimensions(d, len(b.mean))
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


class Estimate(NamedTuple):
    """A score and how far it may be off; see the function for what `error` is."""

    value: float
    error: float


def inception_score(logits: np.ndarray, *, splits: int = 10) -> Estimate:
    """exp E KL(p(label | x) || p(label)), the Inception score (Salimans et al. 2016).

    The mean over contiguous parts of the rows, and as error the standard deviation over
    them, as in the authors' code and in papers: of the parts, not of their mean.

    Args:
        logits: [n, k] of a classifier. The score is from 1 to k.

    Raises:
        ValueError: unless logits are finite and n >= splits >= 1.
    """
    logits = np.asarray(_rows(logits, least=1), np.float64)
    n = len(logits)
    if not 1 <= splits <= n:
        raise ValueError(f"splits must be 1 to {n}, as many as images, got {splits}.")
    scores, log_p = [], logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = np.exp(part)
        marginal = p.mean(axis=0)
        marginal = marginal[marginal > 0]  # 0 log 0 is 0
        within = (p * part).sum(axis=1).mean()  # minus the entropies
        scores.append(np.exp(within - (marginal * np.log(marginal)).sum()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> Estimate:
    """KID: the squared MMD with kernel (x . y / d + 1)^3 (Binkowski et al. 2018).

    The mean of the unbiased estimates on random subsets of [n, d] and [m, d], and as
    error their standard deviation, as the authors' code reports it: of one subset, not
    of the mean. Unbiased, the distance may be below 0.

    Args:
        subset_size: rows of each set in a subset, drawn without replacement. Default
            1000, or half of the smaller set: of all of it, there is but one subset.

    Raises:
        ValueError: if the features differ in dimension or are not finite, or for no
            subsets, or of other sizes than two to all rows.
    """
    a, b = _rows(a, least=2), _rows(b, least=2)
    _check_dimensions(a.shape[1], b.shape[1])
    most = min(len(a), len(b))
    size = min(1000, max(most // 2, 2)) if subset_size is None else subset_size
    if not 2 <= size <= most or subsets < 1:
        raise ValueError(
            f"there must be subsets, each of 2 to {most} rows, got {subsets} of {size}."
        )
    rng, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        rows = (f[rng.choice(len(f), size, replace=False)] for f in (a, b))
        x, y = (np.asarray(r, np.float64) for r in rows)
        xx, yy, xy = (_cubic(*pair) for pair in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size - 1)
        found.append((within - 2 * xy.sum() / size) / size)
    return Estimate(float(np.mean(found)), float(np.std(found)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    product = x @ y.T / x.shape[1] + 1
    return product * product * product  # ** 3 takes a hundred times as long


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1."""

    precision: float  # of the features that lie within the reference's manifold
    recall: float  # of the reference that lies within the features' manifold


def precision_recall(
    features: np.ndarray,
    reference: np.ndarray,
    *,
    neighbours: int = 3,
    block: int = 1024,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    A manifold is the union of the balls around a set's points, each as large as the
    distance to the `neighbours`-th other point. In float32, two points are one if
    closer than a few thousandths of their distance from the reference's mean.

    Args:
        features: [n, d] of samples.
        reference: [m, d]. Radii shrink as points become more: keep n and m equal.
        block: points whose distances to all others are on the device at a time.

    Raises:
        ValueError: if the features differ in dimension or are not finite, or for too
            few points, neighbours or rows of a block.
    """
    features, reference = _rows(features, least=1), _rows(reference, least=1)
    _check_dimensions(features.shape[1], reference.shape[1])
    least = min(len(features), len(reference))
    if not 1 <= neighbours < least or block < 1:
        raise ValueError(
            f"neighbours must be from 1 and below {least}, the points of the smaller "
            f"set, and blocks from 1, got {neighbours} and {block}."
        )
    # Far from the origin, the difference of squares would have no digits left.
    centre = reference.mean(axis=0, dtype=np.float64)
    x, y = (jnp.asarray(f - centre, jnp.float32) for f in (features, reference))
    shares = []
    for points, manifold in ((x, y), (y, x)):
        radii = _in_blocks(_radii, manifold, block, manifold, neighbours)
        inside = _in_blocks(_inside, points, block, manifold, radii)
        shares.append(float(inside.mean()))
    return PrecisionRecall(*shares)


def _in_blocks(function, points, block, *others):
    """function(rows of points, *others) [n]; all blocks have one shape."""
    found = []
    for start in range(0, len(points), block):
        rows = np.arange(start, start + block).clip(max=len(points) - 1)
        found.append(np.asarray(function(points[rows], *others)))
    return np.concatenate(found)[: len(points)]


def _squared_distances(x: Array, y: Array) -> Array:
    sums = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    distances = sums - 2 * jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    # Of 0, rounding was seen to leave 3e-7 of the sums at d = 8, and 4e-6 at d = 2048.
    rounding = (4 + x.shape[1] ** 0.5) * jnp.finfo(jnp.float32).eps
    return jnp.where(distances > rounding * sums, distances, 0)


@jax.jit(static_argnums=2)
def _radii(x: Array, manifold: Array, neighbours: int) -> Array:
    """Squared; each point is its own nearest."""
    nearest, _ = jax.lax.top_k(-_squared_distances(x, manifold), neighbours + 1)
    return -nearest[:, -1]


@jax.jit
def _inside(x: Array, manifold: Array, radii: Array) -> Array:
    return jnp.any(_squared_distances(x, manifold) <= radii[None, :], axis=1)


# --- files

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def save_moments(path: str | Path, moments: Mapping[str, Moments]) -> None:
    """Writes "pool" as pytorch-fid does, and "spatial" as guided-diffusion, if there.

    A .npz of mu and sigma, mu_s and sigma_s, and of our own `count`.

    Raises:
        ValueError: without "pool", for other names, and for counts that differ.
    """
    counts = {m.count for m in moments.values()}
    if "pool" not in moments or set(moments) - set(KEYS) or len(counts) > 1:
        raise ValueError(
            "moments must be of pool, and of spatial for as many images, got "
            f"{[*moments]} with counts {sorted(counts)}."
        )
    arrays: Any = {"count": np.int64(counts.pop())}
    for name, (_, mean, cov) in moments.items():
        arrays |= dict(zip(KEYS[name], (mean, cov), strict=True))
    with Path(path).open("wb") as file:  # by its name, NumPy would add a suffix
        np.savez(file, **arrays)


def load_moments(path: str | Path) -> dict[str, Moments]:
    """What `save_moments`, pytorch-fid or guided-diffusion has written.

    Returns:
        "pool", and "spatial" if there; the count is 0 where the file has none.

    Raises:
        ValueError: if it is no such file, or holds numbers that are no moments.
    """
    wanted = {"count", *KEYS["pool"], *KEYS["spatial"]}  # and no images
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as npz:
            found = {k: np.asarray(npz[k], np.float64) for k in wanted & {*npz.files}}
    except Exception as error:  # damage shows as any kind of error
        raise ValueError(f"{path} must be a .npz of moments, got {error!r}.") from error
    count = found.pop("count", np.zeros(()))
    if count.shape or count < 0 or not float(count).is_integer():
        raise ValueError(f"{path} must have a count of images, got {count}.")
    return {
        name: Moments(int(count), *_checked(path, keys, found))
        for name, keys in KEYS.items()
        if name == "pool" or found.keys() & {*keys}
    }


def _checked(path, keys, found):
    """Mean and covariance, as they are."""
    if not found.keys() >= {*keys}:
        raise ValueError(f"{path} must have {' and '.join(keys)}, got {sorted(found)}.")
    mean, cov = (found[key] for key in keys)
    odd = sum(np.sum(~np.isfinite(a)) for a in (mean, cov))
    if mean.ndim != 1 or not mean.size or cov.shape != 2 * mean.shape or odd:
        raise ValueError(
            f"{path} must have finite {keys[0]} [d] and {keys[1]} [d, d], got shapes "
            f"{mean.shape} and {cov.shape} with {odd} numbers that are not finite."
        )
    apart = np.abs(cov - cov.T).max()
    if apart > 1e-6 * np.abs(cov).max():
        raise ValueError(f"{path} must have a symmetric {keys[1]}, got {apart} apart.")
    return mean, cov


# --- colours


class ChannelStats(NamedTuple):
    """Mean and standard deviation of each channel over images and pixels, float64."""

    mean: np.ndarray  # [c] in [-1, 1], as networks see images
    std: np.ndarray  # [c] on that scale: at most 1


def channel_stats(images: np.ndarray) -> ChannelStats:
    """Of uint8 images [n, h, w, c]; the sums are exact, in integers.

    Raises:
        ValueError: for other images, and for none.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(
            "images must be uint8 [n, h, w, c] with n >= 1, got "
            f"{images.dtype} of shape {images.shape}."
        )
    pixels = images.reshape(-1, images.shape[-1])
    totals = pixels.sum(axis=0, dtype=np.int64).tolist()
    squares = np.einsum("nc,nc->c", pixels, pixels, dtype=np.int64).tolist()
    n = len(pixels)
    mean = np.array([total / n for total in totals])
    # n^2 times the variance may not fit 64 bits; Python's integers have no bound.
    pairs = zip(totals, squares, strict=True)
    var = np.array([(n * square - total**2) / n**2 for total, square in pairs])
    return ChannelStats(mean / 127.5 - 1, np.sqrt(var) / 127.5)


def colour_metrics(samples: ChannelStats, data: ChannelStats) -> dict[str, float]:
    """Both sets of numbers side by side for a log, where a shift of colour shows.

    Returns:
        `samples_mean_0`, `samples_std_0`, `data_mean_0`, `data_std_0`, and so on for
        each channel.

    Raises:
        ValueError: if the channels differ in number.
    """
    if samples.mean.shape != data.mean.shape:
        raise ValueError(
            "samples and data must have equally many channels, got "
            f"{len(samples.mean)} and {len(data.mean)}."
        )
    return {
        f"{of}_{name}_{channel}": float(value)
        for of, stats in (("samples", samples), ("data", data))
        for name, values in stats._asdict().items()
        for channel, value in enumerate(values)
    }
