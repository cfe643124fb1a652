"""Rows of SAMPLERS as parameters of tests: slow if a fast row shares their code."""

import pytest

from jax_diffusion.samplers import SAMPLERS

LIKE_OTHERS = {
    "euler_ancestral",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_2s",
    "edm_heun",
}


def params(names=SAMPLERS):
    return [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ())
        for name in names
    ]


every_sampler = pytest.mark.parametrize("name", params())
