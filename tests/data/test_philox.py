"""Random numbers of Philox."""

import itertools

import numpy as np

from jax_diffusion.data import philox


def test_draws_of_different_purposes_seeds_and_indices_never_meet():
    keys = itertools.product((0, 1, 2), (0, 1, 2**63 + 5), (0, 1, 2**40))
    draws = np.concatenate([philox.draw(*key, 500) for key in keys])
    assert len(np.unique(draws)) == len(draws) == 27 * 500
