"""How far apart two sets of images are, from the moments of their features.

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
