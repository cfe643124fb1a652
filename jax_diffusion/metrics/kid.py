"""KID, the kernel distance (Binkowski et al. 2018, "Demystifying MMD GANs")."""

import numpy as np

from jax_diffusion import checks
from jax_diffusion.metrics.features import Estimate, check_dimensions, check_features


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Computes KID: the squared MMD with the kernel (x . y / d + 1)^3.

    Args:
        a: features [n, d] of one set.
        b: features [m, d] of the other.
        subsets: number of random subsets, of which each has an unbiased estimate.
        subset_size: rows of each set in a subset, drawn without replacement. Default
            1000, or half of the smaller set if that is less: with all rows, every
            subset would be the same.
        seed: of the subsets.

    Returns:
        The mean of the estimates, which may be below 0 as it is unbiased; and as error
        their standard deviation, as in the authors' code: the spread of
        single subsets, not the error of the mean.

    Raises:
        ValueError: if the features differ in dimension or are not finite, for no
            subsets, or for a subset size below two or above the smaller set.

    >>> a, b = np.tile([[1.0, 0.0]], (10, 1)), np.tile([[1.0, 2.0]], (12, 1))
    >>> kernel_distance(a, b).value  # 1.5^3 + 3.5^3 - 2 * 1.5^3
    39.5
    """
    a, b = check_features(a, least=2), check_features(b, least=2)
    check_dimensions(a.shape[1], b.shape[1])
    most = min(len(a), len(b))
    size = min(1000, max(most // 2, 2)) if subset_size is None else subset_size
    checks.integer("subsets", subsets, at_least=1)
    checks.integer("subset_size", size, at_least=2, at_most=most)
    checks.integer("seed", seed, at_least=0)
    rng, found = np.random.default_rng(seed), []
    for _ in range(subsets):
        rows = (f[rng.choice(len(f), size, replace=False)] for f in (a, b))
        x, y = (np.asarray(r, np.float64) for r in rows)
        products = (a @ c.T / x.shape[1] + 1 for a, c in ((x, x), (y, y), (x, y)))
        xx, yy, xy = (p * p * p for p in products)  # ** 3 takes a hundred times as long
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size - 1)
        found.append((within - 2 * xy.sum() / size) / size)
    return Estimate(float(np.mean(found)), float(np.std(found)))
