"""Rows of SAMPLERS as parameters of tests: slow if a fast row shares their code, or if
they take long to compile.
"""

import pytest

from jax_diffusion.samplers import SAMPLERS

LIKE_OTHERS = {
    "euler_ancestral",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_2s",
    "edm_heun",
}
SLOW = LIKE_OTHERS | {"unipc"}


def params(names=SAMPLERS, slow=SLOW):
    return [
        pytest.param(name, marks=pytest.mark.slow if name in slow else ())
        for name in names
    ]


every_sampler = pytest.mark.parametrize("name", params())
