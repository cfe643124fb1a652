"""Editing of Gaussian data, where every conditional distribution is known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import F32, F32_SUM, K_SIGMA, assert_mean, assert_moments, normal

from jax_diffusion import diffusion, editing, samplers, schedules
from jax_diffusion.diffusion import Prediction

MEAN, STD = 0.3, 0.5
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))
SHORT = schedules.make_schedule(schedules.cosine_betas(10))
FORTY = schedules.make_schedule(schedules.cosine_betas(40))
ALPHA_BAR, NOISE_VAR = oracles.alpha_bars(FORTY), oracles.noise_vars(FORTY)
X_VAR = oracles.marginal_vars(FORTY, STD)
# The last step adds no noise, and so lacks this part of the variance of the data.
LAST_VAR = STD**2 * NOISE_VAR[0] / X_VAR[0]

STEPS = {
    "ddpm": samplers.ddpm_step,
    "ddim": samplers.ddim_step,
    "2m": samplers.dpmpp_2m_step,
}


def but_one_slow(names):
    """All names as parameters, of which only the first is in the fast part."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


every_step = pytest.mark.parametrize("step", but_one_slow(STEPS))


def rows_of(t, num_rows):
    return jnp.full(num_rows, t, jnp.int32)


def tanh_denoiser(schedule):
    """Some denoiser that is not linear and mixes the pixels of an image."""

    def denoise(x_t, t):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        return Prediction(jnp.tanh(2 * x_t + jnp.roll(x_t, 1, axis=-1)), log_var)

    return denoise


NO_MODEL = tanh_denoiser(SHORT)  # for steps that ask none


def visit_step(keys, denoise_fn, schedule, state, t):
    """Writes into column t of x the number of steps taken so far, this one included."""
    count = state.x_0 + 1
    columns = jnp.arange(state.x.shape[1])[None] == t[:, None]
    return state._replace(x=jnp.where(columns, count, state.x), x_0=count)


SHAPE = (3, 4, 6, 2)
KNOWN = normal(1, *SHAPE)
MASKS = {
    "h w 1": normal(2, 4, 6, 1) > 0,
    "h w c": normal(3, 4, 6, 2) > 0,
    "b h w 1": normal(4, 3, 4, 6, 1) > 0,
}
PROJECTIONS = {
    "gray": editing.gray,
    "blocks": functools.partial(editing.block_mean, size=2),
}


@functools.partial(jax.jit, static_argnames=("step", "project"))
def complete(keys, x_T, x_known, mask=None, *, step="ddpm", project=None):
    step_fn = samplers.inpaint(STEPS[step], x_known, project or mask)
    return samplers.sample(keys, tanh_denoiser(SHORT), step_fn, SHORT, x_T)


@every_step
def test_known_pixels_are_returned_and_unknown_ones_generated(step):
    mask = MASKS["h w c"].astype(jnp.float32)
    x_0 = complete(KEYS[:3], normal(0, *SHAPE), KNOWN, mask, step=step)
    known = np.broadcast_to(mask == 1, SHAPE)
    np.testing.assert_array_equal(x_0[known], KNOWN[known])
    assert np.min(np.abs(x_0 - KNOWN)[~known]) > 1e-4


@pytest.mark.parametrize("name", but_one_slow(MASKS))
def test_a_mask_acts_on_every_pixel_that_it_broadcasts_to(name):
    x_T, mask = normal(0, *SHAPE), MASKS[name].astype(jnp.float32)
    everywhere = jnp.asarray(np.broadcast_to(mask, SHAPE))
    x_0 = complete(KEYS[:3], x_T, KNOWN, mask)
    np.testing.assert_allclose(
        x_0, complete(KEYS[:3], x_T, KNOWN, everywhere), **F32_SUM
    )
    np.testing.assert_array_equal(x_0[everywhere == 1], KNOWN[everywhere == 1])


@every_step
def test_what_is_not_known_of_the_known_image_does_not_matter(step):
    mask, x_T = MASKS["h w c"].astype(jnp.float32), normal(0, *SHAPE)
    one, other = (
        complete(KEYS[:3], x_T, x, mask, step=step)
        for x in (KNOWN, KNOWN + 100 * (1 - mask[None]))
    )
    np.testing.assert_array_equal(one, other)
    moved = complete(KEYS[:3], x_T, KNOWN + mask[None], mask, step=step)
    assert np.any((one != moved) & (mask[None] == 0))  # what is known does


@pytest.mark.parametrize("name", but_one_slow(PROJECTIONS))
def test_what_a_projection_knows_of_an_image_is_returned(name):
    project = PROJECTIONS[name]
    x_0 = complete(KEYS[:3], normal(0, *SHAPE), KNOWN, project=project)
    np.testing.assert_allclose(project(x_0), project(KNOWN), **F32_SUM)
    rest, rest_of_known = x_0 - project(x_0), KNOWN - project(KNOWN)
    assert np.min(np.max(np.abs(rest - rest_of_known), axis=(1, 2, 3))) > 0.1


@pytest.mark.parametrize("name", but_one_slow(PROJECTIONS))
def test_what_a_projection_drops_of_the_known_image_does_not_matter(name):
    project, x_T = PROJECTIONS[name], normal(0, *SHAPE)
    one, other = (
        complete(KEYS[:3], x_T, x, project=project) for x in (KNOWN, project(KNOWN))
    )
    np.testing.assert_allclose(one, other, **F32_SUM)


@pytest.mark.slow
def test_a_completed_image_does_not_depend_on_its_batch():
    mask, x_T = MASKS["b h w 1"].astype(jnp.float32), normal(0, *SHAPE)
    whole = complete(KEYS[:3], x_T, KNOWN, mask)
    alone = complete(KEYS[1:2], x_T[1:2], KNOWN[1:2], mask[1:2])
    np.testing.assert_allclose(alone, whole[1:2], **F32_SUM)
    turned = complete(KEYS[2::-1], x_T[::-1], KNOWN[::-1], mask[::-1])
    np.testing.assert_allclose(turned[::-1], whole, **F32_SUM)


@pytest.mark.parametrize("shape", [(3, 3), (4, 6, 3), (2, 4, 6, 1), (1, 3, 4, 6, 2)])
def test_a_mask_of_another_shape_is_an_error(shape):
    said = r"^mask must broadcast to \[3, 4, 6, 2\], got float32 \[[\d, ]+\]\.(\n|$)"
    with pytest.raises(ValueError, match=said):
        complete(KEYS[:3], normal(0, *SHAPE), KNOWN, jnp.ones(shape))


def test_known_pixels_have_the_noise_of_the_level_where_a_step_ends():
    """And noise of their own: new at each step, apart from that of the others."""
    mask = jnp.arange(100) < 50

    @jax.jit
    def run(x_T):
        step_fn = samplers.inpaint(noise_step, jnp.full((200, 100), 0.7), mask)
        args = (KEYS, NO_MODEL, step_fn, SHORT, x_T)
        return samplers.sample_frames(*args, num_frames=10).x

    frames = np.asarray(run(jnp.zeros((200, 100))))
    alpha_bar, var = oracles.alpha_bars(SHORT), oracles.noise_vars(SHORT)
    eps = []
    for x_t, t in zip(frames[:-1], range(8, -1, -1), strict=True):
        known, rest = x_t[:, :50], x_t[:, 50:]
        assert_moments(known.ravel(), math.sqrt(alpha_bar[t]) * 0.7, var[t])
        eps.append((known - math.sqrt(alpha_bar[t]) * 0.7) / math.sqrt(var[t]))
        assert_mean((eps[-1] * rest).ravel(), 0.0)
        assert_moments(rest.ravel(), 0.0, 1.0)
    assert_mean(np.ravel([a * b for a, b in zip(eps[1:], eps[:-1], strict=True)]), 0.0)
    np.testing.assert_allclose(frames[-1][:, :50], 0.7, **F32)


def noise_step(keys, denoise_fn, schedule, state, t):
    """Puts the noise of the step in the place of x, 50 pixels from where it was."""
    eps = samplers.normal(samplers.fold_in(keys, t), state.x.shape[1:])
    return state._replace(x=jnp.roll(eps, 50, axis=1))


STDS = np.array([1.0, 0.2])  # along (1, 1) and (1, -1)
TURN = np.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)  # its own inverse
SIGMA = TURN @ np.diag(STDS**2) @ TURN
VALUE = 1.0  # of the first pixel, which is known
GIVEN_MEAN = SIGMA[1, 0] / SIGMA[0, 0] * VALUE
GIVEN_VAR = SIGMA[1, 1] - SIGMA[1, 0] ** 2 / SIGMA[0, 0]
PAIRS = 2000


def pair_denoiser(schedule):
    """The exact x_0 and variance along (1, 1) and (1, -1), where pixels are apart."""
    rows = jnp.stack([oracles.gaussian_rows(schedule, 0.0, std) for std in STDS], -1)

    def denoise(x_t, t):
        gain, _, log_var = rows[:, t]
        return Prediction(gain * x_t, log_var)

    return denoise


def turn(x):
    return x @ jnp.asarray(TURN, jnp.float32)


def pair_step(keys, denoise_fn, schedule, state, t):
    """The exact ancestral step of two pixels: taken along (1, 1) and (1, -1)."""
    turned = state._replace(x=turn(state.x), x_0=turn(state.x_0))
    turned = samplers.ddpm_step(keys, denoise_fn, schedule, turned, t)
    return turned._replace(x=turn(turned.x), x_0=turn(turned.x_0))


def first_pixel(x):
    """The projection on the first pixel of data that are turned."""
    return turn(turn(x) * jnp.array([[1.0, 0.0]]))


@functools.cache
def pairs(resamples, *, num_steps=80, projected=False, jump=5):
    """[PAIRS] second pixels given the first; resamples = 0 is `samplers.inpaint`."""
    schedule = schedules.make_schedule(schedules.cosine_betas(num_steps))
    known = jnp.tile(jnp.array([[VALUE, 7.0]]), (PAIRS, 1))
    step_fn, mask = pair_step, jnp.array([1.0, 0.0])
    if projected:
        step_fn, mask, known = samplers.ddpm_step, first_pixel, turn(known)

    @jax.jit
    def run(key):
        keys = samplers.image_keys(key, jnp.arange(PAIRS))
        x_T = samplers.normal(samplers.fold_in(keys, -1 % 2**31), (2,))
        args = (keys, pair_denoiser(schedule))
        if resamples:
            args = (*args, step_fn, schedule, x_T, known, mask)
            return editing.repaint(*args, jump=jump, resamples=resamples)
        step = samplers.inpaint(step_fn, known, mask)
        return samplers.sample(*args, step, schedule, x_T)

    x = run(jax.random.key(resamples))
    x = np.asarray(turn(x) if projected else x)
    np.testing.assert_allclose(x[:, 0], VALUE, **F32_SUM)
    return x[:, 1]


def sigmas_off(draws, expected):
    return abs(draws.mean() - expected) * math.sqrt(len(draws)) / draws.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    "projected",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["mask", "projection"],
)
def test_repainting_samples_what_is_unknown_given_what_is_known(projected):
    assert_moments(pairs(20, projected=projected), GIVEN_MEAN, GIVEN_VAR)


@pytest.mark.slow
@pytest.mark.parametrize("projected", [False, True], ids=["mask", "projection"])
def test_replacement_alone_misses_the_mean_and_variance(projected):
    """What repainting is for; the mean is off by about a standard deviation."""
    x = pairs(0, projected=projected)
    assert sigmas_off(x, GIVEN_MEAN) > 4 * K_SIGMA
    assert sigmas_off((x - x.mean()) ** 2, GIVEN_VAR) > 2 * K_SIGMA
    better = pairs(20, projected=projected)
    assert abs(x.mean() - GIVEN_MEAN) > 5 * abs(better.mean() - GIVEN_MEAN)


@pytest.mark.slow
def test_repainting_improves_with_every_further_resampling():
    errors = [abs(pairs(n).mean() - GIVEN_MEAN) for n in (1, 4, 20)]
    assert np.all(np.diff(errors) < 0), f"measured {errors}"


@pytest.mark.slow
def test_repainting_without_resampling_is_inpainting_in_distribution():
    once, replaced = pairs(1), pairs(0)
    for a, b in ((once, replaced), *[[(x - x.mean()) ** 2 for x in (once, replaced)]]):
        error = math.sqrt((a.var() + b.var()) / PAIRS)
        assert abs(a.mean() - b.mean()) < K_SIGMA * error


SLOW_JUMPS = [pytest.param(jump, marks=pytest.mark.slow) for jump in (1, 10, 25)]


@pytest.mark.parametrize("jump", [3, *SLOW_JUMPS])
def test_repainting_nothing_known_once_is_sampling_whatever_the_jump(jump):
    args = (KEYS[:3], tanh_denoiser(SHORT), samplers.ddim_step, SHORT, normal(0, 3, 6))
    x_0 = editing.repaint(*args, jnp.ones((3, 6)), jnp.zeros(6), jump=jump, resamples=1)
    np.testing.assert_allclose(x_0, samplers.sample(*args), **F32_SUM)


@pytest.mark.slow
@pytest.mark.parametrize("jump", [1, 3, 40])
def test_repainting_nothing_known_gives_data(jump):
    """Of the right level, then, is what the noise in between leads back to."""
    args = (oracles.gaussian_denoiser(FORTY, MEAN, STD), samplers.ddpm_step, FORTY)
    x_T = math.sqrt(X_VAR[-1]) * normal(0, 200, 100)
    x_T = x_T + math.sqrt(ALPHA_BAR[-1]) * MEAN
    mask, options = jnp.zeros(100), dict(jump=jump, resamples=3)
    repaint = functools.partial(editing.repaint, KEYS, *args, **options)
    x_0 = jax.jit(repaint)(x_T, jnp.ones((200, 100)), mask)
    assert_moments(np.ravel(x_0), MEAN, STD**2, bias=LAST_VAR)


def test_repainting_makes_every_jump_as_often_as_it_says():
    asked = []

    def denoise_fn(x_t, t):
        jax.debug.callback(lambda t: asked.append(int(t[0])), t, ordered=True)
        return tanh_denoiser(SHORT)(x_t, t)

    x = jnp.zeros((2, 6))
    args = (KEYS[:2], denoise_fn, samplers.ddpm_step, schedules.pad(SHORT, 17))
    mask, options = jnp.ones(6), dict(jump=4, resamples=3)
    jax.block_until_ready(editing.repaint(*args, x, x, mask, **options))
    jax.effects_barrier()
    assert asked == 3 * [9, 8] + 3 * [7, 6, 5, 4] + 3 * [3, 2, 1, 0]


@pytest.mark.parametrize("length", [pytest.param(11, marks=pytest.mark.slow), 16])
def test_padding_does_not_change_what_is_repainted(length):
    @jax.jit
    def run(schedule):
        args = (KEYS[:3], tanh_denoiser(schedule), samplers.ddpm_step, schedule)
        x_known, mask = jnp.full((3, 6), 0.5), jnp.arange(6) < 2
        x_T = normal(0, 3, 6)
        return editing.repaint(*args, x_T, x_known, mask, jump=3, resamples=2)

    padded = run(schedules.pad(SHORT, length))
    np.testing.assert_allclose(padded, run(SHORT), **F32_SUM)


@pytest.mark.parametrize("jump, resamples", [(0, 1), (1, 0), (-2, 3)])
def test_repainting_needs_positive_numbers(jump, resamples):
    x = jnp.zeros((2, 6))
    said = r"^(jump|resamples) must be an integer >= 1, got (0|-2)\.$"
    with pytest.raises(ValueError, match=said):
        editing.repaint(
            KEYS[:2],
            tanh_denoiser(SHORT),
            samplers.ddpm_step,
            SHORT,
            x,
            x,
            jnp.ones(6),
            jump=jump,
            resamples=resamples,
        )


@jax.jit
def renoised(schedule, x, t, to):
    rows = (jnp.broadcast_to(a, x.shape[:1]) for a in (t, to))
    return editing.renoise(samplers.fold_in(KEYS, 9), schedule, x, *rows)


@pytest.mark.parametrize("t, to", [(0, 0), (0, 39), (7, 7), (7, 20), (30, 39)])
def test_noise_added_between_levels_has_the_moments_of_the_forward_process(t, to):
    low = 1.0 if t == 0 else ALPHA_BAR[t - 1]
    x_to = np.ravel(renoised(FORTY, jnp.full((200, 100), 0.7), t, to))
    ratio = ALPHA_BAR[to] / low
    assert_moments(x_to, math.sqrt(ratio) * 0.7, 1 - ratio)


@pytest.mark.parametrize("t, to", [(1, 1), (5, 30), (39, 39)])
def test_an_image_noised_twice_is_one_noised_once(t, to):
    x_0 = jnp.full((200, 100), 0.7)
    x = diffusion.q_sample(FORTY, x_0, rows_of(t - 1, 200), normal(0, 200, 100))
    x_to = np.ravel(renoised(FORTY, x, t, to))
    assert_moments(x_to, math.sqrt(ALPHA_BAR[to]) * 0.7, NOISE_VAR[to])


def test_each_image_is_noised_from_its_own_level_to_its_own():
    t, to = jnp.arange(200) % 4, 10 + jnp.arange(200) % 30
    x_to = renoised(FORTY, jnp.zeros((200, 100)), t, to)
    ratio = ALPHA_BAR[np.asarray(to)] / np.append(1.0, ALPHA_BAR)[np.asarray(t)]
    assert_moments(np.ravel(x_to / np.sqrt(1 - ratio)[:, None]), 0.0, 1.0)


def test_the_noise_of_a_single_step_keeps_its_digits_in_float32():
    schedule = schedules.make_schedule(schedules.linear_betas(1000))
    t = jnp.arange(1000, dtype=jnp.int32)
    keys = samplers.image_keys(jax.random.key(0), t)
    added = editing.renoise(keys, schedule, jnp.zeros((1000, 1)), t, t)
    std = added / samplers.normal(keys, (1,))
    # A difference of numbers below 1 that are off by 1e-7, next to betas of 1e-4
    # where noise is little and 0.02 where it is not.
    np.testing.assert_allclose(std[:, 0] ** 2, schedules.linear_betas(1000), rtol=1e-3)


def test_noise_up_to_a_level_without_signal_leaves_nothing_of_the_image():
    betas = schedules.zero_terminal_snr(schedules.linear_betas(20))
    schedule = schedules.make_schedule(betas)
    x, y = (
        renoised(schedule, jnp.full((200, 100), value), 4, 19) for value in (0.7, -3.0)
    )
    np.testing.assert_array_equal(x, y)
    assert_moments(np.ravel(x), 0.0, 1.0)


DATA = MEAN + STD * normal(5, 200, 100)
LEVELS = (0, 8, 20, 30, 39)
TRACES = []


@functools.partial(jax.jit, static_argnums=0)
def edited(step, x, t):
    TRACES.append(step)
    denoise_fn = oracles.gaussian_denoiser(FORTY, MEAN, STD)
    return editing.edit(KEYS, denoise_fn, STEPS[step], FORTY, x, t=t)


@pytest.mark.slow
@pytest.mark.parametrize("t", LEVELS)
def test_data_edited_at_any_level_are_data(t):
    x_0 = np.ravel(edited("ddpm", DATA, t))
    # their own mean and variance are off by chance, as is the result's
    assert_moments(x_0, MEAN, STD**2, bias=LAST_VAR)


@pytest.mark.slow
@pytest.mark.parametrize("t", LEVELS)
def test_an_edited_image_resembles_the_one_it_was_as_much_as_its_level_tells(t):
    """Given x_t, both are draws of p(x_0 | x_t): a covariance of Var E[x_0 | x_t]."""
    x_0 = edited("ddpm", DATA, t)
    explained = ALPHA_BAR[t] * STD**2 / X_VAR[t]
    product = np.ravel((x_0 - MEAN) * (DATA - MEAN))
    assert_mean(product, explained * STD**2)


@pytest.mark.slow
def test_edited_images_resemble_what_they_were_less_as_the_level_rises():
    for step in ("ddpm", "ddim"):
        likeness = [
            np.corrcoef(np.ravel(edited(step, DATA, t)), np.ravel(DATA))[0, 1]
            for t in LEVELS
        ]
        assert np.all(np.diff(likeness) < -0.03), f"measured {likeness}"
        assert likeness[0] > 0.99 and abs(likeness[-1]) < 0.05
    assert sorted(set(TRACES)) == sorted(TRACES)  # one for each, whatever the level


@pytest.mark.parametrize("t", [0, 3, 9])
def test_an_edit_adds_the_noise_of_t_and_visits_the_steps_from_t_to_0(t):
    x = jnp.full((200, 100), 0.7)
    x_0 = np.asarray(editing.edit(KEYS, NO_MODEL, visit_step, SHORT, x, t=t))
    np.testing.assert_array_equal(
        x_0[:, : t + 1], np.tile(np.arange(t + 1, 0, -1), (200, 1))
    )
    alpha_bar, var = oracles.alpha_bars(SHORT)[t], oracles.noise_vars(SHORT)[t]
    assert_moments(np.ravel(x_0[:, t + 1 :]), math.sqrt(alpha_bar) * 0.7, var)


def test_an_edit_draws_its_steps_apart_from_the_noise_that_it_begins_with():
    x = jnp.zeros((200, 100))
    began = editing.edit(KEYS, NO_MODEL, lambda k, d, c, state, t: state, SHORT, x, t=9)
    drawn = editing.edit(KEYS, NO_MODEL, noise_step, SHORT, x, t=9)
    assert_mean(np.ravel(began * jnp.roll(drawn, 50, axis=1)), 0.0)


@pytest.mark.parametrize("name", ["edit", "descend"])
@pytest.mark.parametrize("t", [-1, 10])
def test_editing_at_no_step_is_an_error(name, t):
    schedule, x = schedules.pad(SHORT, 16), jnp.zeros((2, 6))
    with pytest.raises(ValueError, match=rf"^t must be in \[0, 10\), got {t}\.$"):
        getattr(editing, name)(KEYS[:2], NO_MODEL, visit_step, schedule, x, t=t)


def test_descending_is_sampling_the_steps_from_t():
    @functools.partial(jax.jit, static_argnames="given")
    def run(x_t, t, given):
        args = (KEYS[:3], tanh_denoiser(SHORT), samplers.ddpm_step, SHORT, x_t)
        if given:
            return samplers.sample(*args, ts=jnp.arange(6, -1, -1, dtype=jnp.int32))
        return editing.descend(*args, t=t)

    x_t = normal(0, 3, 6)
    np.testing.assert_allclose(run(x_t, 6, False), run(x_t, 6, True), **F32_SUM)
    assert np.all(np.any(run(x_t, 5, False) != run(x_t, 6, True), axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("t", [3, 20, 39])
def test_completions_of_one_image_are_draws_of_its_posterior(t):
    x_t = np.linspace(-2, 2, 5)
    mean = MEAN + math.sqrt(ALPHA_BAR[t]) * STD**2 / X_VAR[t] * (
        x_t - math.sqrt(ALPHA_BAR[t]) * MEAN
    )
    x_0 = completions(jnp.asarray(x_t, jnp.float32), t)
    var = STD**2 * NOISE_VAR[t] / X_VAR[t]
    assert_moments(x_0, mean, np.full(5, var), bias=LAST_VAR)
    assert len(np.unique(x_0)) > 0.99 * x_0.size  # float32 draws do coincide


@jax.jit
def completions(x_t, t):
    keys = samplers.image_keys(jax.random.key(2), jnp.arange(5000))
    denoise_fn = oracles.gaussian_denoiser(FORTY, MEAN, STD)
    x_t = jnp.broadcast_to(x_t[None], (5000, 5))
    return editing.descend(keys, denoise_fn, samplers.ddpm_step, FORTY, x_t, t=t)


BETAS = schedules.linear_betas(400)


@functools.cache
def steps_of(num_steps):
    keep = schedules.spaced_steps(400, num_steps)
    schedule = schedules.pad(schedules.make_schedule(BETAS, keep=keep), 400)
    return schedule, oracles.gaussian_rows(schedule, MEAN, STD)


@jax.jit
def reconstructed(schedule, rows, x):
    return editing.reconstruct(KEYS[:20], oracles.affine_denoiser(rows), schedule, x)


def noise_of(x_0):
    """x_T where the flow of the data leads: it keeps quantiles. From level 0 on."""
    alpha_bar = np.cumprod(1 - BETAS)[[0, -1]]
    std = np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    first, last = np.sqrt(alpha_bar) * MEAN
    return last + std[1] / std[0] * (np.asarray(x_0, np.float64) - first)


def test_an_image_is_found_again_the_better_the_more_steps():
    x, sizes = DATA[:20], (50, 100, 200, 400)
    x_T, x_0 = zip(*(reconstructed(*steps_of(n), x) for n in sizes), strict=True)
    for found, true in ((x_T, noise_of(x)), (x_0, x)):
        errors = np.array([np.abs(a - true).mean() for a in found])
        orders = np.log2(errors[:-1] / errors[1:])
        assert np.all(np.abs(orders - 1) < 0.2), f"measured {orders}"
        assert errors[-1] < 0.01


@functools.partial(jax.jit, static_argnames="step")
def between(schedule, rows, x_T, y_T, weights, *, step):
    args = (KEYS[:20], oracles.affine_denoiser(rows), STEPS[step], schedule)
    ends = [samplers.sample(*args, z_T) for z_T in (x_T, y_T)]
    return editing.between_noises(*args, x_T, y_T, weights), ends


@every_step
def test_images_between_two_noises_end_in_those_of_the_noises(step):
    weights = jnp.array([0.0, 0.5, 0.5, 1.0])
    noises = (normal(0, 20, 100), normal(1, 20, 100))
    x_0, ends = between(*steps_of(50), *noises, weights, step=step)
    np.testing.assert_allclose(x_0[0], ends[0], **F32_SUM)
    np.testing.assert_allclose(x_0[-1], ends[1], **F32_SUM)
    np.testing.assert_array_equal(x_0[1], x_0[2])  # the noise of the steps is shared
    assert np.all(np.any(x_0[1] != x_0[0], axis=1))


@pytest.mark.slow
def test_images_between_two_noises_lie_on_the_circle_that_the_flow_maps():
    x, y = (np.asarray(normal(seed, 20, 100), np.float64) for seed in (0, 1))
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    y = y - np.sum(x * y, axis=1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=1, keepdims=True)  # at a right angle with x
    angle, weights = 1.2, np.array([0.0, 0.3, 0.5, 1.0])
    noises = (10 * x, 10 * (math.cos(angle) * x + math.sin(angle) * y))
    noises = (jnp.asarray(a, jnp.float32) for a in noises)
    x_0, _ = between(*steps_of(400), *noises, jnp.asarray(weights), step="2m")
    alpha_bar = np.prod(1 - BETAS)
    std = math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    for image, weight in zip(x_0, weights, strict=True):
        z = 10 * (math.cos(weight * angle) * x + math.sin(weight * angle) * y)
        expected = MEAN + STD * (z - math.sqrt(alpha_bar) * MEAN) / std
        np.testing.assert_allclose(image, expected, atol=TWO_M)


TWO_M = 5e-3  # 400 steps of DPM-Solver++(2M): the first and the last are of first order


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_idempotent_symmetric_and_linear(name):
    project, x, y = PROJECTIONS[name], normal(0, *SHAPE), normal(1, *SHAPE)
    known = project(x)
    np.testing.assert_allclose(project(known), known, **F32)
    np.testing.assert_allclose(project(2 * x + y), 2 * known + project(y), **F32_SUM)
    for other in (x, y):  # what is known is at right angles with all that is not
        rest = other - project(other)
        products = np.sum(np.asarray(known * rest, np.float64), axis=(1, 2, 3))
        np.testing.assert_allclose(products, np.zeros(3), atol=F32_SUM["atol"])
    assert np.max(np.abs(known - x)) > 0.1 and np.max(np.abs(known)) > 0.1


def test_gray_is_the_mean_of_the_channels_in_each():
    x = jnp.array([[[[1.0, 2.0, 6.0], [0.0, 0.0, -3.0]]]])
    np.testing.assert_allclose(
        editing.gray(x), [[[[3.0, 3.0, 3.0], [-1.0, -1.0, -1.0]]]], **F32
    )


def test_blocks_are_averaged_down_and_repeated_up():
    x = np.arange(2 * 4 * 6 * 2, dtype=np.float64).reshape(2, 4, 6, 2) ** 1.5
    small = np.empty((2, 2, 3, 2))
    large = np.empty(x.shape)
    for i, j in np.ndindex(2, 3):
        block = np.s_[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        small[:, i, j] = x[block].mean(axis=(1, 2))
        large[block] = small[:, i, j][:, None, None]
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(editing.shrink(x, size=2), small, **F32)
    np.testing.assert_allclose(editing.block_mean(x, size=2), large, **F32)


def test_blocks_of_one_pixel_are_the_image():
    np.testing.assert_array_equal(editing.shrink(KNOWN, size=1), KNOWN)
    np.testing.assert_array_equal(editing.block_mean(KNOWN, size=1), KNOWN)


@pytest.mark.parametrize("size", [0, -2, 3, 4, 8])
@pytest.mark.parametrize("name", ["shrink", "block_mean"])
def test_blocks_must_divide_both_sides(name, size):  # 4 x 6: each but one
    said = rf"^size must (divide 4 x 6|be an integer >= 1), got {size}\.$"
    with pytest.raises(ValueError, match=said):
        getattr(editing, name)(KNOWN, size=size)


@pytest.mark.slow
def test_one_trace_serves_every_schedule_level_and_eta():
    traces = []

    @jax.jit
    def everything(key, schedule, x, t, eta, mask):
        traces.append(t)
        keys = samplers.image_keys(key, jnp.arange(3))
        step_fn = functools.partial(samplers.ddim_step, eta=eta)
        args = (keys, tanh_denoiser(schedule), step_fn, schedule, x)
        options = dict(jump=3, resamples=2)
        return (
            editing.repaint(*args, x, mask, **options),
            editing.repaint(*args, x, editing.gray, **options),
            editing.edit(*args, t=t),
            editing.descend(*args, t=t),
            editing.reconstruct(keys, args[1], schedule, x),
            editing.between_noises(*args, x[::-1], jnp.array([0.2, 0.9])),
        )

    results = []
    for num_steps, t, eta in ((10, 9, 0.0), (10, 9, 1.0), (5, 2, 1.0)):
        keep = schedules.spaced_steps(10, num_steps)
        schedule = schedules.make_schedule(schedules.cosine_betas(10), keep=keep)
        args = (schedules.pad(schedule, 16), KNOWN, t, eta, MASKS["h w 1"])
        results.append(jax.tree.leaves(everything(jax.random.key(0), *args)))
    assert len(traces) == 1
    assert all(np.all(np.isfinite(x)) for result in results for x in result)
    for i, (still, noisy, fewer) in enumerate(zip(*results, strict=True)):
        assert np.any(noisy != fewer)
        assert np.any(still != noisy) == (i not in (4, 5))  # reconstruct has no eta
