"""Statistics of the channels of few pixels."""

import numpy as np
import pytest

from jax_diffusion import data, metrics
from jax_diffusion.metrics import ChannelStats

EXACT = dict(rtol=1e-9, atol=1e-9)


def images_of(*channels):
    """One row of pixels, from a list of values a channel."""
    return np.array(channels, np.uint8).T[None, None]


def test_channel_stats_of_black_are_minus_one_of_white_one_and_neither_varies():
    stats = metrics.channel_stats(images_of([0, 0], [255, 255]))
    np.testing.assert_array_equal(stats.mean, [-1, 1])
    np.testing.assert_array_equal(stats.std, [0, 0])


def test_half_black_half_white_has_mean_zero_and_deviation_one():
    stats = metrics.channel_stats(images_of([0, 255, 255, 0]))
    assert (stats.mean, stats.std) == ([0], [1])


def test_channel_stats_pool_images_and_pixels_and_keep_channels_apart():
    images = images_of([0, 51, 204, 255], [0, 0, 0, 255]).reshape(2, 1, 2, 2)
    stats = metrics.channel_stats(images)
    # -1, -0.6, 0.6, 1 and -1, -1, -1, 1
    np.testing.assert_allclose(stats.mean, [0, -0.5], **EXACT)
    np.testing.assert_allclose(stats.std, [np.sqrt(0.68), np.sqrt(0.75)], **EXACT)
    assert stats.mean.dtype == stats.std.dtype == np.float64


def test_channel_stats_are_on_the_scale_on_which_networks_see_images():
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
def test_channel_stats_need_uint8_images(images):
    with pytest.raises(
        ValueError, match=r"^images must be uint8 \[n, h, w, c\] .* got"
    ):
        metrics.channel_stats(images)


def test_color_metrics_name_samples_and_data_channel_by_channel():
    samples = ChannelStats(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    whole = ChannelStats(np.array([0.5, 0.6]), np.array([0.7, 0.8]))
    assert metrics.color_metrics(samples, whole) == {
        **{"samples_mean_0": 0.1, "samples_mean_1": 0.2},
        **{"samples_std_0": 0.3, "samples_std_1": 0.4},
        **{"data_mean_0": 0.5, "data_mean_1": 0.6},
        **{"data_std_0": 0.7, "data_std_1": 0.8},
    }
    assert metrics.colour_metrics is metrics.color_metrics  # the old name


def test_color_metrics_refuse_gray_samples_beside_colors():
    gray, color = (metrics.channel_stats(np.zeros((1, 2, 2, c), "u1")) for c in (1, 3))
    with pytest.raises(ValueError, match=r"equally many channels, got 1 and 3\.$"):
        metrics.color_metrics(gray, color)
