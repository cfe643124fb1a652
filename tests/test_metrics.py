"""Distances of Gaussians for which they are known; statistics of few pixels."""

import numpy as np
import pytest

from jax_diffusion import data, metrics
from jax_diffusion.metrics import ChannelStats, Moments

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


# --- colours


def images_of(*channels):
    """One row of pixels, from a list of values a channel."""
    return np.array(channels, np.uint8).T[None, None]


def test_black_is_minus_one_white_is_one_and_neither_varies():
    stats = metrics.channel_stats(images_of([0, 0], [255, 255]))
    np.testing.assert_array_equal(stats.mean, [-1, 1])
    np.testing.assert_array_equal(stats.std, [0, 0])


def test_half_black_half_white_has_mean_zero_and_deviation_one():
    stats = metrics.channel_stats(images_of([0, 255, 255, 0]))
    assert (stats.mean, stats.std) == ([0], [1])


def test_channels_are_counted_apart_and_images_and_pixels_together():
    images = images_of([0, 51, 204, 255], [0, 0, 0, 255]).reshape(2, 1, 2, 2)
    stats = metrics.channel_stats(images)
    # -1, -0.6, 0.6, 1 and -1, -1, -1, 1
    np.testing.assert_allclose(stats.mean, [0, -0.5], **EXACT)
    np.testing.assert_allclose(stats.std, [np.sqrt(0.68), np.sqrt(0.75)], **EXACT)
    assert stats.mean.dtype == stats.std.dtype == np.float64


def test_scale_is_that_on_which_networks_see_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    stats, x = metrics.channel_stats(images), data.from_uint8(images)
    tolerance = dict(rtol=0, atol=1e-6)  # of float32 pixels
    np.testing.assert_allclose(stats.mean, x.mean(axis=(0, 1, 2)), **tolerance)
    np.testing.assert_allclose(stats.std, x.std(axis=(0, 1, 2)), **tolerance)


def test_one_odd_pixel_in_a_million_is_not_lost_to_rounding():
    n = 10**6
    images = np.full((1, 1000, 1000, 1), 255, np.uint8)
    images[0, 0, 0, 0] = 254
    stats = metrics.channel_stats(images)
    np.testing.assert_allclose(stats.mean, 1 - 1 / n / 127.5, rtol=1e-15)
    np.testing.assert_allclose(stats.std, np.sqrt(n - 1) / n / 127.5, rtol=1e-15)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
    ids=["float32", "one image", "none"],
)
def test_channel_statistics_need_uint8_images(images):
    with pytest.raises(
        ValueError, match=r"^images must be uint8 \[n, h, w, c\] .* got"
    ):
        metrics.channel_stats(images)


def test_log_shows_samples_beside_data_channel_by_channel():
    samples = ChannelStats(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    whole = ChannelStats(np.array([0.5, 0.6]), np.array([0.7, 0.8]))
    assert metrics.colour_metrics(samples, whole) == {
        **{"samples_mean_0": 0.1, "samples_mean_1": 0.2},
        **{"samples_std_0": 0.3, "samples_std_1": 0.4},
        **{"data_mean_0": 0.5, "data_mean_1": 0.6},
        **{"data_std_0": 0.7, "data_std_1": 0.8},
    }


def test_log_refuses_grey_samples_beside_colours():
    grey, colour = (metrics.channel_stats(np.zeros((1, 2, 2, c), "u1")) for c in (1, 3))
    with pytest.raises(ValueError, match=r"equally many channels, got 1 and 3\.$"):
        metrics.colour_metrics(grey, colour)
