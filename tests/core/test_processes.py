"""One table for every Gaussian process: variance-preserving, EDM and rectified flow.

What holds on a chain of betas, in the other tests of this folder, holds on any levels.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles, processes
from support.oracles import F32, F32_SUM, assert_mean, assert_moments, normal
from support.sampler_rows import LIKE_OTHERS, ORDERS, every_sampler, order_of, params

from jax_diffusion import (
    diffusion,
    editing,
    guidance,
    likelihood,
    losses,
    samplers,
    schedules,
    timesteps,
)
from jax_diffusion.diffusion import Objective
from jax_diffusion.samplers import SAMPLERS

every_process = pytest.mark.parametrize("kind", processes.KINDS)
every_family = pytest.mark.parametrize("name", schedules.LEVELS)

MEAN, STD = 0.3, 0.5
MODES, WEIGHTS, MODE_STD = (-0.6, 0.5), (0.35, 0.65), 0.3
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))
RATIOS = np.geomspace(0.01, 50, 12)


# The table


@every_process
def test_the_posterior_on_any_levels_is_that_of_two_gaussian_observations(kind):
    """q(x_{t-1} | x_t, x_0): precisions of the prior and of the observed x_t add up."""
    signal, noise = processes.levels(kind, RATIOS, no_signal=True)
    c = processes.schedule_of(signal, noise)
    ratio = signal[1:] / signal[:-1]
    betas = noise[1:] ** 2 - (ratio * noise[:-1]) ** 2
    precision = 1 / noise[:-1] ** 2 + ratio**2 / betas
    of_x_0 = signal[:-1] / noise[:-1] ** 2 / precision
    np.testing.assert_allclose(c.betas[1:], betas, **F32)
    np.testing.assert_allclose(
        np.exp(c.posterior_log_var[1:]), 1 / precision, **F32_SUM
    )
    np.testing.assert_allclose(c.posterior_x_0[1:], of_x_0, **F32)
    np.testing.assert_allclose(c.posterior_x_t[1:], ratio / betas / precision, **F32)
    assert (c.posterior_x_0[0], c.posterior_x_t[0]) == (1, 0)


@pytest.mark.parametrize("betas_fn", [schedules.cosine_betas, schedules.jsd_betas])
def test_the_levels_of_a_chain_make_the_table_of_its_betas(betas_fn):
    chain = schedules.tabulate(betas_fn(50))
    table = schedules.from_levels.__wrapped__(*chain.now[:2], chain.timesteps)
    for a, b in zip(jax.tree.leaves(chain), jax.tree.leaves(table), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@every_process
def test_the_large_variance_keeps_the_spread_of_every_level(kind):
    """It is the upper bound, reached for data N(0, 1), as ancestral sampling shows."""
    signal, noise = processes.levels(kind, RATIOS, no_signal=True)
    schedule = processes.schedule_of(signal, noise)
    var = signal**2 + noise**2
    gain = jnp.asarray(signal / var, jnp.float32)[:, None]
    t = jnp.arange(len(var), dtype=jnp.int32)

    def denoise_fn(x_t, t):
        return diffusion.predict(schedule, Objective("x_0"), gain * x_t, x_t, t)

    def step(x):
        state = samplers.start(x)
        keys = KEYS[: len(var)]
        return samplers.ddpm_step(keys, denoise_fn, schedule, state, t).x[1:]

    x = jnp.ones((len(var), 10_000))
    factor = np.asarray(step(x) - step(0 * x))[:, 0]
    drawn = np.exp(np.asarray(denoise_fn(x, t).log_var))[1:, 0]
    np.testing.assert_allclose(factor**2 * var[1:] + drawn, var[:-1], rtol=1e-4)
    assert_moments((step(0 * x) / np.sqrt(drawn)[:, None]).T, 0, 1)


@pytest.mark.parametrize("betas_fn", [schedules.linear_betas, schedules.cosine_betas])
def test_the_large_variance_of_a_chain_is_beta_bit_for_bit(betas_fn):
    schedule = schedules.make_schedule(betas_fn(1000))
    t, x = jnp.arange(1, 1000, dtype=jnp.int32), jnp.ones((999, 1))
    large = diffusion.predict(schedule, Objective("x_0"), x, x, t).log_var
    np.testing.assert_array_equal(large[:, 0], jnp.log(schedule.betas[1:]))


@every_process
def test_pure_noise_has_the_spread_that_sampling_starts_from(kind):
    """1 where variance is preserved, else the noise of the last level."""
    signal, noise = processes.levels(kind, RATIOS)
    schedule = processes.schedule_of(signal, noise, length=20)
    start = 1.0 if kind == "vp" else noise[-1]
    assert [a[-1] for a in schedule.next] == [0, np.float32(start), -np.inf]
    x_T = samplers.pure_noise(KEYS, schedule, (6,))
    np.testing.assert_allclose(x_T, samplers.normal(KEYS, (6,)) * start, rtol=1e-6)


@every_process
def test_what_a_network_is_told_hides_no_row(kind):
    """log(noise) / 4 is negative in half of the rows, and they are visited."""
    signal, noise = processes.levels(kind, np.geomspace(0.001, 80, 40))
    schedule = processes.schedule_of(signal, noise)
    assert np.sum(np.asarray(schedule.timesteps) < 0) > 20
    assert np.all(schedule.visited) and np.sum(schedules.pad(schedule, 50).mask) == 40
    asked = []

    def denoise_fn(x_t, t):
        jax.debug.callback(lambda t: asked.append(int(t)), t[0])
        return diffusion.Prediction(0 * x_t, jnp.zeros((1, 1)))

    x_T = samplers.pure_noise(KEYS[:2], schedule, (3,))
    step_fn = samplers.ddim_step
    samplers.sample(KEYS[:2], denoise_fn, step_fn, schedule, x_T).block_until_ready()
    jax.effects_barrier()
    assert sorted(asked) == list(range(40))


@pytest.mark.parametrize(
    ("signal", "noise", "timesteps", "message"),
    [
        ([], [], [], "signal must be at least 1 value, got 0."),
        ([1.0, -0.1], [0.1, 1.0], [0.0, 1.0], "signal must be a vector of values >= 0"),
        ([1.0, 0.5], [0.0, 1.0], [0.0, 1.0], "noise must be a vector of values > 0"),
        ([1.0, 0.5], [0.1], [0.0, 1.0], "noise must be as many values as signal, 2, "),
        ([1.0, 0.5], [0.1, 1.0], [0.0], "timesteps must be as many values as signal"),
        ([0.5, 1.0], [1.0, 0.1], [0.0, 1.0], "noise must grow against signal .* row 1"),
        ([1.0, 1.0], [0.1, 0.1], [0.0, 1.0], "noise must grow against signal .* row 1"),
        ([1.0, 0.0, 0.0], [0.1, 1.0, 2.0], [0.0] * 3, "noise must grow .* row 2"),
        ([0.0, 0.0], [0.1, 1.0], [0.0] * 2, "noise must grow against signal .* row 0"),
        ([1.0, 1.0], [0.1, 1e30], [0.0] * 2, "signal and .* got 1 and 1e.30 in row 1."),
    ],
)
def test_levels_that_make_no_process_are_refused(signal, noise, timesteps, message):
    with pytest.raises(ValueError, match=message):
        schedules.from_levels(signal, noise, timesteps)


# Families


@every_family
def test_a_family_of_levels_makes_a_schedule_of_as_many_rows(name):
    for num_steps in (1, 2, 30):
        levels = schedules.LEVELS[name](num_steps)
        assert all(len(column) == num_steps for column in levels)
        schedule = schedules.from_levels(*levels)
        assert len(set(schedule.timesteps.tolist())) == num_steps
    assert float(levels.noise[-1] / np.maximum(levels.signal[-1], 1e-3)) > 2
    with pytest.raises(ValueError, match="num_steps must be an integer in"):
        schedules.LEVELS[name](0)


def test_edm_levels_are_even_in_a_root_of_sigma():
    levels = schedules.edm_levels(18, sigma_min=0.01, sigma_max=50.0, rho=3.0)
    gaps = np.diff(levels.noise ** (1 / 3.0))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
    assert (levels.noise[0].round(12), levels.noise[-1]) == (0.01, 50.0)
    np.testing.assert_array_equal(levels.timesteps, np.log(levels.noise) / 4)


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 1 / 3, 0.7, 3.0, 3.158])
def test_a_flow_of_any_shift_ends_in_pure_noise(shift):
    schedule = schedules.from_levels(*schedules.flow_levels(10, shift=shift))
    assert (schedule.now.signal[-1], schedule.now.noise[-1]) == (0, 1)


@pytest.mark.parametrize("sigma_max", [0.5, 1.0, 80.0])
def test_sampling_starts_from_the_noise_of_the_last_level(sigma_max):
    levels = schedules.edm_levels(10, sigma_max=sigma_max)
    for schedule in (
        schedules.from_levels(*levels),
        schedules.churned(levels.noise, churn=0.0),
    ):
        assert schedule.next.noise[-1] == np.float32(sigma_max)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_shift_of_a_flow_multiplies_noise_over_signal(shift):
    plain, levels = (schedules.flow_levels(10, shift=s) for s in (1.0, shift))
    np.testing.assert_allclose(plain.noise, np.arange(1, 11) / 10)
    ratio = levels.noise[:-1] / levels.signal[:-1]
    np.testing.assert_allclose(ratio, shift * plain.noise[:-1] / plain.signal[:-1])
    assert (levels.signal[-1], levels.noise[-1]) == (0, 1)


def log_ratio(levels):
    return np.log(levels.noise / levels.signal)


@pytest.mark.parametrize(
    ("levels", "cdf"),
    [
        (
            schedules.logit_normal_levels(100, mean=0.4, std=1.3),
            lambda x: oracles.normal_cdf((x - 0.4) / 1.3),
        ),
        (  # of log-SNR, -2 x, which falls
            schedules.laplace_levels(100, mean=0.5, scale=0.7),
            lambda x: (
                0.5
                + 0.5 * np.sign(2 * x + 0.5) * (1 - np.exp(-np.abs(2 * x + 0.5) / 0.7))
            ),
        ),
        (  # log-SNR + 2 log tan(pi u / 2) = 2 log(shift)
            schedules.cosine_levels(
                100, shift=0.25, log_snr_min=-30.0, log_snr_max=30.0
            ),
            lambda x: 2 / np.pi * np.arctan(np.exp(x) * 0.25),
        ),
    ],
    ids=["logit_normal", "laplace", "cosine_log_snr"],
)
def test_levels_are_the_quantiles_of_their_distribution(levels, cdf):
    places = cdf(log_ratio(levels))
    even = (np.arange(100) + 0.5) / 100
    if abs(places[0]) < 1e-3:  # the cosine's go from end to end
        even = np.linspace(0, 1, 100)
    np.testing.assert_allclose(places, even, atol=1e-6)


def test_vdm_levels_are_even_in_log_snr_and_preserve_variance():
    levels = schedules.vdm_levels(15, log_snr_min=-5.0, log_snr_max=9.0)
    np.testing.assert_allclose(levels.timesteps, np.linspace(9, -5, 15))
    np.testing.assert_allclose(-2 * log_ratio(levels), levels.timesteps)
    np.testing.assert_allclose(levels.signal**2 + levels.noise**2, 1)


# Outputs and losses

OUTPUTS = ("eps", "x_0", "v", "flow", "mu")


def noised(kind, *, no_signal=False):
    """A schedule, rows, and x_0, eps and x_t there."""
    signal, noise = processes.levels(kind, RATIOS, no_signal=no_signal)
    schedule = processes.schedule_of(signal, noise)
    t = jnp.arange(len(signal), dtype=jnp.int32)
    x_0, eps = 0.5 * normal(0, len(t), 6), normal(1, len(t), 6)
    return schedule, t, x_0, eps, diffusion.q_sample(schedule, x_0, t, eps)


def defined(kind, mean_type):
    return mean_type != "v" or kind == "vp"


@pytest.mark.parametrize("mean_type", OUTPUTS)
@every_process
def test_the_target_of_a_network_is_read_as_x_0(kind, mean_type):
    no_signal = mean_type != "eps" and kind != "edm"
    schedule, t, x_0, eps, x_t = noised(kind, no_signal=no_signal)
    objective = Objective(mean_type=mean_type)
    if not defined(kind, mean_type):
        with pytest.raises(
            ValueError, match=r"signal\^2 \+ noise\^2 is not 1, got 'v'"
        ):
            diffusion.check_signal(schedule, objective)
        return
    target = diffusion.target(schedule, objective, x_0, x_t, t, eps)
    found = diffusion.predict(schedule, objective, target, x_t, t).x_0
    rounding = 1e-5 * np.asarray(1 + 1 / schedule.posterior_x_0 + RATIOS.max())[:, None]
    assert np.all(np.abs(found - x_0) < rounding)
    if mean_type == "flow":
        np.testing.assert_allclose(target, eps - x_0, **F32)
        flow = diffusion.flow_from_x_0(schedule, x_t, t, x_0)
        scale = 1 + np.asarray(schedule.now.signal / schedule.now.noise)[:, None]
        assert np.all(np.abs(flow - target) < 1e-5 * scale)


@pytest.mark.parametrize("weighting", ["snr", "min_snr", "p2", "edm", "sigmoid", "vdm"])
@every_process
def test_a_weighting_gives_one_loss_whatever_the_network_predicts(kind, weighting):
    """An error in x_0, told as an error of each output, costs the same."""
    schedule, t, x_0, eps, x_t = noised(kind)
    wrong = x_0 + 0.3 * normal(2, *x_0.shape)
    wrong_eps = diffusion.eps_from_x_0(schedule, x_t, t, wrong)
    costs = {}
    for mean_type in (name for name in OUTPUTS if defined(kind, name)):
        objective = Objective(mean_type=mean_type, weighting=weighting)
        right, off = (
            np.asarray(diffusion.target(schedule, objective, x, x_t, t, e), np.float64)
            for x, e in ((x_0, eps), (wrong, wrong_eps))
        )
        error = np.mean((right - off) ** 2, axis=1)
        costs[mean_type] = losses.loss_weight(schedule, objective, t) * error
    for mean_type, cost in costs.items():  # eps of much signal is rounded most
        np.testing.assert_allclose(cost, costs["x_0"], rtol=3e-3, err_msg=mean_type)


def test_the_weight_of_edm_is_that_of_the_paper():
    signal, noise = processes.levels("edm", RATIOS)
    t, objective = jnp.arange(12), Objective("x_0", weighting="edm", sigma_data=0.7)
    weight = losses.loss_weight(processes.schedule_of(signal, noise), objective, t)
    expected = (noise**2 + 0.7**2) / (noise * 0.7) ** 2
    np.testing.assert_allclose(weight, expected, **F32_SUM)


@every_process
def test_the_vdm_loss_is_the_variational_bound(kind):
    """Term by term, with the variance of the posterior, but for the data's own term."""
    schedule, t, x_0, _, x_t = noised(kind)
    objective = Objective("x_0", var_type="fixed_small", weighting="vdm")
    guess = x_0 + 0.2 * normal(3, *x_0.shape)
    prediction = diffusion.predict(schedule, objective, guess, x_t, t)
    bound = losses.vlb_terms(schedule, prediction, x_0, x_t, t)
    weight = losses.loss_weight(schedule, objective, t)
    ours = weight * losses.mean_flat((guess - x_0) ** 2) / schedule.num_steps
    np.testing.assert_allclose(ours[1:], bound[1:], rtol=2e-3)
    assert ours[0] == 0
    padded = jax.jit(losses.loss_weight, static_argnums=1)(
        schedules.pad(schedule, 4 * schedule.num_steps), objective, t
    )
    np.testing.assert_allclose(padded, weight, rtol=1e-6)


@every_process
def test_preconditioning_makes_input_and_best_output_of_unit_variance(kind):
    """For data N(0, sigma_data^2): F gets unit variance, and F = 0 is the best x_0."""
    signal, noise = processes.levels(kind, RATIOS)
    schedule = processes.schedule_of(signal, noise, length=20)
    seen = []

    def model_fn(x, timesteps):
        seen.append(x)
        return jnp.zeros_like(x)

    for row in (0, 5, 11):
        t = jnp.full(200, row, jnp.int32)
        x_0, eps = 0.5 * normal(0, 200, 100), normal(1, 200, 100)
        x_t = diffusion.q_sample(schedule, x_0, t, eps)
        network = diffusion.precondition(model_fn, schedule, sigma_data=0.5)
        guess = network(x_t, schedule.timesteps[t])
        assert_moments(seen[-1].ravel(), 0.0, 1.0)
        exact = processes.gaussian_rows(signal, noise, 0.0, 0.5)[:2, row]
        np.testing.assert_allclose(guess, exact[0] * x_t + exact[1], **F32_SUM)
        # What is left for F, x_0 - c_skip x_t over c_out, has unit variance as well.
        ones = diffusion.precondition(lambda x, t: 1 + 0 * x, schedule, sigma_data=0.5)
        c_out = (ones(x_t, schedule.timesteps[t]) - guess).mean()
        assert_moments(((x_0 - guess) / c_out).ravel(), 0.0, 1.0)


@every_process
def test_an_objective_preconditions_its_network_wherever_it_is_read(kind):
    """The loss of "edm" is then the mean squared error of F (Karras 2022, eq. 8)."""
    signal, noise = processes.levels(kind, RATIOS)
    schedule = processes.schedule_of(signal, noise)

    def raw_fn(x, timesteps):
        return jnp.sin(3 * x) + timesteps[:, None]

    plain = Objective("x_0", weighting="edm")
    wrapped = Objective("x_0", weighting="edm", precondition=True)
    t, (x_0, eps) = jnp.arange(len(RATIOS)), normal(0, 2, len(RATIOS), 6)
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    found = diffusion.denoiser(raw_fn, schedule, wrapped)(x_t, t).x_0
    x_0_fn = diffusion.precondition(raw_fn, schedule, 0.5)
    same = diffusion.denoiser(x_0_fn, schedule, plain)(x_t, t).x_0
    np.testing.assert_array_equal(found, same)
    network = diffusion.precondition(lambda x, t: x, schedule)
    one_by_one = jax.vmap(network)(x_t, schedule.timesteps)
    np.testing.assert_allclose(one_by_one, network(x_t, schedule.timesteps), rtol=1e-6)
    var = (signal * 0.5) ** 2 + noise**2
    c_skip, c_out = signal * 0.25 / var, noise * 0.5 / np.sqrt(var)
    target = (x_0 - c_skip[:, None] * x_t) / c_out[:, None]
    error = raw_fn(x_t / np.sqrt(var)[:, None], schedule.timesteps) - target
    args = jax.random.key(0), raw_fn, schedule, wrapped, x_0, t
    loss = losses.training_loss(*args, eps=eps).loss
    np.testing.assert_allclose(loss, np.mean(error**2, axis=1), rtol=2e-4)


def test_the_edm_loss_of_a_preconditioned_network_is_plain_squared_error():
    schedule, t, x_0, eps, x_t = noised("edm")
    noise = RATIOS[:, None]
    raw, sigma_data = normal(4, *x_0.shape), 0.7
    network = diffusion.precondition(lambda x, t: raw, schedule, sigma_data)
    objective = Objective("x_0", weighting="edm", sigma_data=sigma_data)
    args = jax.random.key(0), network, schedule, objective, x_0, t
    loss = losses.training_loss(*args, eps=eps).loss
    var = noise**2 + sigma_data**2
    target = x_0 - sigma_data**2 / var * np.asarray(x_t, np.float64)
    target = target * np.sqrt(var) / (noise * sigma_data)
    np.testing.assert_allclose(loss, np.mean((raw - target) ** 2, axis=1), rtol=1e-3)


def test_a_preconditioned_network_keeps_its_variance_and_conditioning():
    schedule = schedules.from_levels(*schedules.edm_levels(10))

    def model_fn(x, timesteps, *, label):
        return jnp.concatenate([x, jnp.broadcast_to(label[:, None], x.shape)], -1)

    label, t = jnp.arange(3.0), jnp.array([0, 4, 9])
    network = diffusion.precondition(model_fn, schedule)
    output = network(jnp.ones((3, 2)), schedule.timesteps[t], label=label)
    np.testing.assert_array_equal(output[:, 2:], label[:, None].repeat(2, axis=1))


def test_preconditioning_that_has_no_meaning_is_refused():
    edm, flow = (processes.levels(kind, RATIOS) for kind in ("edm", "flow"))
    same_told = processes.schedule_of(*flow, timesteps=np.zeros(12))
    with pytest.raises(
        ValueError, match="schedule must tell a network other timesteps"
    ):
        diffusion.precondition(lambda x, t: x, same_told)
    with pytest.raises(ValueError, match=r"above sigma_data = 60.0, got 50\."):
        diffusion.precondition(lambda x, t: x, processes.schedule_of(*edm), 60.0)


# Samplers

SIZES = (20, 40, 80)


def cosine_chain(num_steps):
    return levels_of(schedules.cosine_betas(num_steps))


def linear_chain(num_steps):
    return levels_of(schedules.linear_betas(num_steps))


def levels_of(betas):
    now = schedules.tabulate(betas).now
    return now.signal, now.noise, np.arange(len(betas))


NOISY = [name for name, row in SAMPLERS.items() if row.adds_noise and name != "ddpm"]
NOISY_ROWS = [pytest.param(*row.values, 0, marks=row.marks) for row in params(NOISY)]


def log_uniform(kind, num_levels, **options):
    return processes.levels(kind, oracles.log_uniform_ratios(num_levels), **options)


@functools.partial(jax.jit, static_argnames=("name", "eta"))
def run(schedule, rows, x_T, *, name, eta=0.0):
    """Samples of a Gaussian from x_T."""
    step_fn = SAMPLERS[name].step
    if SAMPLERS[name].takes_eta:
        step_fn = functools.partial(step_fn, eta=eta)
    denoise_fn = oracles.affine_denoiser(rows)
    return samplers.sample(KEYS[: len(x_T)], denoise_fn, step_fn, schedule, x_T)


@functools.partial(jax.jit, static_argnames="name")
def run_mixture(schedule, rows, x_T, *, name):
    denoise_fn = oracles.mixture_of_levels(rows, MODES, WEIGHTS, MODE_STD)
    step_fn = SAMPLERS[name].step
    return samplers.sample(KEYS[: len(x_T)], denoise_fn, step_fn, schedule, x_T)


LENGTH = 161  # of padded tables


def assert_order(name, data, error_fn):
    order, sizes = order_of(name, data, SIZES)
    errors = [error_fn(n) for n in sizes]
    measured = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(measured - order) < 0.2, f"{measured:.2f}, errors {errors}"


solvers = pytest.mark.parametrize("name", params(ORDERS, LIKE_OTHERS))


@solvers
@every_process
def test_the_error_on_a_mixture_falls_with_the_order_on_every_process(kind, name):
    def error(num_levels):
        signal, noise = log_uniform(kind, num_levels)
        x_T = noise[-1] * normal(0, 50, 4)
        last = signal[-1], noise[-1]
        exact = processes.mixture_flow(*last, MODES, WEIGHTS, MODE_STD, x_T)
        schedule = processes.schedule_of(signal, noise, length=LENGTH)
        rows = processes.mixture_levels(signal, noise, MODE_STD)
        x_0 = run_mixture(schedule, processes.padded(rows, LENGTH), x_T, name=name)
        return np.abs(x_0 - exact).mean()

    assert_order(name, "mixture", error)


@pytest.mark.slow
@solvers
@every_process
def test_the_error_on_a_gaussian_falls_with_the_order_from_no_signal(kind, name):
    def error(num_levels):
        signal, noise = log_uniform(kind, num_levels, no_signal=True)
        z = normal(0, 50, 4)
        spread = np.hypot(signal[-1] * STD, noise[-1])
        x_T = jnp.float32(signal[-1] * MEAN + spread * z)
        schedule = processes.schedule_of(signal, noise, length=LENGTH)
        rows = processes.gaussian_rows(signal, noise, MEAN, STD)
        x_0 = run(schedule, processes.padded(rows, LENGTH), x_T, name=name)
        return np.abs(x_0 - (MEAN + STD * z)).mean()

    assert_order(name, "gaussian", error)


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddpm", 0), ("ddim", 0.5), ("ddim", 1), *NOISY_ROWS],
)
@every_process
def test_samplers_with_noise_give_the_moments_of_the_data(kind, name, eta):
    signal, noise = log_uniform(kind, SIZES[-1], no_signal=True)
    schedule = processes.schedule_of(signal, noise)
    rows = processes.gaussian_rows(signal, noise, MEAN, STD)
    x_T = samplers.pure_noise(KEYS, schedule, (100,))
    x_0 = run(schedule, rows, x_T, name=name, eta=float(eta))
    # of first order: with the posterior's variance there is too little
    assert_moments(np.ravel(x_0), MEAN, STD**2, bias=0 if name == "ddpm" else 0.04)


def assert_mixture(x_0, *, bias=0.0):
    """Mean, variance and mode weights of the mixture, within 5 sigma and a bias."""
    x_0, mean = np.ravel(x_0), np.dot(WEIGHTS, MODES)
    var = np.dot(WEIGHTS, np.square(MODES)) - mean**2 + MODE_STD**2
    assert_moments(x_0, mean, var, bias=bias)
    above = np.dot(WEIGHTS, oracles.normal_cdf(np.divide(MODES, MODE_STD)))
    assert_mean(x_0 > 0, above, bias=bias / 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
@every_process
def test_samplers_with_noise_give_a_mixture_on_every_process(kind, name):
    signal, noise = log_uniform(kind, 2 * SIZES[-1], no_signal=True)
    schedule = processes.schedule_of(signal, noise)
    rows = processes.mixture_levels(signal, noise, MODE_STD)
    x_T = samplers.pure_noise(KEYS, schedule, (100,))
    assert_mixture(run_mixture(schedule, rows, x_T, name=name), bias=0.02)


@every_sampler
def test_processes_that_differ_in_scale_only_give_the_same_samples(name):
    """x / signal obeys the same equations, and so do steps with the same noise."""
    results = []
    for kind in processes.KINDS:
        signal, noise = log_uniform(kind, 30)
        schedule = processes.schedule_of(signal, noise)
        rows = processes.mixture_levels(signal, noise, MODE_STD)
        x_T = jnp.float32(noise[-1] * normal(0, 50, 4))
        if name == "ddpm":
            rows = processes.gaussian_rows(signal, noise, MEAN, STD)
            rows[2] = np.asarray(schedule.posterior_log_var)
            results.append(run(schedule, rows, x_T, name=name))
        else:
            results.append(run_mixture(schedule, rows, x_T, name=name))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=2e-4)


def test_ddim_without_noise_is_eulers_method_on_a_flow():
    """x + (s_next - s) u, u = eps - x_0, to the rounding of float32."""
    s = np.append(0.0, schedules.flow_levels(20, shift=2.0).noise)
    schedule = schedules.from_levels(1 - s[1:], s[1:], 1000 * s[1:])
    objective = Objective(mean_type="flow")

    def model_fn(x, timesteps):
        return jnp.tanh(2 * x) - jnp.cos(timesteps / 300)[:, None]

    denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
    x = normal(0, 5, 7)
    found = samplers.sample(KEYS[:5], denoise_fn, samplers.ddim_step, schedule, x)
    x = np.asarray(x, np.float64)
    for now, to in itertools.pairwise(s[::-1]):
        u = np.tanh(2 * x) - np.cos(1000 * now / 300)
        x = x + (to - now) * u
    np.testing.assert_allclose(found, x, rtol=0, atol=2e-6)


def test_ddim_without_noise_is_eulers_method_on_a_flow_bit_for_bit():
    """Where float32 is exact: levels are powers of two, and predictions short."""
    s = np.float32([1, 0.5, 0.25, 0.125, 0.0625, 0])
    schedule = schedules.from_levels(1 - s[-2::-1], s[-2::-1], 1000 * s[-2::-1])

    def model_fn(x, timesteps):
        return jnp.round(2 * jnp.tanh(x)) - (timesteps[:, None] > 200)

    denoise_fn = diffusion.denoiser(model_fn, schedule, Objective(mean_type="flow"))
    x = jnp.round(4 * normal(0, 5, 7)) / 4
    found = samplers.sample(KEYS[:5], denoise_fn, samplers.ddim_step, schedule, x)
    for now, to in itertools.pairwise(s):
        x = x + (to - now) * model_fn(x, jnp.full(5, 1000 * now))
    np.testing.assert_array_equal(found, x)


# Churn

CHURNED = {  # levels at noise / signal, of processes that are given by it
    "edm": schedules.sigma_levels,
    "flow": lambda sigma: schedules.time_levels(sigma / (1 + sigma)),
    "vp": lambda sigma: schedules.log_snr_levels(-2 * np.log(sigma)),
}
every_churned = pytest.mark.parametrize("kind", CHURNED)


@jax.jit
def run_churned(schedule, x_T, s_noise):
    """Samples of the mixture."""
    signal, noise, _ = schedule.now
    rows = jnp.stack([signal, signal**2 * MODE_STD**2 + noise**2])
    denoise_fn = oracles.mixture_of_levels(rows, MODES, WEIGHTS, MODE_STD)
    step_fn = functools.partial(samplers.edm_heun_step, s_noise=s_noise)
    return samplers.sample(KEYS[: len(x_T)], denoise_fn, step_fn, schedule, x_T)


def mixture_mean(x, sigma):
    """E[x_0 | x_0 + sigma eps] of the mixture, in float64."""
    var = MODE_STD**2 + sigma**2
    modes = zip(MODES, WEIGHTS, strict=True)
    logits = [np.log(w) - (x - m) ** 2 / (2 * var) for m, w in modes]
    chances = np.exp(logits - np.max(logits, axis=0))
    chances = chances / chances.sum(axis=0)
    means = [m + MODE_STD**2 / var * (x - m) for m in MODES]
    return np.sum(chances * np.array(means), axis=0)


@every_churned
def test_churn_0_is_the_deterministic_method_of_edm(kind):
    """Algorithm 1 of Karras et al. 2022, in float64, whatever scales x."""
    sigma = schedules.edm_levels(12, sigma_min=0.02, sigma_max=20.0).noise
    schedule = schedules.churned(sigma, CHURNED[kind], churn=0.0)
    x = sigma[-1] * np.float64(normal(0, 6, 4))
    x_T = jnp.float32(schedule.now.signal[-1] * x)
    found = run_churned(schedule, x_T, 1.0)
    for now, to in itertools.pairwise([*sigma[::-1], 0.0]):
        slope = (x - mixture_mean(x, now)) / now
        end = x + (to - now) * slope
        if to > 0:
            slope = (slope + (end - mixture_mean(end, to)) / to) / 2
        x = x + (to - now) * slope
    np.testing.assert_allclose(found, x, rtol=0, atol=5e-5)


@every_churned
def test_churn_keeps_the_distribution_of_the_data(kind):
    sigma = schedules.edm_levels(60, sigma_min=0.01, sigma_max=50.0).noise
    options = dict(churn=20.0, s_min=0.05, s_max=20.0)
    schedule = schedules.churned(sigma, CHURNED[kind], **options)
    x_T = schedule.now.noise[-1] * normal(0, 200, 30)
    found = run_churned(schedule, x_T, 1.0)
    assert_mixture(found, bias=0.02)
    plain = schedules.churned(sigma, CHURNED[kind], churn=0.0)
    assert np.abs(found - run_churned(plain, x_T, 1.0)).mean() > 0.1


def test_euler_leaves_pure_noise_and_churn_goes_on_from_there():
    """x = signal x_0 + noise eps at the level below, for the x_0 that eps predicts."""
    sigma = [0.1, 0.5, 2.0, 8.0]

    def flow(sigma):
        return schedules.time_levels(1 / (1 + 1 / sigma))

    whole = schedules.churned([*sigma, math.inf], flow, churn=0.0)
    assert whole.now.signal[-1] == 0 and whole.now.noise[-1] == 1
    x_T, T = normal(0, 6, 4), whole.num_steps
    rest = schedules.churned(sigma, flow, churn=0.0)
    signal, noise = np.float64(rest.now.signal[-1]), np.float64(rest.now.noise[-1])
    rows = jnp.stack(
        [whole.now.signal, whole.now.signal**2 * MODE_STD**2 + whole.now.noise**2]
    )
    denoise_fn = oracles.mixture_of_levels(rows, MODES, WEIGHTS, MODE_STD)
    x_0 = denoise_fn(x_T, jnp.full(6, T - 1, jnp.int32)).x_0
    found = run_churned(whole, x_T, 1.0)
    wanted = run_churned(rest, jnp.float32(signal * x_0 + noise * x_T), 1.0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    churns = run_churned(
        schedules.churned([*sigma, math.inf], flow, churn=2.0), x_T, 1.0
    )
    assert np.isfinite(churns).all() and np.abs(churns - found).mean() > 0.05


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_a_preconditioned_network_is_sampled_with_churn(churn):
    """One of output 0 is exact for data N(0, sigma_data^2); churn 0 repeats levels."""
    sigma = schedules.edm_levels(60, sigma_min=0.01, sigma_max=50.0).noise
    schedule = schedules.churned(sigma, churn=churn)
    model_fn = diffusion.precondition(lambda x, timesteps: 0 * x, schedule, 0.5)
    denoise_fn = diffusion.denoiser(model_fn, schedule, Objective("x_0"))
    x_T = samplers.pure_noise(KEYS, schedule, (50,))
    args = KEYS, denoise_fn, samplers.edm_heun_step, schedule, x_T
    assert_moments(
        np.ravel(jax.jit(samplers.sample, static_argnums=(1, 2))(*args)),
        0,
        0.25,
        bias=0.01,
    )


def test_churn_adds_noise_between_a_level_and_the_raised_one():
    """Of variance s_noise^2 (sigma_hat^2 - sigma^2), within [s_min, s_max] only."""
    sigma = np.array([0.5, 1.0, 2.0, 4.0])
    schedule = schedules.churned(sigma, churn=1.0, s_min=1.0, s_max=2.0)
    raised = [0.5, 1.25, 2.5, 4.0]
    np.testing.assert_allclose(schedule.now.noise[::2], raised)
    np.testing.assert_allclose(schedule.now.noise[1::2], sigma[:3])
    np.testing.assert_allclose(schedule.prev.noise[1::2], raised[:3])
    most = schedules.churned(sigma, churn=100.0).now.noise[::2]
    np.testing.assert_allclose(most, np.sqrt(2) * sigma, rtol=1e-6)
    for row, var in ((5, 0.25**2 * (2.5**2 - 2**2)), (1, 0.0)):
        state = samplers.start(jnp.zeros((200, 100)))
        x = samplers.edm_heun_step(
            *(KEYS, lambda x, t: diffusion.Prediction(0 * x, 0 * x), schedule, state),
            *(jnp.full(200, row, jnp.int32),),
            s_noise=0.25,
        ).x
        assert_moments(np.ravel(x), 0.0, var)


def test_one_trace_serves_every_churn_process_and_length():
    traces = []

    @jax.jit
    def sample(schedule, s_noise):
        traces.append(None)
        return run_churned(schedule, jnp.ones((2, 3)), s_noise)

    for i, levels_fn in enumerate(CHURNED.values()):
        sigma = schedules.edm_levels(4 + i).noise
        options = dict(churn=float(i), s_min=0.01 * i, s_max=10.0 + i)
        table = schedules.churned(sigma, levels_fn, **options)
        sample(schedules.pad(table, 13), jnp.float32(1 + i / 10))
    assert len(traces) == 1


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"edm_heun"}))
def test_steps_that_need_a_chain_refuse_a_table_with_churn(name):
    schedule = schedules.churned([0.5, 1.0, 2.0], churn=1.0)
    x_T = jnp.ones((2, 3))
    args = KEYS[:2], lambda x, t: diffusion.Prediction(x, x), SAMPLERS[name].step
    said = r"^schedule must be a chain, .* got levels of churned, which rise between"
    with pytest.raises(ValueError, match=said):
        samplers.sample(*args, schedule, x_T)


def test_what_needs_a_posterior_refuses_a_table_with_churn():
    schedule = schedules.churned([0.5, 1.0, 2.0], churn=1.0)
    x, t = jnp.ones((2, 3)), jnp.array([0, 1])
    calls = [
        lambda: diffusion.q_posterior(schedule, x, x, t),
        lambda: diffusion.check_signal(schedule, Objective("mu")),
        lambda: diffusion.check_signal(schedule, Objective("x_0", "learned_range")),
        lambda: losses.loss_weight(schedule, Objective("x_0", weighting="vdm"), t),
        lambda: samplers.invert(lambda x, t: diffusion.Prediction(x, x), schedule, x),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"^schedule must be a chain, .* of churned"
        ):
            call()


def halved(sigma):
    return schedules.sigma_levels(sigma[::2])


def unknown_above(limit):
    return lambda s: schedules.sigma_levels(np.where(s > limit, np.nan, s))


@pytest.mark.parametrize(
    ("sigma", "options", "message"),
    [
        ([1.0, -2.0], {}, "sigma must be a vector of values > 0"),
        ([math.inf, 2.0], {}, "sigma must be a vector of values > 0"),
        ([], {}, "signal must be at least 1 value"),
        ([2.0, 1.0], {}, "noise must grow against signal from level to level"),
        ([1.0, 2.0], dict(churn=-1.0), "churn must be a number >= 0, got -1"),
        ([1.0, 2.0], dict(s_min=-1.0), "s_min must be a number >= 0, got -1"),
        ([1.0, 2.0], dict(s_min=1.0, s_max=0.5), "s_max must be a number >= 1.0, got"),
        (
            [1.0, 2.0],
            dict(levels_fn=halved),
            "levels_fn must return 2 levels, .* got 1",
        ),
        ([1.0, 2.0], dict(levels_fn=unknown_above(2.5)), "noise must be a vector of"),
    ],
)
def test_churn_that_makes_no_levels_is_refused(sigma, options, message):
    with pytest.raises(ValueError, match=message):
        schedules.churned(sigma, **{"churn": 1.0} | options)


def test_s_noise_below_0_is_refused():
    schedule, x = schedules.churned([0.5, 1.0], churn=1.0), jnp.ones((2, 3))
    step_fn = functools.partial(samplers.edm_heun_step, s_noise=-0.5)
    args = KEYS[:2], lambda x, t: diffusion.Prediction(x, x), step_fn, schedule, x
    with pytest.raises(ValueError, match=r"^s_noise must be a number >= 0, got -0\.5"):
        samplers.sample(*args)


@pytest.mark.parametrize("name", ["heun", "unipc"])
@every_process
def test_one_trace_serves_every_process(kind, name):
    """Levels, steps and eta are data: what is compiled is the same."""
    signal, noise = log_uniform(kind, 20)
    schedule = processes.schedule_of(signal, noise, length=SIZES[-1])
    rows = processes.padded(processes.gaussian_rows(signal, noise, 0.0, 1.0), SIZES[-1])
    run(schedule, rows, normal(0, 3, 2), name=name)
    compiled = run._cache_size()
    for other in processes.KINDS:
        schedule = processes.schedule_of(*log_uniform(other, 30), length=SIZES[-1])
        run(schedule, rows, normal(0, 3, 2), name=name)
    assert run._cache_size() == compiled


FAMILIES = {
    **{name: (levels_fn, {}) for name, levels_fn in schedules.LEVELS.items()},
    # At 15 the step to the first level is five times as long as the one before it: too
    # far for the parabola of dpmpp_3m_sde.
    "cosine_log_snr": (
        schedules.cosine_levels,
        dict(log_snr_min=-10.0, log_snr_max=10.0),
    ),
    "flow with shift 3": (schedules.flow_levels, dict(shift=3.0)),
    "a chain of cosine betas": (cosine_chain, {}),
    "a chain of linear betas": (linear_chain, {}),
}


@functools.partial(jax.jit, static_argnames="name")
def run_to_the_first_level(schedule, rows, x_T, ts, *, name):
    denoise_fn = oracles.mixture_of_levels(rows, MODES, WEIGHTS, MODE_STD)
    step_fn = SAMPLERS[name].step
    if SAMPLERS[name].takes_eta:
        step_fn = functools.partial(step_fn, eta=0.0)
    state = samplers.start(x_T, step_fn)
    args = KEYS, denoise_fn, step_fn, schedule
    return samplers.sample(*args, state=state, ts=ts).x


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampler_goes_down_to_the_first_level_of_every_family(family, name):
    """Where the flow leads x_T, or to the mixture of that level."""
    levels_fn, options = FAMILIES[family]
    signal, noise, _ = map(np.float64, levels_fn(100, **options))
    schedule = processes.schedule_of(signal, noise)
    rng = np.random.default_rng(0)
    shape = (200, 50)
    x_0 = rng.choice(MODES, shape, p=WEIGHTS) + MODE_STD * rng.normal(size=shape)
    x_T = signal[-1] * x_0 + noise[-1] * rng.normal(size=shape)
    rows = processes.mixture_levels(signal, noise, MODE_STD)
    ts = jnp.arange(99, 0, -1)
    x = run_to_the_first_level(schedule, rows, jnp.float32(x_T), ts, name=name)
    low, high = (
        (s * np.array(MODES), np.hypot(s * MODE_STD, n))
        for s, n in ((signal[0], noise[0]), (signal[-1], noise[-1]))
    )
    if SAMPLERS[name].adds_noise:
        mean = np.dot(WEIGHTS, low[0])
        var = np.dot(WEIGHTS, low[0] ** 2) - mean**2 + low[1] ** 2
        assert_moments(np.ravel(x), mean, var, bias=0.04)
        above = np.dot(WEIGHTS, oracles.normal_cdf(low[0] / low[1]))
        assert_mean(np.ravel(x) > 0, above, bias=0.01)
        return
    exact = oracles.to_quantile(x_T, high[0], WEIGHTS, high[1], *(low[0], low[1]))
    assert np.abs(x - exact).mean() < (0.06 if ORDERS[name] == 1 else 0.02)


# Guidance and editing


@every_sampler
@every_process
def test_guidance_by_a_classifier_draws_its_mode_on_every_process(kind, name):
    signal, noise = processes.levels(kind, np.geomspace(0.02, 50, 60))
    rows = np.arange(60.0)
    schedule = processes.schedule_of(signal, noise, timesteps=rows)
    levels = jnp.asarray(processes.mixture_levels(signal, noise, 0.2))
    plain = oracles.mixture_of_levels(levels, (-0.6, 0.6), WEIGHTS, 0.2)

    def denoise_fn(x_t, t):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        return plain(x_t, t)._replace(log_var=log_var)

    def log_prob_fn(x_t, timesteps):
        t = timesteps.astype(jnp.int32)
        logits, _, _ = oracles.mixture_logits(levels, (-0.6, 0.6), WEIGHTS, x_t, t)
        return jnp.sum(jax.nn.log_softmax(logits, axis=0)[1], axis=1)

    guided = guidance.classifier(denoise_fn, schedule, log_prob_fn)
    x_T = samplers.pure_noise(KEYS, schedule, (5,))
    step_fn = SAMPLERS[name].step
    x_0 = np.ravel(samplers.sample(KEYS, guided, step_fn, schedule, x_T))
    assert np.mean(x_0 > 0) > 0.98  # 0.65 without
    assert_mean(x_0, 0.6, bias=0.03)


@every_process
def test_within_counts_noise_over_signal_on_every_process(kind):
    schedule = processes.schedule_of(*processes.levels(kind, RATIOS))
    scale_fn = guidance.within(schedule, 3.0, low=0.05, high=5.0)
    expected = np.where((RATIOS >= 0.05) & (RATIOS <= 5), 3.0, 1.0)
    np.testing.assert_array_equal(scale_fn(jnp.arange(12)), expected)


def gaussian(kind, num_levels, **options):
    signal, noise = log_uniform(kind, num_levels, **options)
    schedule = processes.schedule_of(signal, noise)
    rows = jnp.asarray(processes.gaussian_rows(signal, noise, MEAN, STD))
    return schedule, oracles.affine_denoiser(rows)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "edm_heun" else pytest.mark.slow)
        for name in SAMPLERS
    ],
)
def test_gradients_by_the_levels_of_a_flow_are_finite(name):
    """Its last level has no signal, and one over it is infinite."""

    @jax.jit
    @jax.grad
    def slope(schedule):
        objective = Objective("x_0", "fixed_small")
        f = diffusion.denoiser(lambda x, _: jnp.tanh(x), schedule, objective)
        x_T = samplers.normal(KEYS[:2], (1,))
        x = samplers.sample(KEYS[:2], f, SAMPLERS[name].step, schedule, x_T)
        return jnp.sum(x)

    found = slope(schedules.from_levels(*schedules.flow_levels(4)))
    for level in (found.now, found.prev):
        assert np.isfinite(level.signal).all() and np.isfinite(level.noise).all()


@every_process
def test_inversion_finds_the_noise_that_the_flow_maps_to_an_image(kind):
    schedule, denoise_fn = gaussian(kind, 200)
    z = np.asarray(normal(0, 20, 3))
    x_T, back = editing.reconstruct(
        KEYS[:20], denoise_fn, schedule, jnp.float32(MEAN + STD * z)
    )
    spread = np.hypot(schedule.now.signal[-1] * STD, schedule.now.noise[-1])
    expected = schedule.now.signal[-1] * MEAN + spread * z
    assert np.max(np.abs(x_T - expected)) < 0.05 * spread
    np.testing.assert_allclose(back, MEAN + STD * z, rtol=0, atol=0.05)


@every_process
def test_noise_goes_back_up_to_the_marginal_of_its_level(kind):
    signal, noise = processes.levels(kind, RATIOS)
    schedule = processes.schedule_of(signal, noise)
    t, to = jnp.full(200, 4, jnp.int32), jnp.full(200, 9, jnp.int32)
    x = jnp.float32(signal[3] * 0.7 + noise[3] * normal(0, 200, 50))
    x_to = editing.renoise(KEYS, schedule, x, t, to)
    assert_moments(np.ravel(x_to), signal[9] * 0.7, noise[9] ** 2)


@every_process
def test_inpainting_keeps_what_is_known_on_every_process(kind):
    schedule, denoise_fn = gaussian(kind, 40)
    x_known, mask = normal(5, 10, 4), jnp.array([1.0, 0.0, 1.0, 0.0])
    x_T = samplers.pure_noise(KEYS[:10], schedule, (4,))
    args = KEYS[:10], denoise_fn, samplers.ddim_step, schedule, x_T, x_known, mask
    x_0 = editing.repaint(*args, jump=5, resamples=2)
    np.testing.assert_array_equal(x_0[:, ::2], x_known[:, ::2])
    assert np.all(np.abs(x_0[:, 1::2] - MEAN) < 5 * STD)


# Likelihoods


@every_process
def test_the_ode_gives_the_exact_density_on_every_process(kind):
    """To 1e-3 nats/dim, of draws from the data with the noise of row 0."""
    ratios = np.tan(2 * np.arctan(np.geomspace(0.005, 0.998, 150)))
    signal, noise = processes.levels(kind, ratios)
    if kind == "flow":  # up to no signal
        signal, noise = np.append(signal, 0.0), np.append(noise, 1.0)
    schedule = processes.schedule_of(signal, noise)
    rows = jnp.asarray(processes.gaussian_rows(signal, noise, MEAN, STD))
    x_0 = MEAN + STD * normal(5, 100, 8)
    denoise_fn = oracles.affine_denoiser(rows)
    found = likelihood.ode_bits_per_dim(KEYS[:100], denoise_fn, schedule, x_0)
    var = STD**2 + ratios[0] ** 2
    x = likelihood.dequantize(KEYS[:100], x_0)
    exact = oracles.normal_bits(x, MEAN, var * np.eye(8)) + np.log2(127.5)
    nats = np.log(2) * (np.asarray(found.total, np.float64) - exact)
    assert np.mean(np.abs(nats)) < 1e-3


@every_process
def test_the_terms_of_the_bound_are_the_information_lost_on_every_process(kind):
    """With the exact denoiser, whose variance is the data's own at every step."""
    signal, noise = processes.levels(kind, np.geomspace(0.05, 30, 40))
    schedule = processes.schedule_of(signal, noise, length=45)
    rows = processes.padded(processes.gaussian_rows(signal, noise, 0.0, STD), 45)
    denoise_fn = oracles.affine_denoiser(jnp.asarray(rows))
    x_0 = jnp.clip(STD * normal(6, 200, 50), -1, 1)
    x_0 = x_0 * STD / jnp.std(x_0)
    x_0 = jnp.clip(x_0, -1, 1)
    bits = likelihood.bits_per_dim(KEYS, denoise_fn, schedule, x_0)
    information = 0.5 * np.log2(1 + STD**2 * (signal / noise) ** 2)
    lost = information[0] - information[-1]
    terms = np.asarray(bits.vlb[:, 1:40].sum(axis=1))
    assert_mean(terms, lost, bias=0.03 * lost)  # the data are clipped
    assert not np.any(bits.vlb[:, 40:])


@every_process
def test_the_prior_term_is_the_divergence_from_pure_noise(kind):
    signal, noise = processes.levels(kind, RATIOS)
    schedule = processes.schedule_of(signal, noise, length=20)
    found = likelihood.prior_bpd(schedule, jnp.full((1, 3), 0.8))
    start = 1.0 if kind == "vp" else noise[-1]
    var = (noise[-1] / start) ** 2
    kl = 0.5 * (var + (signal[-1] * 0.8 / start) ** 2 - 1 - np.log(var))
    np.testing.assert_allclose(found, kl / np.log(2), rtol=1e-4, atol=1e-7)


# Real times


def test_a_low_discrepancy_batch_covers_every_part_and_is_uniform():
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(500))
    u = np.asarray(jax.vmap(lambda key: timesteps.even_uniform(key, 8))(keys))
    np.testing.assert_array_equal(np.sort(np.floor(u * 8), axis=1), [range(8)] * 500)
    assert_moments(u[:, 3], 0.5, 1 / 12)


def test_times_are_quantiles_of_their_distribution():
    u = jnp.linspace(0.01, 0.99, 99)
    s = np.asarray(timesteps.logit_normal(u, mean=0.4, std=1.3), np.float64)
    places = oracles.normal_cdf((np.log(s / (1 - s)) - 0.4) / 1.3)
    np.testing.assert_allclose(places, u, atol=1e-5)
    sigma = np.asarray(timesteps.log_normal(u), np.float64)
    places = oracles.normal_cdf((np.log(sigma) + 1.2) / 1.2)
    np.testing.assert_allclose(places, u, atol=1e-5)


AT = {
    "edm": (schedules.sigma_levels, lambda r: r),
    "flow": (schedules.time_levels, lambda r: r / (1 + r)),
    "vp": (schedules.log_snr_levels, lambda r: -2 * np.log(r)),
}


@pytest.mark.parametrize("mean_type", ["eps", "x_0", "flow"])
@every_process
def test_a_loss_in_continuous_time_is_that_of_a_table_of_the_same_levels(
    kind, mean_type
):
    levels_of, number_of = AT[kind]
    mixed = np.random.default_rng(0).permutation(12)
    levels = levels_of(jnp.float32(number_of(RATIOS[mixed])))
    signal, noise = processes.levels(kind, RATIOS)
    told = levels_of(number_of(RATIOS)).timesteps
    table = processes.schedule_of(signal, noise, told)
    x_0, eps = 0.5 * normal(0, 12, 6), normal(1, 12, 6)
    objective = Objective(mean_type, weighting="edm")

    @jax.jit
    def loss(schedule, t):
        def model_fn(x, timesteps):
            return jnp.tanh(x) + 0.1 * timesteps[:, None]

        args = jax.random.key(0), model_fn, schedule, objective, x_0, t
        return losses.training_loss(*args, eps=eps).loss

    t = jnp.asarray(mixed, jnp.int32)
    at = jax.jit(schedules.schedule_at)(levels)
    found = loss(at, jnp.arange(12, dtype=jnp.int32))
    np.testing.assert_allclose(found, loss(table, t), rtol=1e-4)


def test_edm_trains_in_continuous_time_with_its_preconditioning():
    """The whole of it, jitted: sigma drawn, the loss of F a plain squared error."""

    @jax.jit
    def step(key):
        sigma = timesteps.log_normal(timesteps.even_uniform(key, 64))
        schedule = schedules.schedule_at(schedules.sigma_levels(sigma))
        network = diffusion.precondition(lambda x, t: jnp.zeros_like(x), schedule)
        objective, t = Objective("x_0", weighting="edm"), jnp.arange(64)
        args = key, network, schedule, objective, 0.5 * normal(0, 64, 200), t
        return losses.training_loss(*args).loss

    loss = np.asarray(step(jax.random.key(0)))  # the target's variance is 1
    assert_mean(loss, 1.0)


def test_what_needs_a_chain_is_refused_in_continuous_time():
    schedule = schedules.schedule_at(schedules.time_levels(jnp.array([0.2, 0.7])))
    x, t, keys = jnp.zeros((2, 3)), jnp.arange(2), KEYS[:2]

    def denoise_fn(x_t, t):
        return diffusion.Prediction(x_t, jnp.zeros((1, 1)))

    learned = Objective(var_type="learned", loss="hybrid")
    calls = [
        lambda: samplers.sample(keys, denoise_fn, samplers.ddim_step, schedule, x),
        lambda: samplers.pure_noise(keys, schedule, (3,)),
        lambda: diffusion.check_signal(schedule, Objective("mu")),
        lambda: diffusion.denoiser(lambda x, t: x, schedule, learned),
        lambda: diffusion.q_posterior(schedule, x, x, t),
        lambda: losses.loss_weight(schedule, Objective(weighting="vdm"), t),
        lambda: likelihood.bits_per_dim(keys, denoise_fn, schedule, x),
        lambda: likelihood.ode_bits_per_dim(keys, denoise_fn, schedule, x),
        lambda: likelihood.prior_bpd(schedule, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="schedule must be a chain, as make_sch"):
            call()
