"""Inception scores of answers for which they are known."""

import numpy as np

from jax_diffusion import metrics


def test_inception_score_of_certain_and_even_answers_is_their_number():
    """E KL to the mean is log k for k labels that are equally frequent and certain."""
    for k in (2, 10):
        logits = 800.0 * np.eye(k)[np.arange(1000) % k]  # exp(-800) is 0 in float64
        score = metrics.inception_score(logits)
        np.testing.assert_allclose(score.value, k, rtol=1e-9)
        np.testing.assert_allclose(score.error, 0, atol=1e-9)


def test_inception_score_of_answers_that_do_not_differ_is_1():
    logits = np.tile(np.random.default_rng(0).normal(size=(1, 8)), (100, 1)) + 1e3
    np.testing.assert_allclose(metrics.inception_score(logits).value, 1, rtol=1e-9)


def test_inception_score_takes_its_parts_in_order():
    """The first half knows one label, the second two: scores 1 and 2."""
    labels = np.append(np.zeros(50, int), np.arange(50) % 2)
    score = metrics.inception_score(800.0 * np.eye(2)[labels], splits=2)
    np.testing.assert_allclose(score, (1.5, 0.5), rtol=1e-9)
