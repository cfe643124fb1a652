"""How far apart two sets of images are, from the moments of features and of channels.

NumPy in float64 on the host. This module never sees a model: features come in as
arrays [n, d]; raw pixels are features too.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Count, mean and unbiased covariance of features, in float64."""

    count: int
    mean: np.ndarray  # [d]
    cov: np.ndarray  # [d, d]


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


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017).

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    The trace of the root is the sum of the roots of the eigenvalues of
    cov_a^(1/2) cov_b cov_a^(1/2), which is symmetric: singular covariances do no harm.

    Raises:
        ValueError: if the features differ in dimension.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"both sets need features of one dimension, got {a.mean.shape[0]} and "
            f"{b.mean.shape[0]}."
        )
    values, vectors = np.linalg.eigh(np.atleast_2d(a.cov))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ np.atleast_2d(b.cov) @ root)
    root_trace = np.sqrt(np.maximum(product, 0)).sum()
    trace = np.trace(np.atleast_2d(a.cov)) + np.trace(np.atleast_2d(b.cov))
    return float(np.sum((a.mean - b.mean) ** 2) + trace - 2 * root_trace)


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
