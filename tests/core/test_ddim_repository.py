"""The stochastic chain of the DDIM repository (`ddpm_noisy`) on its own subsequences.

Its step from row i to row j is written out below in float64. A subsequence of the
repository may visit a row twice. The second visit changes nothing, but it draws: its
chain and ours take the same numbers from two generators only if draws are matched by
row, and not by the number of the visit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import diffusion, samplers, schedules, spacing
from jax_diffusion.diffusion import Objective

SIZE = 64  # values of an image
CHAIN = dict(rtol=1e-5, atol=1e-5)  # of 100 steps in float32; 3e-7 were seen

BETAS = {
    "linear": schedules.linear_betas(1000),
    "quadratic": schedules.quadratic_betas(1000),
    "short": schedules.linear_betas(100, end=0.002),
}


def uniform(num_steps, n):
    return list(range(0, num_steps, num_steps // n))


def quad(num_steps, n):
    return [int(s) for s in np.linspace(0, np.sqrt(num_steps * 0.8), n) ** 2]


def network(x, t, cos):
    return 0.9 * x * cos(0.05 * t) + 0.05


def step(betas, x, i, j, draw):
    """Theirs from row i to row j: the posterior's mean, and log(beta) as log variance.

    Row -1 is clean data. The draw is masked where i is 0.
    """
    alpha_bar = np.append(np.cumprod(1 - betas), 1.0)  # where -1 finds 1
    now, to = alpha_bar[i], alpha_bar[j]
    beta = 1 - now / to
    eps = network(x, i, np.cos)
    x_0 = np.clip(np.sqrt(1 / now) * x - np.sqrt(1 / now - 1) * eps, -1, 1)
    mean = np.sqrt(to) * beta * x_0 + np.sqrt(1 - beta) * (1 - to) * x
    with np.errstate(divide="ignore"):  # log(0), whose standard deviation is 0
        std = np.exp(0.5 * np.log(beta))
    return mean / (1 - now) + (i != 0) * std * draw


def theirs(betas, rows, x, draws):
    """Their chain down a subsequence, one draw a visit, in the order of the visits."""
    before = [-1, *rows[:-1]]
    for i, j, draw in zip(rows[::-1], before[::-1], draws, strict=True):
        x = step(betas, x, i, j, draw)
    return x


def ours(betas, rows):
    """Our chain down the distinct rows: x_T, what each step draws, and the result."""
    schedule = schedules.make_schedule(betas, keep=rows)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(1))

    def model_fn(x, timesteps):
        return network(x, timesteps[:, None], jnp.cos)

    @jax.jit
    def chain(keys):
        objective = Objective("eps", "fixed_large")
        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        denoise_fn = diffusion.clip_x_0(denoise_fn)
        x_T = samplers.normal(samplers.fold_in(keys, 10_000), (SIZE,))
        x = samplers.sample(keys, denoise_fn, samplers.ddpm_step, schedule, x_T)
        ts = jnp.arange(len(rows))[::-1]  # what steps fold into the keys
        draws = jax.vmap(lambda n: samplers.normal(samplers.fold_in(keys, n), (SIZE,)))
        return x_T[0], draws(ts)[:, 0], x[0]

    return (np.asarray(a, np.float64) for a in chain(keys))


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("rule, n", [(uniform, 12), (quad, 12), (quad, 50), (quad, 90)])
def test_the_chain_of_ddpm_noisy_is_ours_if_each_row_has_its_draw(name, rule, n):
    betas = BETAS[name]
    rows = rule(len(betas), n)
    once = sorted({*rows})
    x_T, draws, x = ours(betas, once)

    # A visit moves if the row before it is another one; the others draw in vain.
    moves = np.diff([-1, *rows])[::-1] > 0
    all_draws = np.full((len(rows), SIZE), 1e6)
    all_draws[moves] = draws
    np.testing.assert_allclose(x, theirs(betas, rows, x_T, all_draws), **CHAIN)
    np.testing.assert_allclose(x, theirs(betas, once, x_T, draws), **CHAIN)


def test_quadratic_subsequences_that_repeat_rows_are_among_those_compared():
    for betas, n in ((BETAS["linear"], 90), (BETAS["short"], 50)):
        rows = quad(len(betas), n)
        assert len({*rows}) < len(rows)
        np.testing.assert_array_equal(
            spacing.quadratic_steps(len(betas), n), sorted({*rows})
        )


@pytest.mark.parametrize("name", BETAS)
def test_a_second_visit_of_a_row_is_the_identity_whatever_it_draws(name):
    x = np.linspace(-2, 2, SIZE)
    for i in (0, 1, 40, 99):
        np.testing.assert_allclose(step(BETAS[name], x, i, i, 1e6), x, rtol=1e-12)


def test_draws_that_are_matched_by_visit_make_another_sample_of_the_same_chain():
    """What a comparison of the two sees that shares one list of draws: no error, 0.3.

    The draws of the visits in vain shift all that come after them.
    """
    betas = BETAS["short"]
    rows = quad(100, 100)
    once = sorted({*rows})
    x_T, _, _ = ours(betas, once)
    draws = np.random.default_rng(0).normal(size=(len(rows), SIZE))
    by_visit = theirs(betas, rows, x_T, draws)
    shifted = theirs(betas, once, x_T, draws[: len(once)])
    apart = np.linalg.norm(by_visit - shifted) / np.linalg.norm(by_visit)
    moves = np.diff([-1, *rows])[::-1] > 0
    matched = theirs(betas, once, x_T, draws[moves])
    assert apart > 0.2
    np.testing.assert_allclose(matched, by_visit, rtol=1e-9, atol=1e-9)
