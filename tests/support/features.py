"""Features for tests of metrics."""

import numpy as np


def cloud(seed, n=50, d=6):
    """Features that are neither centred nor uncorrelated."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def line(*places):
    return np.array(places, float)[:, None]
