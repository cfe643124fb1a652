"""What metrics share: checks of features [n, d], and scores with an error."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks


class Estimate(NamedTuple):
    """A score and its spread; the function that computes it says which spread.

    Attributes:
        value: the score.
        error: a standard deviation, on the scale of `value`.
    """

    value: float
    error: float


def check_features(features: np.ndarray, least: int) -> np.ndarray:
    """Returns features [n, d] as an array.

    Raises:
        ValueError: unless they are numbers [n, d] with n >= `least` and d >= 1, and
            finite.
    """
    try:
        found = np.asarray(features)
    except (TypeError, ValueError):  # ragged, or traced
        found = np.zeros(0, object)
    if found.dtype.kind not in "iuf" and found.dtype != jnp.bfloat16:
        raise ValueError(f"features must be numbers, got {checks.shown(features)}.")
    features = found
    if features.ndim != 2 or len(features) < least or not features.size:
        raise ValueError(
            f"features must be [n, d] with n >= {least}, got shape {features.shape}."
        )
    if not np.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinity.")
    return features


def check_dimensions(a: int, b: int) -> None:
    """Raises ValueError unless two sets have equally many features d."""
    if a != b:
        raise ValueError(f"both sets must have equally many features, got {a} and {b}.")
