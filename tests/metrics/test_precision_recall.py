"""Precision and recall of sets for which they are known."""

import numpy as np
import pytest
from support.features import cloud, line

from jax_diffusion import metrics


def test_precision_and_recall_of_points_that_can_be_counted():
    """Balls of the first neighbour: around 0, 1 of radius 1; around 10 of radius 9."""
    reference = line(0, 1, 10)
    features = line(-0.9, 2.1, 0.5, 19.5)
    found = metrics.precision_recall(features, reference, neighbours=1)
    # 2.1 is 1.1 from 1, but 7.9 from 10; 19.5 is 9.5 from 10. Radii of the features:
    # 1.4 at -0.9 and 0.5, 1.6 at 2.1, 17.4 at 19.5, which reaches 10.
    np.testing.assert_allclose(found, (3 / 4, 1), rtol=1e-6)


def test_precision_counts_a_point_on_the_edge_of_a_ball():
    """The ball around 5 reaches 1 and 9. Around their mean 2, the numbers are exact."""
    found = metrics.precision_recall(line(9, 9.5), line(0, 1, 5), neighbours=1)
    assert found == (1 / 2, 0)


def test_precision_of_one_set_is_the_recall_of_the_other():
    a, b = cloud(0, n=200, d=3), cloud(1, n=150, d=3)
    precision, recall = metrics.precision_recall(a, b)
    assert 0 < precision < recall < 1 or 0 < recall < precision < 1
    assert metrics.precision_recall(b, a) == (recall, precision)


def test_precision_and_recall_do_not_depend_on_where_the_origin_is():
    a, b = cloud(0, n=200, d=8), cloud(1, n=200, d=8)
    found = metrics.precision_recall(a, b)
    assert found != (0, 0) and metrics.precision_recall(a + 1e6, b + 1e6) == found


def test_equal_sets_have_precision_and_recall_and_distant_ones_neither():
    features = cloud(0, n=100, d=3).astype(np.float32)
    assert metrics.precision_recall(features, features) == (1, 1)
    assert metrics.precision_recall(features, features + 1e3) == (0, 0)


def test_copies_are_within_their_own_balls_of_radius_0():
    rng = np.random.default_rng(0)
    # Like Inception's features, most of them low: float32 rounds products one way.
    points = np.repeat(np.maximum(rng.normal(size=(60, 2048)), 0), 5, axis=0)
    assert metrics.precision_recall(points, points[::-1]) == (1, 1)
    assert metrics.precision_recall(points[::3], points, block=7).precision == 1


@pytest.mark.parametrize("apart, expected", [(0.04, (1, 1)), (0.2, (0, 0))])
def test_points_are_one_if_closer_than_float32_can_tell(apart, expected):
    """Than 0.003 of their distance from the mean, which is 26 here."""
    rng = np.random.default_rng(0)
    points = np.repeat(np.maximum(rng.normal(size=(60, 2048)), 0), 5, axis=0)
    shifted = points + apart * (np.arange(2048) == 0)
    assert metrics.precision_recall(shifted, points) == expected


def test_a_lost_mode_costs_recall_and_not_precision():
    rng = np.random.default_rng(0)
    modes = np.array([0.0, 20.0])[rng.integers(0, 2, 400)]
    reference = modes[:, None] + rng.normal(size=(400, 2))
    features = rng.normal(size=(400, 2))
    precision, recall = metrics.precision_recall(features, reference)
    assert precision > 0.9 and 0.35 < recall < 0.6


@pytest.mark.parametrize("block", [1, 7, 64])
def test_precision_and_recall_do_not_depend_on_the_block(block):
    a, b = cloud(0, n=70), cloud(1, n=50)
    whole = metrics.precision_recall(a, b)  # one block of 1024
    assert metrics.precision_recall(a, b, block=block) == whole
