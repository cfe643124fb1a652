"""Guidance: what it does to a prediction, and the distributions that it leads to."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import F32, F32_SUM, assert_mean, assert_moments, normal

from jax_diffusion import diffusion, guidance, samplers, schedules
from jax_diffusion.diffusion import Prediction

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(10))
NULL = 9
LABEL = jnp.array([1, 2, 3], jnp.int32)
X, T = normal(0, 3, 4, 5), jnp.array([2, 7, 4], jnp.int32)
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))


def network(x_t, t, *, label):
    """Some network that treats every image by itself, with a variance of its own."""
    row = (label + 0.1 * t)[:, None, None]
    return Prediction(jnp.sin(row + x_t), jnp.cos(row * x_t))


def both():
    """The two predictions that a network makes by itself, labeled and null."""
    null = jnp.full_like(LABEL, NULL)
    return (network(X, T, label=label) for label in (LABEL, null))


def free(scale, *, label=LABEL, **options):
    return guidance.classifier_free(network, label, NULL, scale, **options)


@pytest.mark.parametrize("rescale", [0.0, 1.0])
def test_scale_1_is_the_labeled_prediction(rescale):
    labeled, _ = both()
    np.testing.assert_allclose(free(1.0, rescale=rescale)(X, T).x_0, labeled.x_0, **F32)


def test_scale_0_is_the_prediction_without_a_label():
    _, null = both()
    np.testing.assert_allclose(free(0.0)(X, T).x_0, null.x_0, **F32)


def test_the_prediction_moves_along_a_line_and_beyond_its_ends():
    one, two, four, minus = (
        np.float64(free(s)(X, T).x_0) for s in (1.0, 2.0, 4.0, -1.0)
    )
    np.testing.assert_allclose(four - two, 2 * (two - one), **F32_SUM)
    np.testing.assert_allclose(minus - one, -2 * (two - one), **F32_SUM)
    assert np.abs(two - one).max() > 0.5


def test_a_scale_may_be_each_images_own():
    each = free(jnp.array([0.0, 1.0, 3.0]))(X, T).x_0
    for i, scale in enumerate((0.0, 1.0, 3.0)):
        np.testing.assert_allclose(each[i], free(scale)(X, T).x_0[i], **F32)


def test_a_scale_may_be_a_function_of_t():
    each = free(lambda t: t / 2)(X, T).x_0
    for i, scale in enumerate((1.0, 3.5, 2.0)):
        np.testing.assert_allclose(each[i], free(scale)(X, T).x_0[i], **F32)


def test_a_null_label_may_be_each_images_own():
    null = jnp.array([9, 8, 7])
    x_0 = guidance.classifier_free(network, LABEL, null, 0.0)(X, T).x_0
    np.testing.assert_allclose(x_0, network(X, T, label=null).x_0, **F32)


def test_the_variance_is_that_of_the_label():
    labeled, _ = both()
    np.testing.assert_allclose(free(3.0)(X, T).log_var, labeled.log_var, **F32)


@pytest.mark.parametrize("rows, columns", [(6, 1), (6, 4), (1, 1), (1, 4)])
def test_a_variance_of_fewer_numbers_is_that_of_each_image(rows, columns):
    log_var = normal(5, rows, columns, 1)

    def denoise_fn(x_t, t, *, label):
        return network(x_t, t, label=label)._replace(log_var=log_var)

    guided = guidance.classifier_free(denoise_fn, LABEL, NULL, 2.0)(X, T)
    expected = log_var[::2] if rows == 6 else jnp.tile(log_var, (3, 1, 1))
    np.testing.assert_array_equal(guided.log_var, expected)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (6, 5), (1, 5), (6, 1)])
def test_a_variance_without_an_axis_of_images_is_that_of_every_image(shape):
    """Also where the first of its axes is as long as the batch of both predictions."""
    log_var, x_t = normal(6, *shape), normal(7, 3, 6, 5)

    def denoise_fn(x_t, t, *, label):
        return network(x_t, t, label=label)._replace(log_var=log_var)

    guided = guidance.classifier_free(denoise_fn, LABEL, NULL, 2.0)
    found = guided(x_t, T).log_var
    np.testing.assert_array_equal(
        np.broadcast_to(found, x_t.shape), np.broadcast_to(log_var, x_t.shape)
    )
    clipped = diffusion.threshold_x_0(guided)
    for step in (samplers.ddpm_step, samplers.dpmpp_2m_step):
        x_0 = samplers.sample(KEYS[:3], clipped, step, SCHEDULE, x_t)
        assert x_0.shape == x_t.shape and np.all(np.isfinite(x_0))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32, jnp.int32, jnp.float32])
def test_conditioning_may_be_of_any_type_of_numbers(dtype):
    def denoise_fn(x_t, t, *, text):
        assert text.dtype == dtype
        return network(x_t, t, label=text[:, 0].astype(jnp.int32))

    text = LABEL.astype(dtype)[:, None]
    guided = guidance.classifier_free(denoise_fn, {"text": text}, {"text": 9}, 3.0)
    np.testing.assert_array_equal(guided(X, T).x_0, free(3.0)(X, T).x_0)


@pytest.mark.parametrize(
    "dtype, null, said",
    [
        (jnp.int32, 0.5, "int32, got 0.5"),
        (jnp.int32, np.array([[0.5]]), "int32, got 0.5"),
        (jnp.uint8, -1, "uint8, got -1"),
        (jnp.uint8, 256, "uint8, got 256"),
        (jnp.int32, float("nan"), "int32, got nan"),
        (bool, 2, "bool, got 2"),
    ],
)
def test_null_conditioning_that_its_type_cannot_hold_is_refused(dtype, null, said):
    text = LABEL.astype(dtype)[:, None]
    rule = f"^null_label must be of the type of the label, {said}[.]$"
    with pytest.raises(ValueError, match=rule):
        guidance.classifier_free(network, {"text": text}, {"text": null}, 3.0)
    for right in (1, 1.0, True, np.ones((3, 1), np.int64)):
        guidance.classifier_free(network, {"text": text}, {"text": right}, 3.0)


def test_the_network_is_called_once_on_neighboring_rows_with_all_they_have():
    seen = []

    def denoise_fn(x_t, t, *, label, text, mask):
        seen.append((x_t, t, label, text, mask))
        return network(x_t, t, label=label)

    text, mask = normal(1, 3, 7), jnp.array([True, False, True])
    guided = guidance.classifier_free(denoise_fn, LABEL, NULL, 2.0)
    guided(X, T, text=text, mask=mask)
    ((x_t, t, label, *others),) = seen
    np.testing.assert_array_equal(label, [1, NULL, 2, NULL, 3, NULL])
    given = zip((x_t, t, *others), (X, T, text, mask), strict=True)
    for twice, once in given:
        np.testing.assert_array_equal(twice[::2], once)
        np.testing.assert_array_equal(twice[1::2], once)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_rescaling_fully_gives_each_image_the_labeled_deviation(scale):
    labeled, _ = both()
    plain, rescaled = (free(scale, rescale=r)(X, T).x_0 for r in (0.0, 1.0))
    deviation = lambda a: np.std(np.float64(a), axis=(1, 2))  # noqa: E731
    np.testing.assert_allclose(deviation(rescaled), deviation(labeled.x_0), **F32_SUM)
    assert np.abs(deviation(plain) - deviation(labeled.x_0)).min() > 1e-2
    share = rescaled / plain  # one number for each image
    np.testing.assert_allclose(share, share[:, :1, :1] * np.ones((1, 4, 5)), **F32_SUM)


def test_rescaling_by_halves_is_the_middle():
    none, half, full = (free(3.0, rescale=r)(X, T).x_0 for r in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(half, (none + full) / 2, **F32_SUM)


def test_rescaling_a_constant_image_is_finite():
    def flat(x_t, t, *, label):
        return Prediction(
            label[:, None, None] * jnp.ones_like(x_t), jnp.zeros((1, 1, 1))
        )

    guided = guidance.classifier_free(flat, LABEL, NULL, 2.0, rescale=1.0)
    assert np.all(np.isfinite(guided(X, T).x_0))


def ratios_1_to_5(**options):
    betas = oracles.betas_of_ratios([1.0, 2.0, 3.0, 4.0, np.inf])
    schedule = schedules.make_schedule(betas)
    scale_fn = guidance.within(schedule, 7.0, **options)
    return list(np.asarray(scale_fn(jnp.arange(5, dtype=jnp.int32))))


@pytest.mark.parametrize(
    "options, scales",
    [
        ({}, [7, 7, 7, 7, 7]),
        (dict(low=1.5, high=3.5), [1, 7, 7, 1, 1]),
        (dict(low=2.5), [1, 1, 7, 7, 7]),
        (dict(high=2.5), [7, 7, 1, 1, 1]),
        (dict(low=1.5, high=3.5, outside=0.0), [0, 7, 7, 0, 0]),
        (dict(low=100.0, outside=0.0), [0, 0, 0, 0, 7]),
        (dict(low=3.5, high=1.5), [1, 1, 1, 1, 1]),
    ],
)
def test_the_scale_holds_within_the_interval_of_noise_over_signal(options, scales):
    assert ratios_1_to_5(**options) == scales


def test_a_scale_within_an_interval_may_be_each_images_own():
    betas = oracles.betas_of_ratios([1.0, 2.0, 3.0])
    scale_fn = guidance.within(
        schedules.make_schedule(betas), jnp.array([4.0, 5.0, 6.0]), low=1.5
    )
    scales = scale_fn(jnp.array([2, 0, 1], jnp.int32))
    np.testing.assert_array_equal(scales, [4.0, 1.0, 6.0])


def test_both_guidances_take_an_interval():
    scale_fn = guidance.within(SCHEDULE, 3.0, high=0.6)  # step 2 is within, 7 is not
    labeled, _ = both()
    x_0 = free(scale_fn)(X, T).x_0
    np.testing.assert_allclose(x_0[1], labeled.x_0[1], **F32)
    np.testing.assert_allclose(x_0[0], free(3.0)(X, T).x_0[0], **F32)


def quadratic(x_t, timesteps):
    """Its gradient is -x (1 + timestep)."""
    return -jnp.sum(x_t**2, axis=(1, 2)) * (1 + timesteps) / 2


def labeled(x_t, t):
    return network(x_t, t, label=LABEL)


def test_the_gradient_is_that_of_log_p_at_the_schedules_own_timesteps():
    betas = schedules.cosine_betas(100)
    schedule = schedules.make_schedule(betas, keep=range(5, 100, 10))
    prediction = guidance.classifier(labeled, schedule, quadratic, 2.0)(X, T)
    timesteps = np.array([25, 75, 45]).reshape(3, 1, 1)
    np.testing.assert_allclose(prediction.grad, -2 * X * (1 + timesteps), **F32)
    for now, before in zip(prediction[:2], labeled(X, T)[:2], strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize(
    "scale", [jnp.array([0.0, 1.0, -2.0]), lambda t: jnp.array([0.0, 1.0, -2.0])]
)
def test_a_classifiers_scale_may_be_each_images_own(scale):
    grads = guidance.classifier(labeled, SCHEDULE, quadratic, scale)(X, T).grad
    factor = np.array([0.0, -8.0, 10.0]).reshape(3, 1, 1)
    np.testing.assert_allclose(grads, factor * X, **F32)


def total(x, rows):
    return rows * jnp.sum(x, axis=(1, 2))


TAKES_ROWS = {
    "next": (lambda x, s, t: total(x, t), lambda x, t: total(x, t)),
    "by name": (lambda x, s, *, t: total(x, t), lambda x, *, t: total(x, t)),
    "by position": (lambda x, s, t, /: total(x, t), lambda x, t, /: total(x, t)),
    "later": (
        lambda x, s, y=1, t=None: total(x, t),
        lambda x, y=1, t=None: total(x, t),
    ),
    "beside a bound one": (
        functools.partial(lambda x, s, y, t: total(x, t), y=3),
        functools.partial(lambda x, y, t: total(x, t), y=3),
    ),
    "in a jit": (
        jax.jit(lambda x, s, *, t: total(x, t)),
        jax.jit(lambda x, *, t: total(x, t)),
    ),
    "bound": (
        functools.partial(lambda x, s, t: total(x, t), t=5),
        functools.partial(lambda x, t: total(x, t), t=5),
    ),
}


@pytest.mark.parametrize("how", TAKES_ROWS)
def test_an_argument_t_is_given_the_rows_wherever_it_stands_unless_bound(how):
    of_x_t, of_x_0 = TAKES_ROWS[how]
    rows = 5 if how == "bound" else np.reshape(T, (3, 1, 1))
    expected = np.broadcast_to(rows, X.shape)
    schedule = schedules.make_schedule(schedules.cosine_betas(20), keep=range(1, 20, 2))
    guided = guidance.classifier(labeled, schedule, of_x_t)
    np.testing.assert_allclose(guided(X, T).grad, expected, **F32)

    def identity(x_t, t):
        return Prediction(x_t, jnp.zeros(()))

    guided = guidance.posterior(identity, of_x_0)
    np.testing.assert_allclose(guided(X, T).grad, expected, **F32)


def test_two_classifiers_add_up():
    def linear(x_t, timesteps):
        return 3 * jnp.sum(x_t, axis=(1, 2))

    inner = guidance.classifier(labeled, SCHEDULE, quadratic, 1.0)
    grads = guidance.classifier(inner, SCHEDULE, linear, 2.0)(X, T).grad
    np.testing.assert_allclose(grads, 6 - X * (1 + T).reshape(3, 1, 1), **F32)


def test_a_classifier_within_classifier_free_keeps_its_gradient():
    inner = guidance.classifier(network, SCHEDULE, quadratic, 1.0)
    prediction = guidance.classifier_free(inner, LABEL, NULL, 3.0)(X, T)
    np.testing.assert_allclose(prediction.grad, -X * (1 + T).reshape(3, 1, 1), **F32)
    np.testing.assert_allclose(prediction.x_0, free(3.0)(X, T).x_0, **F32)


def test_a_classifier_around_classifier_free_says_the_same():
    outer = guidance.classifier(free(3.0), SCHEDULE, quadratic, 1.0)(X, T)
    np.testing.assert_allclose(outer.grad, -X * (1 + T).reshape(3, 1, 1), **F32)
    np.testing.assert_allclose(outer.x_0, free(3.0)(X, T).x_0, **F32)


def test_clipping_keeps_the_gradient_and_conditioning_passes_through():
    inner = guidance.classifier(network, SCHEDULE, quadratic, 1.0)
    prediction = diffusion.clip_x_0(inner, -0.1, 0.1)(X, T, label=LABEL)
    np.testing.assert_allclose(prediction.grad, -X * (1 + T).reshape(3, 1, 1), **F32)
    assert np.abs(prediction.x_0).max() == np.float32(0.1)


def test_label_log_prob_is_that_of_the_label_among_all():
    logits = 30 * normal(0, 3, 5)
    log_prob = guidance.label_log_prob(lambda x, timesteps: logits, LABEL)(X, T)
    exact = np.asarray(logits, np.float64)
    chances = np.exp(exact) / np.exp(exact).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(log_prob, np.log(chances[range(3), LABEL]), **F32_SUM)


def test_without_signal_guidance_leaves_x_0_and_is_finite():
    betas = schedules.zero_terminal_snr(schedules.cosine_betas(10))
    schedule = schedules.make_schedule(betas)
    t = jnp.array([9, 9, 8], jnp.int32)
    prediction = Prediction(X, jnp.zeros((1, 1, 1)), jnp.ones_like(X))
    x_0 = diffusion.guided_x_0(schedule, prediction, t)
    np.testing.assert_array_equal(x_0[:2], X[:2])
    assert np.all(np.isfinite(x_0)) and np.all(x_0[2] > X[2])


@functools.cache
def dropped(share):
    """2000 batches of eight labels, true where hidden."""
    label = jnp.arange(8, dtype=jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2000)
    drop = functools.partial(guidance.drop_labels, null_label=NULL, share=share)
    after = np.asarray(jax.vmap(drop, in_axes=(0, None))(keys, label))
    assert np.all((after == NULL) | (after == np.arange(8)))
    return after == NULL


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_labels_are_hidden_in_their_share_at_every_place(share):
    assert_mean(dropped(share), share)


def test_labels_are_hidden_independently_of_their_neighbors():
    hidden = dropped(0.5) - 0.5
    for shift in range(1, 8):
        assert_mean(hidden * np.roll(hidden, shift, axis=1), 0.0)
    assert_mean(hidden[1:] * hidden[:-1], 0.0)


def test_a_share_of_0_hides_none_and_of_1_all():
    assert not dropped(0.0).any() and dropped(1.0).all()


def test_all_conditioning_of_an_image_is_hidden_together_with_its_label():
    key, label = jax.random.key(1), jnp.arange(64, dtype=jnp.int32) % 8
    told = dict(label=label, cond=jnp.ones((64, 3)), mask=jnp.ones((64, 2), bool))
    null = dict(label=NULL, cond=0.0, mask=False)
    after = guidance.drop(key, told | dict(other=label), null, 0.5)
    assert after["other"] is label
    alone = guidance.drop_labels(key, label, NULL, 0.5)
    np.testing.assert_array_equal(after["label"], alone)
    hidden = alone == NULL
    assert 16 < hidden.sum() < 48
    np.testing.assert_array_equal(after["cond"], jnp.ones((64, 3)) * ~hidden[:, None])
    np.testing.assert_array_equal(after["mask"], told["mask"] & ~hidden[:, None])


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8])
def test_labels_keep_their_type(dtype):
    label = jnp.arange(8, dtype=dtype)
    assert guidance.drop_labels(jax.random.key(0), label, NULL, 0.5).dtype == dtype


STD = 0.5


def log_uniform(num_steps):
    return schedules.make_schedule(
        oracles.betas_of_ratios(oracles.log_uniform_ratios(num_steps))
    )


FINE = log_uniform(161)
SOLVERS = {
    "ddim": samplers.ddim_step,
    "dpmpp_2m": samplers.dpmpp_2m_step,
    "heun": samplers.heun_step,
}
# of the flow at 161 steps, as measured without guidance: test_solvers
FLOW = {"ddim": 0.03, "dpmpp_2m": 1e-3, "heun": 1e-3}


def one_fast(names):
    """All names as parameters, of which only "ddim" is in the fast part."""
    return [pytest.param(n, marks=[pytest.mark.slow][n == "ddim" :]) for n in names]


every_solver = pytest.mark.parametrize("name", one_fast(SOLVERS))


def ends(mean, std):
    """x_T, and where a flow to N(mean, std^2) takes it."""
    z = np.float64(normal(0, 50, 4))
    signal = math.sqrt(oracles.alpha_bars(FINE)[-1])
    x_T = signal * mean + math.sqrt(oracles.marginal_vars(FINE, std)[-1]) * z
    return jnp.float32(x_T), mean + std * z


@every_solver
def test_classifier_free_goes_on_from_one_gaussian_through_another(name):
    """Of means 0.4 and 0 and one variance: to N(0.4 scale, STD^2), its own tilt."""
    rows = [oracles.gaussian_rows(FINE, mean, STD) for mean in (0.0, 0.4)]

    def denoise_fn(x_t, t, *, label):
        plain, one = (oracles.affine_denoiser(r)(x_t, t) for r in rows)
        return plain._replace(x_0=jnp.where(label[:, None] == 1, one.x_0, plain.x_0))

    @jax.jit
    def sample(x_T, scale):
        label = jnp.ones(50, jnp.int32)
        guided = guidance.classifier_free(denoise_fn, label, 0, scale)
        return samplers.sample(KEYS[:50], guided, SOLVERS[name], FINE, x_T)

    for scale in (0.0, 1.0, 3.0):
        x_T, exact = ends(0.4 * scale, STD)
        x_0 = sample(x_T, scale)
        np.testing.assert_allclose(x_0, exact, rtol=0, atol=3 * FLOW[name])


def observed(y, noise_var):
    """log p(y | x_t) of y = x_0 + noise, for x_0 ~ N(0, STD^2)."""
    alpha_bar = oracles.alpha_bars(FINE)
    var = oracles.marginal_vars(FINE, STD)
    gain = np.sqrt(alpha_bar) * STD**2 / var
    spread = STD**2 * oracles.noise_vars(FINE) / var + noise_var
    rows = jnp.asarray(np.stack([gain, spread]), jnp.float32)

    def log_prob(x_t, timesteps):
        gain, spread = rows[:, timesteps.astype(jnp.int32)][:, :, None]
        return -jnp.sum((y - gain * x_t) ** 2 / (2 * spread), axis=1)

    return log_prob


@every_solver
def test_guidance_by_an_observation_leads_to_the_posterior(name):
    """Bayes: precisions add up, 4 of the prior and 12 of y = 0.8."""
    prior = oracles.gaussian_denoiser(FINE, 0.0, STD)
    guided = guidance.classifier(prior, FINE, observed(0.8, 1 / 12))
    sample = functools.partial(samplers.sample, KEYS[:50], guided, SOLVERS[name], FINE)
    x_T, exact = ends(0.6, 0.25)
    x_0 = jax.jit(sample)(x_T)
    np.testing.assert_allclose(x_0, exact, rtol=0, atol=3 * FLOW[name])


@pytest.mark.slow
def test_ddpm_guided_by_an_observation_gives_the_posterior():
    """Of first order: its variance is that of the prior, and its mean taken at x_t."""
    prior = oracles.gaussian_denoiser(FINE, 0.0, STD)
    guided = guidance.classifier(prior, FINE, observed(0.8, 1 / 12))
    sample = functools.partial(samplers.sample, KEYS, guided, samplers.ddpm_step, FINE)
    x_0 = np.ravel(jax.jit(sample)(normal(0, 200, 100)))
    assert abs(x_0.mean() - 0.6) < 0.02 and abs(x_0.std() - 0.25) < 0.01


MODES, WEIGHTS, NARROW = (-0.4, 0.5), (0.7, 0.3), 0.2  # they overlap by a few per cent
STEPS = {
    "ddpm": samplers.ddpm_step,
    "ddim with noise": functools.partial(samplers.ddim_step, eta=1.0),
    **SOLVERS,
}


COARSE = schedules.make_schedule(schedules.linear_betas(1000))
# a thousand steps where they are of first order
SCHEDULES = {name: COARSE for name in STEPS} | {"dpmpp_2m": FINE, "heun": FINE}


@functools.partial(jax.jit, static_argnames=("name", "which"))
def component(x_T, *, name, which):
    """[200, 100] samples of one component, by the exact classifier of the mixture."""
    schedule, mixture = SCHEDULES[name], (MODES, WEIGHTS, NARROW)
    prior = oracles.mixture_denoiser(schedule, *mixture)
    log_prob = oracles.mixture_log_prob(schedule, *mixture, which)
    guided = guidance.classifier(prior, schedule, log_prob)
    return samplers.sample(KEYS, guided, STEPS[name], schedule, x_T)


@pytest.mark.slow
@pytest.mark.parametrize("name", one_fast(STEPS))
def test_an_exact_classifier_of_a_mixture_gives_its_component(name):
    which = 1
    x_0 = np.ravel(component(normal(0, 200, 100), name=name, which=which))
    assert_moments(x_0, MODES[which], NARROW**2)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_classifier_free_with_scale_1_samples_the_labeled_component(which):
    def denoise_fn(x_t, t, *, label):
        prior = oracles.mixture_denoiser(FINE, MODES, WEIGHTS, NARROW)(x_t, t)
        for i, mode in enumerate(MODES):
            alone = oracles.gaussian_denoiser(FINE, mode, NARROW)(x_t, t).x_0
            x_0 = jnp.where(label[:, None] == i, alone, prior.x_0)
            prior = prior._replace(x_0=x_0)
        return prior

    label = jnp.full(200, which, jnp.int32)
    guided = guidance.classifier_free(denoise_fn, label, NULL, 1.0)
    sample = functools.partial(
        samplers.sample, KEYS, guided, samplers.dpmpp_2m_step, FINE
    )
    x_0 = np.ravel(jax.jit(sample)(normal(0, 200, 100)))
    assert_moments(x_0, MODES[which], NARROW**2)
