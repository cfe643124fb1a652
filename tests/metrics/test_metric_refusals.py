"""What metrics refuse, and the sentences in which they do."""

import numpy as np
import pytest

from jax_diffusion import metrics
from jax_diffusion.metrics import Moments

FIVE, FOUR = np.zeros((5, 3)), np.zeros((4, 4))
SHAPE = r"^features must be \[n, d\] with n >= {}, got shape \({}.*\)".format
GAUSSIAN = {d: Moments(100, np.zeros(d), np.eye(d)) for d in (1, 2, 3)}


@pytest.mark.parametrize(
    "call, words",
    [
        # moments and FID
        (lambda: metrics.moments(np.zeros(5)), SHAPE(2, "5,")),
        (lambda: metrics.moments(np.zeros((1, 3))), SHAPE(2, "1, 3")),
        (lambda: metrics.moments(np.zeros((2, 3, 3))), SHAPE(2, "2, 3, 3")),
        (lambda: metrics.update(None, np.zeros(5)), SHAPE(1, "5,")),
        (lambda: metrics.update(None, np.zeros((0, 3))), SHAPE(1, "0, 3")),
        (lambda: metrics.update(None, np.zeros((3, 0))), SHAPE(1, "3, 0")),
        (lambda: metrics.update(None, np.zeros((1, 3, 3))), SHAPE(1, "1, 3, 3")),
        (
            lambda: metrics.frechet_distance(GAUSSIAN[2], GAUSSIAN[3]),
            "^both sets must have equally many features, got 2 and 3",
        ),
        (
            lambda: metrics.merge(GAUSSIAN[2], GAUSSIAN[1]),
            "equally many features, got 2 and 1",
        ),
        (
            lambda: metrics.merge(GAUSSIAN[2]._replace(count=0), GAUSSIAN[2]),
            "needs known counts, got 0 and 100",
        ),
        # Inception score
        (lambda: metrics.inception_score(FIVE), "splits must be 1 to 5, .* got 10"),
        (lambda: metrics.inception_score(FIVE, splits=0), "got 0"),
        (lambda: metrics.inception_score(np.zeros(5)), SHAPE(1, "5,")),
        # KID
        (lambda: metrics.kernel_distance(FIVE, FIVE[:1]), SHAPE(2, "1, 3")),
        (lambda: metrics.kernel_distance(FIVE, FOUR), "equally many .* 3 and 4"),
        (
            lambda: metrics.kernel_distance(FIVE, FIVE, subset_size=6),
            r"subset_size must be an integer in \[2, 5\], got 6",
        ),
        (
            lambda: metrics.kernel_distance(FIVE, FIVE, subset_size=1),
            r"subset_size must be an integer in \[2, 5\], got 1",
        ),
        (
            lambda: metrics.kernel_distance(FIVE, FIVE, subsets=0),
            "subsets must be an integer >= 1, got 0",
        ),
        # precision and recall
        (
            lambda: metrics.precision_recall(FIVE, FIVE[:3]),
            "neighbours must be below 3, .* got 3",
        ),
        (lambda: metrics.precision_recall(FIVE, FOUR), "equally many .* 3 and 4"),
        (
            lambda: metrics.precision_recall(FIVE, FIVE, neighbours=0),
            "neighbours must be an integer >= 1, got 0",
        ),
        (
            lambda: metrics.precision_recall(FIVE, FIVE, block=0),
            "block must be an integer >= 1, got 0",
        ),
    ],
)
def test_metrics_refuse_sets_and_numbers_of_which_they_have_no_value(call, words):
    with pytest.raises(ValueError, match=words + r"[^.]*\.$"):
        call()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda bad: metrics.moments(bad),
        lambda bad: metrics.update(None, bad),
        lambda bad: metrics.inception_score(bad, splits=1),
        lambda bad: metrics.kernel_distance(FIVE, bad),
        lambda bad: metrics.precision_recall(FIVE, bad),
    ],
    ids=["moments", "update", "inception score", "kid", "precision and recall"],
)
def test_metrics_refuse_features_that_are_not_finite(call, value):
    bad = FIVE.copy()
    bad[2, 1] = value
    with pytest.raises(ValueError, match=r"^features must be finite, got NaN or"):
        call(bad)
