"""Means and standard deviations of color channels, of samples beside data."""

from typing import NamedTuple

import numpy as np

from jax_diffusion import checks


class ChannelStats(NamedTuple):
    """Mean and standard deviation of each channel over images and pixels.

    Attributes:
        mean: float64 [c] in [-1, 1], on the scale on which networks see images.
        std: float64 [c] in [0, 1], on the same scale.
    """

    mean: np.ndarray
    std: np.ndarray


def channel_stats(images: np.ndarray) -> ChannelStats:
    """Computes the statistics of images; the sums are exact, in integers.

    Args:
        images: uint8 [n, h, w, c].

    Raises:
        ValueError: if `images` is not uint8 [n, h, w, c] with n >= 1.

    >>> channel_stats(np.array([0, 255, 255, 0], np.uint8).reshape(1, 2, 2, 1))
    ChannelStats(mean=array([0.]), std=array([1.]))
    """
    is_array = hasattr(images, "dtype") and hasattr(images, "shape")
    if not is_array or images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(
            "images must be uint8 [n, h, w, c] with n >= 1, got "
            f"{checks.shown(images)}."
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


def color_metrics(samples: ChannelStats, data: ChannelStats) -> dict[str, float]:
    """Names the statistics of samples and data for a log, where a shift of color shows.

    Returns:
        `samples_mean_0`, `samples_std_0`, `data_mean_0`, `data_std_0`, and so on for
        each channel.

    Raises:
        ValueError: if the channels differ in number, or these are no statistics.
    """
    for name, stats in (("samples", samples), ("data", data)):
        if not isinstance(stats, ChannelStats):
            rule = f"{name} must be ChannelStats"
            raise ValueError(f"{rule}, got {checks.shown(stats)}.")
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
