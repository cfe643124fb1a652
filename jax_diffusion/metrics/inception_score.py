"""Inception score (Salimans et al. 2016, "Improved Techniques for Training GANs")."""

import numpy as np

from jax_diffusion import checks
from jax_diffusion.metrics.features import Estimate, check_features


def inception_score(logits: np.ndarray, *, splits: int = 10) -> Estimate:
    """Computes exp E KL(p(label | x) || p(label)), the Inception score.

    Args:
        logits: [n, k] of a classifier, Inception in the paper.
        splits: number of contiguous parts of the rows, of which each has its score.

    Returns:
        The mean of the parts' scores, each in [1, k]; and as error their standard
        deviation, as in the authors' code and in papers: of one part, not of the mean.

    Raises:
        ValueError: unless logits are finite and n >= splits >= 1.

    >>> certain = 50 * np.eye(4)[np.arange(40) % 4]  # 4 labels, equally often
    >>> round(inception_score(certain).value, 6)
    4.0
    """
    logits = np.asarray(check_features(logits, least=1), np.float64)
    n = len(logits)
    checks.integer("splits", splits)
    if not 1 <= splits <= n:
        raise ValueError(f"splits must be 1 to {n}, as many as images, got {splits}.")
    scores, log_p = [], logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = np.exp(part)
        marginal = p.mean(axis=0)
        marginal = marginal[marginal > 0]  # 0 log 0 is 0
        within = (p * part).sum(axis=1).mean()  # minus the entropies
        scores.append(np.exp(within - (marginal * np.log(marginal)).sum()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))
