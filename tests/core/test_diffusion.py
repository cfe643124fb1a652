"""The forward process, conversions, and networks read as distributions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32, F32_SUM, alpha_bars, assert_moments, noise_vars, normal

from jax_diffusion import diffusion, losses, schedules
from jax_diffusion.diffusion import Objective, Prediction

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(50))
NO_SIGNAL = schedules.make_schedule(
    schedules.zero_terminal_snr(schedules.linear_betas(50))
)
T = np.array([0, 1, 7, 30, 48], np.int32)

mean_types = pytest.mark.parametrize("mean_type", ["eps", "x_0", "v", "mu"])
channels = pytest.mark.parametrize("num_channels", [1, 3])


@functools.cache
def data(num_channels=3):
    """x_0, eps, x_t and t, one image at each of five noise levels."""
    shape = (5, 2, 2, num_channels)
    x_0, eps = normal(0, *shape), normal(1, *shape)
    t = jnp.asarray(T)
    return x_0, eps, diffusion.q_sample(SCHEDULE, x_0, t, eps), t


def column(values):
    """The values at the five levels of `data`, to broadcast against its images."""
    return np.asarray(values)[T].reshape(5, 1, 1, 1)


def test_q_sample_has_the_stated_mean_and_variance():
    t = jnp.full(20_000, 20, jnp.int32)
    eps = normal(0, 20_000, 1)
    x_t = diffusion.q_sample(SCHEDULE, jnp.full((20_000, 1), 0.8), t, eps)
    alpha_bar = alpha_bars(SCHEDULE)[20]
    assert_moments(x_t, 0.8 * math.sqrt(alpha_bar), 1 - alpha_bar)


def test_q_mean_log_var_is_what_noising_step_by_step_leads_to():
    x = jnp.full((20_000, 1), 0.8)
    for t, beta in enumerate(np.asarray(SCHEDULE.betas[:21])):
        eps = normal(t, *x.shape)
        x = np.sqrt(1 - beta) * x + np.sqrt(beta) * eps
    t = jnp.array([20], jnp.int32)
    mean, log_var = diffusion.q_mean_log_var(SCHEDULE, jnp.full((1, 1), 0.8), t)
    assert_moments(x, mean[0], np.exp(log_var[0]))


def test_q_mean_log_var_is_exact_at_every_level():
    x_0, _, _, t = data()
    mean, log_var = diffusion.q_mean_log_var(SCHEDULE, x_0, t)
    np.testing.assert_allclose(mean, column(np.sqrt(alpha_bars(SCHEDULE))) * x_0, **F32)
    np.testing.assert_allclose(np.exp(log_var), column(noise_vars(SCHEDULE)), **F32)


def test_posterior_mean_of_a_noiseless_x_t_is_a_noiseless_x_t_minus_1():
    x_0, _, _, t = data()
    x_t = diffusion.q_sample(SCHEDULE, x_0, t, jnp.zeros_like(x_0))
    mean, _ = diffusion.q_posterior(SCHEDULE, x_0, x_t, t)
    prev_signal = np.sqrt(np.append(1.0, alpha_bars(SCHEDULE)[:-1]))
    np.testing.assert_allclose(mean, column(prev_signal) * x_0, **F32)


def test_posterior_after_the_forward_process_gives_the_marginal_before():
    """x_t ~ q(x_t | x_0), then x_{t-1} ~ q(x_{t-1} | x_t, x_0): so x_{t-1} ~ q."""
    t, x_0 = jnp.full(20_000, 20, jnp.int32), jnp.full((20_000, 1), 0.8)
    eps, eps_prev = normal(0, 20_000, 1), normal(1, 20_000, 1)
    x_t = diffusion.q_sample(SCHEDULE, x_0, t, eps)
    mean, log_var = diffusion.q_posterior(SCHEDULE, x_0, x_t, t)
    alpha_bar = alpha_bars(SCHEDULE)[19]
    x_prev = mean + jnp.exp(0.5 * log_var) * eps_prev
    assert_moments(x_prev, 0.8 * math.sqrt(alpha_bar), 1 - alpha_bar)


def test_conversions_from_x_0_and_back_are_inverses():
    x_0, eps, x_t, t = data()
    args = (SCHEDULE, x_t, t)
    found = diffusion.eps_from_x_0(*args, x_0)
    np.testing.assert_allclose(found, eps, **F32_SUM)
    np.testing.assert_allclose(diffusion.x_0_from_eps(*args, found), x_0, **F32_SUM)
    v = diffusion.v_from_x_0(*args, x_0)
    np.testing.assert_allclose(diffusion.x_0_from_v(*args, v), x_0, **F32_SUM)
    mu, _ = diffusion.q_posterior(SCHEDULE, x_0, x_t, t)
    np.testing.assert_allclose(diffusion.x_0_from_mu(*args, mu), x_0, **F32_SUM)


def test_v_is_the_velocity_on_the_circle_from_signal_to_noise():
    """x_t = cos(a) x_0 + sin(a) eps and v = dx_t / da, here by differences."""
    x_0, eps, x_t, t = data()
    angle = column(np.arccos(np.sqrt(alpha_bars(SCHEDULE))))
    ahead, behind = (
        np.cos(a) * np.asarray(x_0, np.float64) + np.sin(a) * np.asarray(eps)
        for a in (angle + 1e-5, angle - 1e-5)
    )
    v = diffusion.v_from_x_0(SCHEDULE, x_t, t, x_0)
    np.testing.assert_allclose(v, (ahead - behind) / 2e-5, **F32_SUM)


def test_score_is_the_gradient_of_the_log_density():
    x_0, _, x_t, t = data()
    mean, log_var = diffusion.q_mean_log_var(SCHEDULE, x_0, t)

    def log_density(x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, jnp.exp(0.5 * log_var)))

    score = diffusion.score_from_x_0(SCHEDULE, x_t, t, x_0)
    np.testing.assert_allclose(score, jax.grad(log_density)(x_t), **F32_SUM)


@mean_types
def test_a_network_that_outputs_its_target_predicts_x_0(mean_type):
    x_0, eps, x_t, t = data()
    objective = Objective(mean_type=mean_type)
    output = diffusion.target(SCHEDULE, objective, x_0, x_t, t, eps)
    x_0_hat = diffusion.predict(SCHEDULE, objective, output, x_t, t).x_0
    np.testing.assert_allclose(x_0_hat, x_0, **F32_SUM)


def test_targets_are_what_their_names_say():
    x_0, eps, x_t, t = data()
    targets = {
        name: diffusion.target(SCHEDULE, Objective(name), x_0, x_t, t, eps)
        for name in ("eps", "x_0", "v", "mu")
    }
    np.testing.assert_array_equal(targets["eps"], eps)
    np.testing.assert_array_equal(targets["x_0"], x_0)
    v = diffusion.v_from_x_0(SCHEDULE, x_t, t, x_0)
    np.testing.assert_allclose(targets["v"], v, **F32_SUM)
    mu, _ = diffusion.q_posterior(SCHEDULE, x_0, x_t, t)
    np.testing.assert_array_equal(targets["mu"], mu)


@channels
@pytest.mark.parametrize("var_type", ["learned", "learned_range"])
def test_learned_variance_is_the_second_half_of_the_channels(  # B4
    var_type, num_channels
):
    x_0, eps, _, _ = data(num_channels)
    output = jnp.concatenate([x_0, eps], axis=-1)
    split = diffusion.split_output(Objective("x_0", var_type), output, num_channels)
    np.testing.assert_array_equal(split[0], x_0)
    np.testing.assert_array_equal(split[1], eps)


@channels
def test_a_learned_log_variance_is_taken_as_it_is(num_channels):  # B4
    x_0, eps, x_t, t = data(num_channels)
    output = jnp.concatenate([x_0, eps], axis=-1)
    prediction = diffusion.predict(
        SCHEDULE, Objective("x_0", "learned"), output, x_t, t
    )
    np.testing.assert_array_equal(prediction.x_0, x_0)
    np.testing.assert_array_equal(prediction.log_var, eps)


@pytest.mark.parametrize(
    ("output", "of_beta"), [(1.0, 1.0), (-1.0, 0.0), (0.0, 0.5), (3.0, 2.0)]
)
def test_learned_range_is_a_geometric_mean_not_clamped(output, of_beta):
    x_0, _, x_t, t = data()
    channels = jnp.concatenate([x_0, jnp.full_like(x_0, output)], axis=-1)
    objective = Objective("x_0", "learned_range")
    var = jnp.exp(diffusion.predict(SCHEDULE, objective, channels, x_t, t).log_var)
    beta, alpha_bar = np.asarray(SCHEDULE.betas, np.float64), alpha_bars(SCHEDULE)
    posterior = beta[1:] * noise_vars(SCHEDULE)[:-1] / (1 - alpha_bar[1:])
    posterior = np.append(posterior[0], posterior)  # t = 0 repeats t = 1
    expected = column(beta**of_beta * posterior ** (1 - of_beta))
    np.testing.assert_allclose(var, np.broadcast_to(expected, var.shape), **F32_SUM)


@pytest.mark.parametrize(
    ("var_type", "of_beta"), [("fixed_small", 0), ("fixed_large", 1)]
)
def test_fixed_variances_are_the_ends_of_the_learned_range_but_at_0(var_type, of_beta):
    x_0, _, x_t, t = data()
    fixed = diffusion.predict(SCHEDULE, Objective("x_0", var_type), x_0, x_t, t).log_var
    ends = jnp.concatenate([x_0, jnp.full_like(x_0, 2.0 * of_beta - 1)], axis=-1)
    learned = Objective("x_0", "learned_range")
    end = diffusion.predict(SCHEDULE, learned, ends, x_t, t).log_var
    np.testing.assert_allclose(fixed[1:, 0, 0, 0], end[1:, 0, 0, 0], **F32)
    assert fixed[0] == SCHEDULE.posterior_log_var[1]


def test_the_network_is_told_the_steps_that_the_schedule_kept():
    schedule = schedules.make_schedule(schedules.cosine_betas(50), keep=[2, 30, 49])
    told = []

    def model_fn(x_t, timesteps, *, label):
        told.append((timesteps, label))
        return x_t

    denoise_fn = diffusion.denoiser(model_fn, schedule, Objective("x_0"))
    denoise_fn(jnp.zeros((2, 4)), jnp.array([2, 0], jnp.int32), label="cat")
    np.testing.assert_array_equal(told[0][0], [49.0, 2.0])
    assert told[0][1] == "cat"


def test_clip_limits_x_0_and_leaves_the_variance_alone():
    x = jnp.array([[-3.0, -0.5, 0.5, 3.0]])
    denoise_fn = diffusion.clip_x_0(lambda x_t, t: Prediction(x_t, 2 * x_t))
    x_0, log_var, _ = denoise_fn(x, jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(x_0, [[-1.0, -0.5, 0.5, 1.0]])
    np.testing.assert_array_equal(log_var, 2 * x)


def test_threshold_scales_each_image_by_its_own_quantile_if_above_one():
    ramp = jnp.linspace(-4.0, 4.0, 101)  # its 0.5 quantile of |x| is 2
    images = jnp.stack([ramp, ramp / 4]).reshape(2, 101, 1)
    denoise_fn = diffusion.threshold_x_0(lambda x_t, t: Prediction(x_t, x_t), 0.5)
    x_0, log_var, _ = denoise_fn(images, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(x_0[0, :, 0], np.clip(ramp / 2, -1, 1), **F32)
    np.testing.assert_allclose(
        x_0[1, :, 0], ramp / 4, **F32
    )  # clipped at 1, never less
    np.testing.assert_array_equal(log_var, images)


@channels
@pytest.mark.parametrize(
    ("var_type", "ratio"),
    [("fixed_small", 2), ("fixed_large", 2), ("learned", 1), ("learned_range", 3)],
)
def test_a_wrong_number_of_output_channels_is_an_error(var_type, ratio, num_channels):
    output = jnp.zeros((2, 4, 4, ratio * num_channels))
    with pytest.raises(ValueError, match=rf"got {ratio * num_channels}\.$"):
        diffusion.split_output(Objective(var_type=var_type), output, num_channels)


@pytest.mark.parametrize("field", ["mean_type", "var_type", "loss", "weighting"])
def test_an_objective_names_the_choices_to_who_misspells_one(field):
    with pytest.raises(ValueError, match=rf"^{field} must be one of .*, got 'epz'\.$"):
        Objective(**{field: "epz"})


def test_hybrid_loss_needs_a_learned_variance():
    with pytest.raises(ValueError, match="learned variance, got 'fixed_large'"):
        Objective(loss="hybrid")
    assert Objective(loss="hybrid", var_type="learned_range").learns_variance


def test_objectives_are_static_arguments():
    assert (
        hash(Objective("v")) == hash(Objective("v")) and Objective("v") != Objective()
    )


def loss_without_signal(mean_type):
    x_0 = jnp.ones((2, 4))
    return losses.training_loss(
        jax.random.key(0),
        lambda x, timesteps: x,
        NO_SIGNAL,
        Objective(mean_type),
        x_0,
        jnp.full(2, 49, jnp.int32),
    ).loss


def denoise_without_signal(mean_type):
    denoise_fn = diffusion.denoiser(lambda x, t: x, NO_SIGNAL, Objective(mean_type))
    return denoise_fn(jnp.ones((2, 4)), jnp.full(2, 49, jnp.int32)).x_0


no_signal_calls = pytest.mark.parametrize(
    "call", [loss_without_signal, denoise_without_signal], ids=["loss", "denoiser"]
)


@no_signal_calls
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_eps_cannot_be_predicted_where_no_signal_is_left(call, wrap):
    with pytest.raises(
        ValueError, match=r"mean_type must be 'v'.* zero signal, got 'eps'"
    ):
        wrap(lambda: call("eps"))()


@no_signal_calls
@pytest.mark.parametrize("mean_type", ["x_0", "v", "mu"])
def test_all_else_can_be_predicted_where_no_signal_is_left(call, mean_type):
    assert np.all(np.isfinite(call(mean_type)))
