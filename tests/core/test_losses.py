"""Losses against integrals, hand-made tables and the bound of Gaussian data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import F32, F32_SUM, PIXELS, assert_mean, normal

from jax_diffusion import diffusion, losses, schedules
from jax_diffusion.diffusion import Objective, Prediction

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(50))
T = jnp.array([0, 1, 7, 30, 48], jnp.int32)
KEY = jax.random.key(0)

# alpha_bar = 0.9, 0.8, 0.5, 0.2, that is snr = 9, 4, 1, 1/4
HAND_MADE = schedules.make_schedule(
    1 - np.array([0.9, 0.8 / 0.9, 0.5 / 0.8, 0.2 / 0.5])
)
ALL_T = jnp.arange(4, dtype=jnp.int32)


def test_mean_flat_averages_all_but_the_batch():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(losses.mean_flat(x), [2.5, 8.5])


@pytest.mark.parametrize(
    ("mean_1", "std_1", "mean_2", "std_2"),
    [(0.0, 1.0, 1.0, 1.0), (0.3, 0.5, -0.2, 2.0), (0.0, 2.0, 0.0, 0.5)],
)
def test_normal_kl_is_the_integral_that_defines_it(mean_1, std_1, mean_2, std_2):
    x, dx = np.linspace(mean_1 - 12 * std_1, mean_1 + 12 * std_1, 200_001, retstep=True)

    def log_density(mean, std):
        return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))

    log_p, log_q = log_density(mean_1, std_1), log_density(mean_2, std_2)
    integral = np.sum(np.exp(log_p) * (log_p - log_q)) * dx
    args = (mean_1, 2 * math.log(std_1), mean_2, 2 * math.log(std_2))
    kl = losses.normal_kl(*(jnp.array([a]) for a in args))
    np.testing.assert_allclose(kl, [integral], **F32_SUM)


def test_normal_kl_vanishes_between_equals_and_broadcasts():
    mean, log_var = jnp.array([[0.3, -4.0], [1.0, 2.0]]), jnp.array([[-9.0], [3.0]])
    kl = losses.normal_kl(mean, log_var, mean, log_var)
    np.testing.assert_allclose(kl, np.zeros((2, 2)), atol=1e-6)


@pytest.mark.parametrize("std", [0.003, 0.01, 0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("mean", [0.0, 0.5, -1.2])
def test_discretized_likelihood_is_the_mass_in_the_bin(mean, std):
    shape = jnp.zeros(256)
    log_probs = losses.discretized_gaussian_log_likelihood(
        jnp.asarray(PIXELS, jnp.float32), shape + mean, shape + math.log(std)
    )
    probs, exact = np.exp(log_probs, dtype=np.float64), oracles.pixel_probs(mean, std)
    np.testing.assert_allclose(
        probs.sum(), 1.0, atol=1e-5
    )  # nothing lost or counted twice
    np.testing.assert_allclose(probs, exact, atol=5e-4)  # tanh for the normal CDF
    assert np.sum(exact * np.log2(np.maximum(exact, 1e-30) / probs)) < 2e-4  # bits


def test_discretized_likelihood_and_its_gradients_are_finite_at_extremes():
    x, mean, log_scale = (
        a.ravel().astype(np.float32)
        for a in np.meshgrid(PIXELS[::15], [-5.0, -1, 0, 0.3, 5], [-30.0, -7, 0, 7, 30])
    )
    likelihood = losses.discretized_gaussian_log_likelihood
    value_and_grads = jax.value_and_grad(lambda *a: jnp.sum(likelihood(*a)), (0, 1, 2))
    assert all(
        np.all(np.isfinite(a))
        for a in jax.tree.leaves(jax.jit(value_and_grads)(x, mean, log_scale))
    )


def test_impossible_pixels_cost_no_more_than_the_floor():
    args = (jnp.array([0.0]), jnp.array([5.0]), jnp.array([-7.0]))
    log_prob = losses.discretized_gaussian_log_likelihood(*args)
    np.testing.assert_allclose(log_prob / math.log(2), -39.86, atol=0.01)  # of 1e-12


SNR_TABLE = {  # of the x_0 error at snr = 9, 4, 1, 1/4
    "snr": [9, 4, 1, 0.25],
    "min_snr": [5, 4, 1, 0.25],
    "truncated_snr": [9, 4, 1, 1],
    "p2": [0.9, 0.8, 0.5, 0.2],
}


@pytest.mark.parametrize(("weighting", "expected"), SNR_TABLE.items(), ids=SNR_TABLE)
def test_weights_of_the_x_0_error_are_the_published_ones(weighting, expected):  # B21
    weight = losses.loss_weight(HAND_MADE, Objective("x_0", weighting=weighting), ALL_T)
    np.testing.assert_allclose(weight, expected, **F32)


@pytest.mark.parametrize(
    ("mean_type", "weighting", "expected"),
    [
        ("eps", "snr", [1, 1, 1, 1]),
        ("eps", "min_snr", [5 / 9, 1, 1, 1]),
        ("eps", "p2", [0.1, 0.2, 0.5, 0.8]),
        ("v", "snr", [0.9, 0.8, 0.5, 0.2]),
        ("v", "min_snr", [0.5, 0.8, 0.5, 0.2]),
        ("v", "truncated_snr", [0.9, 0.8, 0.5, 0.8]),
    ],
)
def test_weights_of_eps_and_v_errors_are_the_published_ones(  # B21
    mean_type, weighting, expected
):
    weight = losses.loss_weight(
        HAND_MADE, Objective(mean_type, weighting=weighting), ALL_T
    )
    np.testing.assert_allclose(weight, expected, **F32)


def test_weights_take_their_constants_from_the_objective():  # B21
    gamma = Objective("x_0", weighting="min_snr", min_snr_gamma=2.0)
    np.testing.assert_allclose(
        losses.loss_weight(HAND_MADE, gamma, ALL_T), [2, 2, 1, 0.25], **F32
    )
    p2 = Objective("x_0", weighting="p2", p2_gamma=0.5, p2_k=3.0)
    np.testing.assert_allclose(losses.loss_weight(HAND_MADE, p2, ALL_T)[2], 0.5, **F32)


@pytest.mark.parametrize("weighting", SNR_TABLE)
def test_a_weighting_gives_one_loss_whatever_the_network_predicts(weighting):  # B21
    x_0, eps, x_0_hat = (normal(seed, 5, 24) for seed in range(3))
    x_t = diffusion.q_sample(SCHEDULE, x_0, T, eps)
    outputs = {
        "eps": diffusion.eps_from_x_0(SCHEDULE, x_t, T, x_0_hat),
        "x_0": x_0_hat,
        "v": diffusion.v_from_x_0(SCHEDULE, x_t, T, x_0_hat),
        "mu": diffusion.q_posterior(SCHEDULE, x_0_hat, x_t, T)[0],
    }
    first, *rest = (
        weighted_loss(Objective(mean_type, weighting=weighting), output, x_0, eps)
        for mean_type, output in outputs.items()
    )
    for loss in rest:
        np.testing.assert_allclose(loss, first, rtol=1e-3)  # eps - eps cancels at t = 0


def weighted_loss(objective, output, x_0, eps):
    return losses.training_loss(
        KEY, lambda x, timesteps: output, SCHEDULE, objective, x_0, T, eps=eps
    ).loss


@pytest.mark.parametrize("mean_type", ["eps", "x_0", "v", "mu"])
def test_uniform_weight_is_one_whatever_the_network_predicts(mean_type):
    weight = losses.loss_weight(HAND_MADE, Objective(mean_type), ALL_T)
    np.testing.assert_array_equal(weight, np.ones(4))


@pytest.mark.parametrize("weighting", ["uniform", *SNR_TABLE])
@pytest.mark.parametrize("mean_type", ["x_0", "v", "mu"])
def test_weights_are_finite_where_no_signal_is_left(mean_type, weighting):
    schedule = schedules.make_schedule(schedules.jsd_betas(4))
    weight = losses.loss_weight(
        schedule, Objective(mean_type, weighting=weighting), ALL_T
    )
    assert np.all(np.isfinite(weight))


@pytest.mark.parametrize(
    ("loss", "expected"), [("l2", 2.125), ("l1", 1.25), ("huber", 0.8125)]
)
def test_simple_losses_of_errors_one_half_and_two(loss, expected):
    x_0 = jnp.array([[0.5, -2.0]])  # huber: 0.5^2 / 2 and 2 - 1/2
    terms = losses.training_loss(
        KEY,
        lambda x, timesteps: jnp.zeros_like(x),
        SCHEDULE,
        Objective("x_0", loss=loss),
        x_0,
        T[:1],
    )
    np.testing.assert_allclose(terms.loss, [expected], **F32)
    np.testing.assert_allclose(terms.mse, [2.125], **F32)
    np.testing.assert_array_equal(terms.vlb, [0.0])


def test_the_network_sees_x_t_and_the_steps_that_the_schedule_kept():
    schedule = schedules.make_schedule(schedules.cosine_betas(50), keep=[2, 30, 49])
    x_0, eps, t = jnp.ones((2, 4)), -jnp.ones((2, 4)), jnp.array([2, 0], jnp.int32)
    seen = []
    losses.training_loss(
        KEY, lambda *a: seen.extend(a) or a[0], schedule, Objective(), x_0, t, eps=eps
    )
    np.testing.assert_array_equal(seen[0], diffusion.q_sample(schedule, x_0, t, eps))
    np.testing.assert_array_equal(seen[1], [49.0, 2.0])


def test_the_loss_depends_on_the_key_unless_eps_is_given():
    x_0 = jnp.ones((2, 4))

    def loss(seed, **kwargs):
        args = (lambda x, timesteps: x, SCHEDULE, Objective(), x_0, T[:2])
        return losses.training_loss(jax.random.key(seed), *args, **kwargs).loss

    assert loss(0).shape == (2,)
    np.testing.assert_array_equal(loss(0), loss(0))
    assert np.all(loss(0) != loss(1))
    eps = jnp.zeros((2, 4))
    np.testing.assert_array_equal(loss(0, eps=eps), loss(1, eps=eps))


def output_loss(objective, output):
    """Loss terms of a network that outputs `output`, whatever it sees."""
    x_0 = jnp.full((5, 24), 0.25)
    eps = normal(0, *x_0.shape)
    return losses.training_loss(
        KEY, lambda x, timesteps: output, SCHEDULE, objective, x_0, T, eps=eps
    )


def learned_output():
    return 0.3 * normal(1, 5, 48)


LEARNED = {"var_type": "learned_range"}


@pytest.mark.parametrize(
    ("vlb_scale", "factor"), [(None, 50 / 1000), (1 / 50, 1.0), (0.5, 25.0)]
)
def test_hybrid_is_the_simple_loss_plus_the_scaled_bound(vlb_scale, factor):
    objective = Objective(loss="hybrid", vlb_scale=vlb_scale, **LEARNED)
    terms = output_loss(objective, learned_output())
    np.testing.assert_allclose(terms.loss, terms.mse + factor * terms.vlb, **F32)
    assert np.all(terms.vlb > 0)


@pytest.mark.parametrize(("vlb_scale", "factor"), [(None, 50.0), (1 / 50, 1.0)])
def test_vlb_loss_is_the_term_at_t_times_the_number_of_steps(vlb_scale, factor):
    objective = Objective(loss="vlb", vlb_scale=vlb_scale, **LEARNED)
    terms = output_loss(objective, learned_output())
    np.testing.assert_allclose(terms.loss, factor * terms.vlb, **F32)


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_padding_a_schedule_leaves_the_loss_as_it_is(loss):
    def program(schedule):
        def terms(x_0):
            model_fn = lambda x, timesteps: jnp.tile(x, (1, 2))  # noqa: E731
            objective = Objective(loss=loss, **LEARNED)
            args = (model_fn, schedule, objective, x_0, T)
            return losses.training_loss(KEY, *args)

        return terms

    x_0, padded = normal(1, 5, 4), schedules.pad(SCHEDULE, 200)
    for wrapped in (lambda f: f, jax.jit):
        plain, found = (wrapped(program(s))(x_0) for s in (SCHEDULE, padded))
        np.testing.assert_allclose(found.loss, plain.loss, **F32)


def test_the_bound_in_hybrid_reaches_the_variance_but_not_the_mean():
    def gradient(objective, pick):
        def total(output):
            return jnp.sum(pick(output_loss(objective, output)))

        return jax.jit(jax.grad(total))(learned_output())

    hybrid = Objective(loss="hybrid", vlb_scale=1.0, **LEARNED)
    grad = gradient(hybrid, lambda terms: terms.loss)
    of_mse = gradient(hybrid, lambda terms: terms.mse)
    of_vlb = gradient(Objective(loss="vlb", **LEARNED), lambda terms: terms.loss)
    np.testing.assert_allclose(grad[:, :24], of_mse[:, :24], **F32)
    np.testing.assert_allclose(grad[:, 24:], of_vlb[:, 24:], **F32_SUM)
    assert np.all(grad[:, 24:] != 0) and np.any(of_vlb[:, :24] != 0)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
def test_a_learned_variance_without_the_bound_is_an_error(loss):
    with pytest.raises(ValueError, match=f"'hybrid' or 'vlb' only, got '{loss}'"):
        output_loss(Objective(loss=loss, **LEARNED), learned_output())


def test_vlb_terms_of_a_perfect_prediction_are_zero_after_the_first():
    x_0 = jnp.full((5, 24), 0.25)
    x_t = diffusion.q_sample(SCHEDULE, x_0, T, normal(0, 5, 24))
    perfect = Prediction(x_0, schedules.take(SCHEDULE, T, 2).posterior_log_var)
    vlb = losses.vlb_terms(SCHEDULE, perfect, x_0, x_t, T)
    np.testing.assert_allclose(vlb[1:], np.zeros(4), atol=1e-5)
    assert vlb[0] > 0.1  # the decoder's


def test_kl_terms_are_half_the_fall_in_snr_times_the_squared_x_0_error():
    """Kingma et al. 2021, eq. 13, for the posterior variance; in bits."""
    x_0 = jnp.full((5, 24), 0.25)
    x_t = diffusion.q_sample(SCHEDULE, x_0, T, normal(0, 5, 24))
    off = Prediction(x_0 + 0.1, schedules.take(SCHEDULE, T, 2).posterior_log_var)
    vlb = losses.vlb_terms(SCHEDULE, off, x_0, x_t, T)
    snr = oracles.alpha_bars(SCHEDULE) / oracles.noise_vars(SCHEDULE)
    t = np.asarray(T)[1:]
    expected = 0.5 * (snr[t - 1] - snr[t]) * 0.1**2 / math.log(2)
    np.testing.assert_allclose(vlb[1:], expected, rtol=1e-3, atol=1e-5)


def test_vlb_loss_over_uniform_t_is_the_bound_of_gaussian_data():
    """Summed over t >= 1 the exact network pays what x_{t=0} knows and x_T does not."""
    mean, std, n = 0.3, 0.5, 128
    schedule = schedules.make_schedule(schedules.linear_betas(50))
    denoise_fn = oracles.gaussian_denoiser(schedule, mean, std)

    def model_fn(x_t, timesteps):
        prediction = denoise_fn(x_t, timesteps.astype(jnp.int32))
        log_var = jnp.broadcast_to(prediction.log_var, x_t.shape)
        return jnp.concatenate([prediction.x_0, log_var], axis=-1)

    t = jnp.tile(jnp.arange(1, 50, dtype=jnp.int32), n)
    x_0 = mean + std * normal(0, t.size, 16)
    objective = Objective("x_0", "learned", loss="vlb")
    loss = jax.jit(
        lambda key: (
            losses.training_loss(key, model_fn, schedule, objective, x_0, t).loss
        )
    )(KEY)
    known = oracles.information_bits(schedule, std)
    # each loss counts T times its term, for a uniform t
    assert_mean(loss.reshape(n, 49).sum(axis=1) / 50, known[0] - known[-1])


def test_gradients_of_the_likelihood_stay_finite_at_vanishing_scales():
    x = jnp.array([-1.0, 0.5, 1.0])

    def total(mean, log_scale):
        return losses.discretized_gaussian_log_likelihood(x, mean, log_scale).sum()

    for log_scale in (-43.0, -60.0, -80.0):
        grads = jax.grad(total, argnums=(0, 1))(x * 0.9, jnp.full(3, log_scale))
        assert all(np.isfinite(g).all() for g in grads)
