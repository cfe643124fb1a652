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
# Orders of convergence that are known. At 20 to 160 steps some are felt in a part of
# them only: (order, steps), by the sampler and the data. In a Gaussian the leading
# error of EDM's method vanishes on levels that are even in log-SNR; there, and where an
# order is high, the last step's first order and float32 show early.
ORDERS = {"ddim": 1, "dpmpp_2m": 2, "heun": 2, "dpmpp_2s": 2, "edm_heun": 2, "unipc": 4}
FELT = {
    ("unipc", "mixture"): (4, (40, 80)),
    ("unipc", "gaussian"): (4, (20, 40)),
    ("edm_heun", "mixture"): (2, (80, 160)),
    ("edm_heun", "gaussian"): (3, (20, 40)),
}
SLOW = LIKE_OTHERS | {"unipc"}


def params(names=SAMPLERS, slow=SLOW):
    return [
        pytest.param(name, marks=pytest.mark.slow if name in slow else ())
        for name in names
    ]


def order_of(name, data, steps):
    """The order that is felt on such data, None if it is not known, and at which steps
    if not at those.
    """
    return FELT.get((name, data), (ORDERS.get(name), steps))


every_sampler = pytest.mark.parametrize("name", params())
