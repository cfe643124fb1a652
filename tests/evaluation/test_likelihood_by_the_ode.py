"""bits/dim by the probability flow says so where the flow does not end in noise."""

import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.tiny_runs import SIZE

import jax_diffusion as jd
from jax_diffusion import schedules
from jax_diffusion.diffusion import Objective
from jax_diffusion.evaluation import bits_per_dim
from jax_diffusion.evaluation.image_sets import as_image_set

T, SPREAD = 100, 0.3  # standard deviation of the pixels
SCHEDULE = schedules.make_schedule(schedules.cosine_betas(T))


class OfGaussian(nn.Module):
    """v of independent Gaussian pixels, or nothing at all."""

    exact: bool = True

    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        if not self.exact:
            return jnp.zeros_like(x)
        where = timesteps.astype(int)[:, None, None, None]
        signal, noise = (jnp.asarray(a)[where] for a in SCHEDULE.now[:2])
        slope = signal * noise * (1 - SPREAD**2)
        return x * slope / (signal**2 * SPREAD**2 + noise**2)


def run_of(model, mean_type):
    config = dict(
        seed=0,
        schedule=dict(name="cosine", num_steps=T),
        objective=dict(mean_type=mean_type, var_type="fixed_small", loss="l2"),
    )
    objective = Objective(mean_type, "fixed_small")
    params = dict(unused=np.zeros(1, np.float32))
    return jd.Run(ConfigDict(config), model, params, objective, (SIZE, SIZE, 1))


@pytest.fixture(scope="module")
def images():
    x = SPREAD * np.random.default_rng(0).normal(size=(50, SIZE, SIZE, 1))
    return as_image_set(
        np.round((x + 1) * 127.5).clip(0, 255).astype(np.uint8), batch_size=50
    )


def test_an_exact_flow_ends_in_noise_and_has_the_bits_of_a_gaussian(images):
    """Without a warning, which would be an error here."""
    score, *_ = bits_per_dim.ode(run_of(OfGaussian(), "v"), images).scores
    expected = np.log2(127.5 * SPREAD) + np.log2(2 * np.pi * np.e) / 2
    assert abs(score.value - expected) < 4 * score.error + 0.01


@pytest.mark.parametrize(
    ("mean_type", "left"),  # what the flow of a network that returns 0 makes of images
    [("v", 1), ("eps", 0), ("x_0", SCHEDULE.now.noise[0] ** -2)],
)
def test_a_flow_that_does_not_end_in_noise_is_said(mean_type, left, images):
    run = run_of(OfGaussian(exact=False), mean_type)
    with pytest.warns(UserWarning, match="noise of mean square 1") as told:
        bits_per_dim.ode(run, images)
    (found,) = re.findall(r"got ([\d.e+-]+)\.", str(told[0].message))
    np.testing.assert_allclose(float(found), left * SPREAD**2, rtol=0.1)


def test_a_flow_that_is_not_finite_is_said_to_be_so(images):
    class Nan(OfGaussian):
        @nn.compact
        def __call__(self, x, timesteps, *, train=False):
            return jnp.nan * super().__call__(x, timesteps)

    with pytest.warns(UserWarning, match=r"mean square 1, got nan\."):
        bits_per_dim.ode(run_of(Nan(), "v"), images)
