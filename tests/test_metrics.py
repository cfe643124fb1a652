"""The Frechet distance, against Gaussians for which it is known."""

import numpy as np
import pytest

from jax_diffusion import metrics
from jax_diffusion.metrics import Moments

EXACT = dict(rtol=1e-9, atol=1e-9)
# Of a vanishing eigenvalue rounding leaves 1e-16, and its root is in the distance: this
# much of the variance.
SINGULAR = 1e-7


def rotation(d):
    return np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]


def gaussian(mean, std, axes=None):
    """A Gaussian with these standard deviations along these axes."""
    axes = np.eye(len(std)) if axes is None else axes
    return Moments(100, np.array(mean, float), axes * np.square(std) @ axes.T)


def cloud(seed, n=50, d=6):
    """Features that are neither centred nor uncorrelated."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_moments_are_the_count_the_mean_and_the_unbiased_covariance():
    m = metrics.moments(np.array([[0, 0], [2, 0], [0, 4], [2, 4]]))
    assert m.count == 4
    np.testing.assert_array_equal(m.mean, [1, 2])
    np.testing.assert_allclose(m.cov, [[4 / 3, 0], [0, 16 / 3]], **EXACT)


def test_moments_of_float32_features_are_summed_in_float64():
    features = (cloud(0, n=1000) + 1e4).astype(np.float32)
    ours, centred = metrics.moments(features), features.astype(np.longdouble) - 1e4
    np.testing.assert_allclose(ours.mean - 1e4, centred.mean(axis=0), **EXACT)
    np.testing.assert_allclose(ours.cov, np.cov(centred, rowvar=False), **EXACT)


def test_distance_of_diagonal_gaussians_is_that_of_means_and_standard_deviations():
    a, b = gaussian([0, 1, 2], [1, 2, 3]), gaussian([1, 1, 0], [4, 2, 1])
    ours = metrics.frechet_distance(a, b)
    np.testing.assert_allclose(ours, (1 + 0 + 4) + (9 + 0 + 4), **EXACT)


def test_distance_does_not_depend_on_the_axes_that_covariances_share():
    axes = rotation(3)
    a, b = (
        gaussian([0, 1, 2], [1, 2, 3], axes),
        gaussian([1, 1, 0], [4, 2, 1], axes),
    )
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 5 + 13, **EXACT)


def test_distance_is_right_where_covariances_do_not_commute():
    a, b = gaussian([0, 0], [1, 3]), gaussian([0, 0], [2, 5], rotation(2))
    # The eigenvalues of a root r of cov_a cov_b: (tr r)^2 = tr r^2 + 2 det r.
    root_trace = np.sqrt(np.trace(a.cov @ b.cov) + 2 * (1 * 3 * 2 * 5))
    expected = (1 + 9) + (4 + 25) - 2 * root_trace
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, **EXACT)


def test_distance_of_scalar_features_is_that_of_means_and_standard_deviations():
    a = metrics.moments(np.array([[-1.0], [1.0]]))  # variance 2
    b = metrics.moments(np.array([[1.0], [5.0]]))  # mean 3, variance 8
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 9 + 2, **EXACT)


def test_distance_to_itself_is_zero():
    a = metrics.moments(cloud(0))
    np.testing.assert_allclose(metrics.frechet_distance(a, a), 0, **EXACT)


def test_distance_is_symmetric():
    a, b = metrics.moments(cloud(0)), metrics.moments(cloud(1))
    there, back = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
    assert there > 1
    np.testing.assert_allclose(there, back, **EXACT)


def test_distance_to_a_line_follows_the_variance_along_it():
    along = np.array([3.0, 4.0, 0.0])
    line = Moments(100, np.zeros(3), np.outer(along, along))
    full = gaussian([0, 0, 0], [1, 2, 3], rotation(3))
    # cov_a is a a^T: the product has one eigenvalue, a^T cov_b a.
    expected = 25 + (1 + 4 + 9) - 2 * np.sqrt(along @ full.cov @ along)
    for a, b in [(line, full), (full, line)]:
        ours = metrics.frechet_distance(a, b)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=SINGULAR * 39)


def test_distance_is_right_with_fewer_images_than_features():
    features = cloud(0, n=5, d=20)
    a, b = metrics.moments(features), metrics.moments(features[::-1] + 2)
    tolerance = dict(rtol=0, atol=SINGULAR * 2 * np.trace(a.cov))
    np.testing.assert_allclose(metrics.frechet_distance(a, a), 0, **tolerance)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 20 * 2**2, **tolerance)


@pytest.mark.parametrize("shape", [(5,), (1, 3), (2, 3, 3)], ids=str)
def test_moments_need_rows_of_features_and_two_at_least(shape):
    with pytest.raises(
        ValueError, match=r"^features must be \[n, d\] with n >= 2, got"
    ):
        metrics.moments(np.zeros(shape))


def test_distance_needs_features_of_one_dimension():
    a, b = gaussian([0, 0], [1, 1]), gaussian([0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=r"^both sets .* got 2 and 3\.$"):
        metrics.frechet_distance(a, b)
