"""KID of sets for which it is known."""

import numpy as np
from support.features import cloud, line
from support.oracles import assert_mean

from jax_diffusion import metrics


def test_kid_of_points_is_the_closed_form():
    """All of a at one point and all of b at another: k(a, a) + k(b, b) - 2 k(a, b)."""
    a, b = np.tile([[1.0, 0.0]], (10, 1)), np.tile([[1.0, 2.0]], (12, 1))
    expected = 1.5**3 + 3.5**3 - 2 * 1.5**3
    value, error = metrics.kernel_distance(a, b)
    np.testing.assert_allclose((value, error), (expected, 0), rtol=1e-12, atol=1e-12)


def test_kid_of_few_points_can_be_counted():
    """k(x, y) = (x y + 1)^3, between other points only: 1, 343, and 1, 1, 27, 64."""
    value, _ = metrics.kernel_distance(line(0, 1), line(2, 3), subsets=2)
    np.testing.assert_allclose(value, 1 + 343 - 2 * (1 + 1 + 27 + 64) / 4, rtol=1e-12)


def test_kid_of_gaussians_is_on_average_that_of_their_moments():
    """With (x y + 1)^3 = 1 + 3 x y + 3 (x y)^2 + (x y)^3, it is 3 d_1^2 + 3 d_2^2 +
    d_3^2, where d_k are the differences of E x^k: 1, 1, 4 for N(0, 1) and N(1, 1).
    """
    draws = np.random.default_rng(0).normal(size=(300, 2, 50, 1))
    found = [metrics.kernel_distance(a, b + 1, subsets=1).value for a, b in draws]
    assert_mean(found, 22)


def test_kid_of_one_distribution_is_0_on_average():
    rng = np.random.default_rng(0)
    found = [
        metrics.kernel_distance(*rng.normal(size=(2, 40, 4)), subsets=1).value
        for _ in range(400)
    ]
    assert abs(np.mean(found)) < 5 * np.std(found) / 400**0.5
    assert min(found) < 0  # unbiased: it cannot be above 0 always


def test_kid_of_few_images_is_not_said_to_be_certain():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 4))
    assert metrics.kernel_distance(a, b).error > 0


def test_kid_draws_the_same_subsets_for_the_same_seed():
    a, b = cloud(0), cloud(1)
    one, same, other = (
        metrics.kernel_distance(a, b, subset_size=20, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one.error > 0
