"""How alike two sets of images are, from features of them; and their colours.

This module never sees a model: features come in as arrays [n, d], and raw pixels are
features too. Sums and decompositions are in float64 on the host; distances between all
pairs of points in blocks on the device.
"""

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Moments(NamedTuple):
    """Count, mean and unbiased covariance of features, in float64."""

    count: int  # 0 if unknown, as of the files of others
    mean: np.ndarray  # [d]
    cov: np.ndarray  # [d, d]; zero of a single row


def moments(features: np.ndarray) -> Moments:
    """The moments of features [n, d].

    Raises:
        ValueError: unless there are two rows at least.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features must be [n, d] with n >= 2, got shape {features.shape}."
        )
    return Moments(len(features), features.mean(axis=0), np.cov(features.T, ddof=1))


def update(known: Moments | None, features: np.ndarray) -> Moments:
    """The moments of all batches so far and one more, features [n, d] with n >= 1."""
    if len(features) > 1:
        new = moments(features)
    else:
        row = np.asarray(features, np.float64).sum(axis=0)
        new = Moments(len(features), row, np.zeros((len(row), len(row))))
    return new if known is None else merge(known, new)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together, exactly (Chan et al. 1979).

    Raises:
        ValueError: if the features differ in dimension, or a count is unknown.
    """
    _check_dimensions(a, b)
    if min(a.count, b.count) < 1:
        raise ValueError(
            f"moments to merge must have counts from 1, got {a.count} and {b.count}."
        )
    n, apart = a.count + b.count, b.mean - a.mean
    between = np.outer(apart, apart) * (a.count * b.count / n)
    scatter = (a.count - 1) * a.cov + (b.count - 1) * b.cov + between
    return Moments(n, a.mean + apart * (b.count / n), scatter / (n - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    The trace of the root is the sum of the singular values of
    cov_a^(1/2) cov_b^(1/2): no number is squared before its root is taken, and singular
    covariances do no harm. Warns where a count is not above the dimension: such a
    covariance lacks directions, and the distance is far too large.

    Raises:
        ValueError: if the features differ in dimension.
    """
    _check_dimensions(a, b)
    count, d = min(a.count or np.inf, b.count or np.inf), len(a.mean)
    if count <= d:
        warnings.warn(
            f"a Frechet distance of {d} features needs more than {d} images, got "
            f"{count}: it is far too large, and no other number may stand beside it.",
            stacklevel=2,
        )
    roots = [_root(np.atleast_2d(m.cov)) for m in (a, b)]
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    trace = np.trace(np.atleast_2d(a.cov)) + np.trace(np.atleast_2d(b.cov))
    return float(np.sum((a.mean - b.mean) ** 2) + trace - 2 * overlap)


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric root; what rounding has left of an eigenvalue 0 is set to 0."""
    values, vectors = np.linalg.eigh(cov)
    least = len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return (vectors * np.sqrt(np.where(values > least, values, 0))) @ vectors.T


def _check_dimensions(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"both sets need features of one dimension, got {a.mean.shape[0]} and "
            f"{b.mean.shape[0]}."
        )


class Estimate(NamedTuple):
    """A score and how far it may be off; see the function for what `error` is."""

    value: float
    error: float


def inception_score(logits: np.ndarray, *, splits: int = 10) -> Estimate:
    """exp E KL(p(label | x) || p(label)), the Inception score (Salimans et al. 2016).

    The mean over contiguous parts of [n, k] logits, and as error the standard deviation
    over them, as papers report it: of the parts, not of their mean.

    Raises:
        ValueError: unless logits are [n, k] with n >= splits >= 1.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or not 1 <= splits <= len(logits):
        raise ValueError(
            f"logits must be [n, k] with n >= splits >= 1, got shape {logits.shape} "
            f"and {splits}."
        )
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores, edges = [], np.arange(splits + 1) * len(log_p) // splits
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        part = log_p[first:last]
        p = np.exp(part)
        # 0 log 0 is 0: a class may be nowhere within the range of floats.
        with np.errstate(divide="ignore"):
            log_mean = np.maximum(np.log(p.mean(axis=0)), -1e4)
        scores.append(np.exp((p * (part - log_mean)).sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> Estimate:
    """KID: the squared MMD with kernel (x . y / d + 1)^3 (Binkowski et al. 2018).

    The mean of the unbiased estimates on random subsets of [n, d] features, and as
    error their standard deviation, as the authors' code reports it. Unbiased, it may be
    below 0.

    Args:
        subset_size: images of each set in a subset; all, if a set has fewer.

    Raises:
        ValueError: if the features differ in dimension, or there are fewer than two
            images in a subset or no subset.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    size = min(subset_size, len(a), len(b))
    if a.ndim != 2 or a.shape[1:] != b.shape[1:] or size < 2 or subsets < 1:
        raise ValueError(
            "features must be [n, d] and [m, d], and subsets of two images at least, "
            f"got {a.shape}, {b.shape} and {subsets} of {size}."
        )
    rng, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (f[rng.choice(len(f), size, replace=False)] for f in (a, b))
        xx, yy, xy = (_cubic(*pair) for pair in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size - 1)
        found.append((within - 2 * xy.sum() / size) / size)
    return Estimate(float(np.mean(found)), float(np.std(found)))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


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

    A manifold is the union of the balls around the points, each as large as the
    distance to the `neighbours`-th other point.

    Args:
        features: [n, d] of samples.
        reference: [m, d]; the radii depend on m, so compare only at equal numbers.
        block: points whose distances to all others are in memory at a time.

    Raises:
        ValueError: if the features differ in dimension, or there are no so many
            neighbours.
    """
    shapes = features.shape, reference.shape
    if features.ndim != 2 or shapes[0][1:] != shapes[1][1:] or neighbours < 1:
        raise ValueError(
            f"features must be [n, d] and [m, d], got {shapes[0]} and {shapes[1]}, "
            f"and neighbours from 1, got {neighbours}."
        )
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(
            f"each set must have more than {neighbours} points, got {len(features)} "
            f"and {len(reference)}."
        )
    # Differences of squares are exact to float32 only around their mean.
    centre = np.asarray(reference, np.float64).mean(axis=0)
    x, y = (np.asarray(f - centre, np.float32) for f in (features, reference))
    inside = []
    for points, manifold in ((x, y), (y, x)):
        radii = _in_blocks(_radii, manifold, block, manifold, neighbours)
        found = _in_blocks(_inside, points, block, manifold, radii)
        inside.append(float(found.mean()))
    return PrecisionRecall(*inside)


def _in_blocks(function, points, block, *others):
    """function(rows of points, *others) [n], all blocks padded to one shape."""
    found = []
    for start in range(0, len(points), block):
        rows = np.arange(start, start + block)
        part = points[np.minimum(rows, len(points) - 1)]
        found.append(np.asarray(function(part, *others))[: len(points) - start])
    return np.concatenate(found)


def _squared_distances(x: Array, y: Array) -> Array:
    """What is left of the distance of equal points by rounding is taken for 0."""
    products = jnp.matmul(x, y.T, precision="highest")
    norms = [jnp.sum(jnp.square(a), axis=1) for a in (x, y)]
    sums = norms[0][:, None] + norms[1][None, :]
    found = sums - 2 * products
    return jnp.where(found > 1e-6 * sums, found, 0.0)


@functools.partial(jax.jit, static_argnums=2)
def _radii(x: Array, manifold: Array, neighbours: int) -> Array:
    """The squared distance to the k-th other point: each is its own nearest."""
    nearest, _ = jax.lax.top_k(-_squared_distances(x, manifold), neighbours + 1)
    return -nearest[:, -1]


@jax.jit
def _inside(x: Array, manifold: Array, radii: Array) -> Array:
    within = _squared_distances(x, manifold) <= radii[None, :]
    return jnp.any(within, axis=1)


# --- files


KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def save_moments(path: str | Path, found: Mapping[str, Moments]) -> None:
    """Writes "pool", and "spatial" if there, as pytorch-fid and guided-diffusion do.

    They read it as one of theirs; `count` is besides.
    """
    arrays: dict[str, np.ndarray] = {"count": np.array(found["pool"].count)}
    for name, keys in KEYS.items():
        if name in found:
            arrays |= dict(zip(keys, found[name][1:], strict=True))
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_moments(path: str | Path) -> dict[str, Moments]:
    """What `save_moments`, pytorch-fid or guided-diffusion has written.

    Raises:
        ValueError: if it is no such file, or holds numbers that are no moments.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            wanted = ["count", *(key for keys in KEYS.values() for key in keys)]
            arrays = {key: stored[key] for key in wanted if key in stored.files}
    except Exception as error:  # damage shows as any kind of error
        raise ValueError(f"{path} must be a .npz of moments, got {error!r}.") from error
    count, found = int(arrays.get("count", 0)), {}
    for name, keys in KEYS.items():
        if name == "pool" or keys[0] in arrays:
            mean, cov = (np.asarray(arrays.get(k, 0.0), np.float64) for k in keys)
            _check_moments(path, keys, mean, cov)
            found[name] = Moments(count, mean, cov)
    return found


def _check_moments(path, keys, mean, cov):
    fit = mean.ndim == 1 and cov.shape == (len(mean),) * 2
    if not fit or not np.isfinite(mean).all() or not np.isfinite(cov).all():
        raise ValueError(
            f"{path} must have {keys[0]} [d] and {keys[1]} [d, d] of finite numbers, "
            f"got {mean.shape} and {cov.shape}."
        )
    if not np.allclose(cov, cov.T, rtol=1e-5, atol=1e-5 * np.abs(cov).max(initial=0)):
        raise ValueError(f"{path} must have a symmetric {keys[1]}, got another.")


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
