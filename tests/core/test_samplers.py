"""DDPM and DDIM with exact denoisers; the loop, its wrappers, inversion, interpolation.

What every sampler must do is in test_sampler_protocol.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracles
from support.oracles import F32, F32_SUM, assert_mean, assert_moments, normal

from jax_diffusion import diffusion, samplers, schedules
from jax_diffusion.diffusion import Prediction

MEAN, STD = 0.3, 0.5
BETAS = schedules.linear_betas(1000)
LENGTH = 1000  # all schedules are padded to it: one compilation for all
SHORT = schedules.make_schedule(schedules.cosine_betas(10))
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))

ddim_with_noise = functools.partial(samplers.ddim_step, eta=1.0)
both_samplers = pytest.mark.parametrize(
    "step_fn", [samplers.ddpm_step, ddim_with_noise], ids=["ddpm", "ddim"]
)


@functools.cache
def steps_of(num_steps):
    """The schedule of so many steps from 0 to 999, padded; and its exact denoiser."""
    keep = schedules.spaced_steps(1000, num_steps)
    schedule = schedules.pad(schedules.make_schedule(BETAS, keep=keep), LENGTH)
    return schedule, oracles.gaussian_rows(schedule, MEAN, STD)


@functools.partial(jax.jit, static_argnames="step")
def run(schedule, rows, x_T, *, step="ddim", eta=0.0):
    """[200, 100] samples from x_T."""
    denoise_fn = oracles.affine_denoiser(rows)
    if step == "invert":
        return samplers.invert(denoise_fn, schedule, x_T)
    ddim = functools.partial(samplers.ddim_step, eta=eta)
    step_fn = {"ddpm": samplers.ddpm_step, "ddim": ddim}[step]
    return samplers.sample(KEYS, denoise_fn, step_fn, schedule, x_T)


def x_T_of_data():
    """x_T of data N(MEAN, STD^2), as [200, 100]."""
    alpha_bar = np.prod(1 - BETAS)
    std = math.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    return math.sqrt(alpha_bar) * MEAN + std * normal(0, 200, 100)


def tanh_denoiser(schedule, gain=2.0):
    """Some denoiser that is not linear, with the posterior variance."""

    def denoise(x_t, t):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        return Prediction(jnp.tanh(gain * x_t), log_var)

    return denoise


def test_ddim_converges_at_first_order():
    x_T = x_T_of_data()
    exact = MEAN + STD * normal(0, 200, 100)  # the flow keeps quantiles
    sizes = (50, 100, 200, 400)
    errors = [np.abs(run(*steps_of(n), x_T) - exact).mean() for n in sizes]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(orders - 1) < 0.2), f"measured {orders}"


def test_inversion_leads_back_to_the_image_at_first_order():
    x_0 = MEAN + STD * normal(1, 200, 100)

    def error(num_steps):
        schedule, rows = steps_of(num_steps)
        return np.abs(
            run(schedule, rows, run(schedule, rows, x_0, step="invert")) - x_0
        )

    errors = [error(n).mean() for n in (25, 50, 100, 200)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.02 and np.all(np.abs(orders - 1) < 0.2), f"measured {orders}"


@functools.partial(jax.jit, static_argnames="down")
def to_level(schedule, rows, x, t, *, down=False):
    denoise_fn = oracles.affine_denoiser(rows)
    if down:
        ts = jnp.arange(LENGTH, dtype=jnp.int32)[::-1]
        ts = jnp.where(ts <= t, ts, -1)
        return samplers.sample(KEYS, denoise_fn, samplers.ddim_step, schedule, x, ts=ts)
    return samplers.invert(denoise_fn, schedule, x, t=t)


@pytest.mark.parametrize("t", [0, 1, 5, 9])
def test_inversion_to_a_level_has_its_noise_and_leads_back_from_there(t):
    """Exact for any steps if the denoiser knows the image: its noise stays as it is."""
    schedule, _ = steps_of(10)
    rows = oracles.gaussian_rows(schedule, MEAN, 0.0)
    signal = np.sqrt(oracles.alpha_bars(schedule))
    noise = np.sqrt(oracles.noise_vars(schedule))
    low, high = (signal[i] * MEAN + noise[i] * normal(1, 200, 100) for i in (0, t))
    found = to_level(schedule, rows, low, t)
    # What float32 has rounded of the least noise grows with it.
    np.testing.assert_allclose(found, high, rtol=1e-5, atol=1e-6 * noise[t] / noise[0])
    back = to_level(schedule, rows, found, t, down=True)
    np.testing.assert_allclose(back, np.full((200, 100), MEAN), **F32_SUM)


def test_inversion_to_a_level_keeps_quantiles_at_first_order():
    z = normal(1, 200, 100)

    def error(num_steps):
        schedule, rows = steps_of(num_steps)
        signal = np.sqrt(oracles.alpha_bars(schedule))
        std = np.sqrt(oracles.marginal_vars(schedule, STD))
        t = num_steps // 2
        low, high = (signal[i] * MEAN + std[i] * z for i in (0, t))
        return np.abs(to_level(schedule, rows, low, t) - high).mean()

    errors = [error(n) for n in (25, 50, 100, 200)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.02 and np.all(np.abs(orders - 1) < 0.2), f"measured {orders}"


def test_inversion_to_the_last_level_is_that_to_where_sampling_starts():
    schedule, rows = steps_of(10)
    x_0 = normal(1, 200, 100)
    np.testing.assert_array_equal(to_level(schedule, rows, x_0, 0), x_0)
    np.testing.assert_allclose(
        to_level(schedule, rows, x_0, 9), run(schedule, rows, x_0, step="invert"), **F32
    )


LONG = pytest.param(1000, marks=pytest.mark.slow)


@pytest.mark.parametrize("num_steps", [2, 10, 100, LONG])
def test_ddpm_with_the_exact_variance_gives_the_moments_of_the_data(num_steps):
    x_0 = run(*steps_of(num_steps), x_T_of_data(), step="ddpm")
    # the last step adds no noise, and so lacks Var[x_0 | x_{t=0}] = 1e-4
    assert_moments(np.ravel(x_0), MEAN, STD**2, bias=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_gives_the_moments_of_the_data_on_a_fine_grid(eta):
    x_0 = run(*steps_of(1000), x_T_of_data(), eta=eta)
    # of first order: 0.0015 too little at eta 0 and 0.0039 at eta 1, as follows from
    # the linear recursion of the variance
    assert_moments(np.ravel(x_0), MEAN, STD**2, bias=0.004)


@pytest.mark.slow
@both_samplers
def test_modes_of_a_mixture_come_in_their_proportions(step_fn):
    schedule = schedules.make_schedule(BETAS, keep=schedules.spaced_steps(1000, 100))
    denoise_fn = oracles.mixture_denoiser(schedule, (-0.6, 0.6), (0.3, 0.7), 0.1)
    sample = jax.jit(functools.partial(samplers.sample, KEYS, denoise_fn, step_fn))
    x_0 = np.ravel(sample(schedule, normal(0, 200, 100)))
    assert_mean(x_0 > 0, 0.7, bias=0.002)
    assert np.mean(np.abs(np.abs(x_0) - 0.6) < 0.4) > 0.99


@functools.cache
def known_image_frames(eta):
    """The states of 5 steps when the denoiser knows that all data are MEAN."""
    schedule = schedules.make_schedule(BETAS, keep=schedules.spaced_steps(1000, 5))
    rows = oracles.gaussian_rows(schedule, MEAN, 0.0)
    level = jax.tree.map(lambda a: a[-1], schedule.now)
    x_T = level.signal * MEAN + level.noise * normal(0, 200, 100)
    return schedule, _frames(schedule, rows, x_T, eta).x


@jax.jit
def _frames(schedule, rows, x_T, eta):
    step_fn = functools.partial(samplers.ddim_step, eta=eta)
    denoise_fn = oracles.affine_denoiser(rows)
    return samplers.sample_frames(
        KEYS, denoise_fn, step_fn, schedule, x_T, num_frames=5
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_ddim_keeps_the_marginals_of_a_known_image_at_every_eta(eta):  # B1, B9, B16
    """Song et al. 2021, lemma 1: exact for any steps, unlike for unknown images."""
    schedule, frames = known_image_frames(eta)
    alpha_bar, var = oracles.alpha_bars(schedule), oracles.noise_vars(schedule)
    for i, t in enumerate((3, 2, 1, 0)):
        x_t = np.ravel(frames[i])
        assert_moments(x_t, math.sqrt(alpha_bar[t]) * MEAN, var[t])
    np.testing.assert_allclose(frames[-1], MEAN, **F32_SUM)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_noise_that_ddim_adds_has_the_variance_of_equation_16(eta):  # B1, B9, B16
    schedule, _ = steps_of(10)
    x_t = jnp.full((200, 100), 0.7)
    x_prev = one_step(schedule, x_t, 6, eta)
    alpha_bar = oracles.alpha_bars(schedule)
    now, prev = alpha_bar[6], alpha_bar[5]
    expected = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
    squares = (np.ravel(x_prev) - x_prev.mean()) ** 2
    assert_mean(squares, expected)
    if eta == 1.0:
        assert_mean(squares, math.exp(schedule.posterior_log_var[6]))


@jax.jit
def one_step(schedule, x_t, t, eta):
    t = jnp.full(x_t.shape[:1], t, jnp.int32)
    denoise_fn = tanh_denoiser(schedule)
    state = samplers.start(x_t)
    return samplers.ddim_step(KEYS, denoise_fn, schedule, state, t, eta=eta).x


@functools.partial(jax.jit, static_argnums=0)
def few_images(step_fn, keys, schedule, x_T):
    """Samples of a few images, whose x_0 is thresholded image by image."""

    def denoise_fn(x_t, t):
        prediction = tanh_denoiser(schedule)(x_t, t)
        return prediction._replace(x_0=2 * prediction.x_0)

    denoise_fn = diffusion.threshold_x_0(denoise_fn, 0.8)
    return samplers.sample(keys, denoise_fn, step_fn, schedule, x_T)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance():
    ddim, ddpm = (
        few_images(step_fn, KEYS[:4], SHORT, normal(0, 4, 6))
        for step_fn in (ddim_with_noise, samplers.ddpm_step)
    )
    np.testing.assert_allclose(ddim, ddpm, **F32_SUM)


def constant_denoiser(x_t, t):
    return Prediction(jnp.full_like(x_t, 0.4), jnp.zeros((1, 1)))


def one(step_fn, schedule, x_t, t):
    t = jnp.full(x_t.shape[:1], t, jnp.int32)
    keys = KEYS[: x_t.shape[0]]
    return step_fn(keys, constant_denoiser, schedule, samplers.start(x_t), t)


def test_deterministic_ddim_keeps_the_noise_that_the_prediction_implies():
    x_t, x_0 = normal(0, 4, 6), jnp.full((4, 6), 0.4)
    x_prev = one(samplers.ddim_step, SHORT, x_t, 7).x
    before, after = (
        diffusion.eps_from_x_0(SHORT, x, jnp.full(4, t, jnp.int32), x_0)
        for x, t in ((x_t, 7), (x_prev, 6))
    )
    np.testing.assert_allclose(after, before, **F32_SUM)


def test_an_inversion_step_undoes_a_ddim_step_of_the_same_prediction():
    x_t = normal(0, 4, 6)
    up = one(samplers.ddim_inversion_step, SHORT, x_t, 6).x
    np.testing.assert_allclose(one(samplers.ddim_step, SHORT, up, 7).x, x_t, **F32_SUM)


def test_an_inversion_step_remembers_its_prediction_and_level_and_asks_at_its_own_t():
    asked = []

    def denoise_fn(x_t, t):
        asked.append(t)
        return constant_denoiser(x_t, t)

    t = jnp.full(4, 7, jnp.int32)
    state = samplers.start(normal(0, 4, 6))
    state = samplers.ddim_inversion_step(KEYS[:4], denoise_fn, SHORT, state, t)
    np.testing.assert_array_equal(asked, [t])  # B13: once, and neither t - 1 nor t + 1
    np.testing.assert_array_equal(state.x_0, np.full((4, 6), np.float32(0.4)))
    np.testing.assert_array_equal(state.log_snr, np.full((4, 1), SHORT.now.log_snr[7]))


def test_an_images_key_is_its_own_whatever_its_batch():
    key = jax.random.key(3)
    data = jax.random.key_data(samplers.image_keys(key, jnp.array([5, 2, 9])))
    swapped = jax.random.key_data(samplers.image_keys(key, jnp.array([9, 5, 5])))
    np.testing.assert_array_equal(swapped[:2], data[np.array([2, 0])])
    np.testing.assert_array_equal(swapped[1], swapped[2])
    assert len(np.unique(data, axis=0)) == 3


def noise_step(keys, denoise_fn, schedule, state, t):
    """Puts the noise of the step in the place of x."""
    keys = samplers.fold_in(keys, t)
    return state._replace(x=samplers.normal(keys, state.x.shape[1:]))


def test_noise_is_new_at_every_step_and_in_every_image():  # B3
    frames = samplers.sample_frames(
        KEYS[:50],
        constant_denoiser,
        noise_step,
        SHORT,
        jnp.zeros((50, 20)),
        num_frames=10,
    ).x
    assert len(np.unique(frames)) > 0.99 * frames.size  # float32 draws do coincide
    assert_moments(np.ravel(frames), 0.0, 1.0)
    assert_mean(np.ravel(frames[1:] * frames[:-1]), 0.0)
    assert_mean(np.ravel(frames[:, 1:] * frames[:, :-1]), 0.0)


def visit_step(keys, denoise_fn, schedule, state, t):
    """Writes into column t of x the number of steps taken so far, this one included."""
    count = state.x_0 + 1
    columns = jnp.arange(state.x.shape[1])[None] == t[:, None]
    return state._replace(x=jnp.where(columns, count, state.x), x_0=count)


def visited(schedule, *, ts=None, num_columns=10):
    x = jnp.zeros((2, num_columns))
    return samplers.sample(KEYS[:2], constant_denoiser, visit_step, schedule, x, ts=ts)[
        0
    ]


def test_sampling_visits_every_step_once_from_the_last_to_0():  # B13
    np.testing.assert_array_equal(visited(SHORT), np.arange(10, 0, -1))


def test_rows_added_by_pad_are_not_visited():
    order = visited(schedules.pad(SHORT, 16), num_columns=16)
    np.testing.assert_array_equal(order, [*range(10, 0, -1), *6 * [0]])


def test_ts_are_visited_in_their_order_and_negative_ones_skipped():
    for rows in ([-1, 3, 2, -7, 1], [-1, 4, -7, 5, 6]):
        order = np.zeros(10)
        order[[row for row in rows if row >= 0]] = 1, 2, 3
        ts = jnp.array(rows, jnp.int32)
        np.testing.assert_array_equal(visited(SHORT, ts=ts), order)


@pytest.mark.parametrize(
    ("ts", "got"),
    [
        ([9, 6, 3, 0], "6 after 9"),
        ([9, 8, -1, 6], "6 after 8"),
        ([3, 4, 5, 7], "7 after 5"),
        ([3, 4, 3 - 1], "2 after 4"),
        ([5, 3, 4], "3 after 5"),
    ],
)
def test_ts_that_leave_out_a_row_or_turn_round_are_refused(ts, got):
    """A step goes to the level of t - 1: the next one would be told another level."""
    said = rf"^ts must be consecutive rows, got {got}; for fewer steps there is "
    with pytest.raises(ValueError, match=said):
        visited(SHORT, ts=jnp.array(ts))


def test_ts_of_one_row_or_of_none_are_accepted():
    for ts in ([4], [-1, -1], [-1, 0]):
        visited(SHORT, ts=jnp.array(ts))


@pytest.mark.parametrize(
    ("ts", "expected"),
    [(None, [*range(9, -1, -1)]), ([-1, 3, 2, -7, 1, -1], [3, 2, 1])],
    ids=["all", "some"],
)
def test_on_step_is_called_at_the_steps_that_are_made_in_their_order(ts, expected):
    seen = []
    ts = None if ts is None else jnp.array(ts, jnp.int32)
    step_fn = samplers.on_step(visit_step, lambda t: seen.append(int(t)))
    x_T = jnp.zeros((2, 10))
    watched = samplers.sample(KEYS[:2], constant_denoiser, step_fn, SHORT, x_T, ts=ts)
    jax.effects_barrier()
    assert seen == expected
    np.testing.assert_array_equal(watched[0], visited(SHORT, ts=ts))


def test_inversion_visits_every_step_but_the_last_upwards():  # B13
    def denoise_fn(x_t, t):
        jax.debug.callback(lambda t: asked.append(int(t[0])), t)
        return constant_denoiser(x_t, t)

    for schedule in (SHORT, schedules.pad(SHORT, 16)):
        asked = []
        jax.block_until_ready(samplers.invert(denoise_fn, schedule, normal(0, 2, 6)))
        jax.effects_barrier()
        assert sorted(asked) == list(range(9))


def test_interpolation_visits_the_steps_from_t_down_to_0_inclusive():
    x = jnp.zeros((2, 10))
    x_0 = samplers.interpolate(
        KEYS[:2], constant_denoiser, visit_step, SHORT, x, x, jnp.array([0.0, 0.5]), t=6
    )
    np.testing.assert_array_equal(x_0[..., :7], np.tile(np.arange(7, 0, -1), (2, 2, 1)))
    assert np.all(x_0[..., 7:] % 1 != 0)  # still noise


def test_frames_are_the_states_on_the_way_and_the_last_is_the_sample():
    frames = samplers.sample_frames(
        KEYS[:2], constant_denoiser, visit_step, SHORT, jnp.zeros((2, 10)), num_frames=5
    )
    assert jax.tree.map(jnp.shape, frames) == ((5, 2, 10), (5, 2, 10), (5, 2, 1))
    for i, frame in enumerate(frames.x):
        ts = jnp.arange(9, 7 - 2 * i, -1, dtype=jnp.int32)
        np.testing.assert_array_equal(frame[0], visited(SHORT, ts=ts))
    np.testing.assert_array_equal(frames.x[-1, 0], visited(SHORT))


@pytest.mark.parametrize("num_frames", [0, 3, 11])
def test_the_number_of_frames_must_divide_the_steps(num_frames):
    with pytest.raises(ValueError, match=rf"divide 10 steps, got {num_frames}\.$"):
        samplers.sample_frames(
            KEYS[:2],
            constant_denoiser,
            visit_step,
            SHORT,
            jnp.zeros((2, 10)),
            num_frames=num_frames,
        )


def test_a_frame_continued_is_the_same_image():
    """Noise is keyed by the row, so that a partial run ends as the whole."""

    @jax.jit
    def both(x_T):
        denoise_fn = tanh_denoiser(SHORT)
        args = (KEYS[:4], denoise_fn, samplers.ddpm_step, SHORT)
        frames = samplers.sample_frames(*args, x_T, num_frames=2).x
        ts = jnp.arange(4, -1, -1, dtype=jnp.int32)
        return frames[-1], samplers.sample(*args, frames[0], ts=ts)

    whole, continued = both(normal(0, 4, 6))
    np.testing.assert_allclose(continued, whole, **F32_SUM)


@functools.partial(jax.jit, static_argnames="until")
def shared(keys, x_T, ts, until=4):
    step_fn = samplers.share_noise(samplers.ddpm_step, jax.random.key(7), until=until)
    return samplers.sample(keys, tanh_denoiser(SHORT), step_fn, SHORT, x_T, ts=ts)


def test_images_with_shared_noise_part_at_the_branching_step():
    x_T = jnp.broadcast_to(normal(0, 1, 6), (4, 6))
    ts = jnp.full(10, -1, jnp.int32)
    before = shared(KEYS[:4], x_T, ts.at[:6].set(jnp.arange(9, 3, -1)))
    np.testing.assert_array_equal(before, np.tile(before[:1], (4, 1)))
    assert np.all(before[0] != x_T[0])
    after = shared(KEYS[:4], x_T, ts.at[:7].set(jnp.arange(9, 2, -1)))
    assert len(np.unique(after)) == after.size


def test_shared_noise_is_the_same_in_every_batch_and_new_at_every_step():  # B15
    ts, x_T = jnp.arange(9, 3, -1, dtype=jnp.int32), jnp.zeros((4, 6))
    whole = shared(KEYS[:4], x_T, ts)
    np.testing.assert_allclose(shared(KEYS[9:10], x_T[:1], ts), whole[:1], **F32_SUM)
    eps = [
        samplers.share_noise(noise_step, jax.random.key(7), until=0)(
            KEYS[:2],
            constant_denoiser,
            SHORT,
            samplers.start(x_T[:2]),
            jnp.full(2, t, jnp.int32),
        ).x
        for t in (3, 4)
    ]
    assert np.all(eps[0] != eps[1])


def noise_shared_by(key, ts, until=4):
    """What each of six images is given at its own t."""
    step_fn = samplers.share_noise(noise_step, key, until=until)
    state = samplers.start(jnp.zeros((6, 50)))
    t = jnp.asarray(ts, jnp.int32)
    return np.asarray(step_fn(KEYS[:6], constant_denoiser, SHORT, state, t).x)


def correlated(eps):
    """Which pairs of images have the same noise; all others have nothing in common."""
    found = np.corrcoef(eps)
    assert np.all((np.abs(found) < 5 / math.sqrt(50)) | (found > 1 - 1e-6))
    return found > 0.5


def test_images_of_one_key_share_noise_until_they_part():
    groups = np.array([0, 1, 0, 2, 1, 0])
    keys = samplers.image_keys(jax.random.key(7), jnp.asarray(groups))
    together = groups[:, None] == groups
    for t in (9, 4):
        np.testing.assert_array_equal(
            correlated(noise_shared_by(keys, 6 * [t])), together
        )
    own = np.eye(6, dtype=bool)
    for t in (3, 0):
        np.testing.assert_array_equal(correlated(noise_shared_by(keys, 6 * [t])), own)
    # as a step draws that shares nothing
    alone = samplers.normal(samplers.fold_in(KEYS[:6], jnp.full(6, 3)), (50,))
    np.testing.assert_array_equal(noise_shared_by(keys, 6 * [3]), alone)
    # Images 0 and 2 are still together, 5 of their group is not, nor are 1 and 4.
    own[[0, 2], [2, 0]] = True
    mixed = noise_shared_by(keys, [5, 4, 5, 9, 3, 3])
    np.testing.assert_array_equal(correlated(mixed), own)


def test_one_key_for_all_images_is_the_same_key_for_each():
    key = jax.random.key(7)
    for ts in (6 * [7], [9, 8, 4, 3, 2, 0]):
        np.testing.assert_array_equal(
            noise_shared_by(key, ts), noise_shared_by(jnp.broadcast_to(key, (6,)), ts)
        )
    assert correlated(noise_shared_by(key, 6 * [7])).all()


def test_slerp_goes_from_end_to_end_along_the_circle():
    x, y = jnp.array([[[2.0], [0.0]]]), jnp.array([[[0.0], [2.0]]])
    half, root = math.sqrt(0.5), math.sqrt(0.75)
    for weight, expected in (
        (0.0, [1, 0]),
        (1 / 3, [root, 0.5]),  # 30 degrees
        (0.5, [half, half]),
        (1.0, [0, 1]),
    ):
        between = samplers.slerp(x, y, jnp.array([weight])).ravel()
        np.testing.assert_allclose(between, 2 * np.array(expected), **F32)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_slerp_of_half_precision_is_that_of_float32(dtype):
    """Squares of whole images do not fit into float16."""
    x, y = (normal(i, 2, 64, 64, 12).astype(dtype) for i in (0, 1))
    weight = jnp.array([0.3, 0.5])
    wide = samplers.slerp(x.astype(jnp.float32), y.astype(jnp.float32), weight)
    found = samplers.slerp(x, y, weight)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, wide.astype(dtype))


def test_slerp_keeps_the_norm_of_each_image_at_its_own_weight():
    x, y = normal(0, 3, 50), normal(1, 3, 50)
    x, y = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    between = samplers.slerp(x, y, jnp.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(jnp.linalg.norm(between, axis=1), np.ones(3), **F32)
    cosine = jnp.sum(x * between, axis=1)
    angle = jnp.arccos(jnp.sum(x * y, axis=1))
    np.testing.assert_allclose(
        jnp.arccos(cosine), angle * np.array([0.1, 0.5, 0.9]), **F32_SUM
    )


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_slerp_of_parallel_images_is_the_straight_line(scale):
    x = normal(0, 1, 8)
    between = samplers.slerp(x, scale * x, jnp.array([0.25]))
    np.testing.assert_allclose(between, (0.75 + 0.25 * scale) * x, **F32_SUM)


@functools.partial(jax.jit, static_argnums=0)
def between(t, schedule, rows, x_a, x_b, weights):
    args = (KEYS[:2], oracles.affine_denoiser(rows), samplers.ddim_step, schedule)
    return samplers.interpolate(*args, x_a, x_b, weights, t=t)


@pytest.mark.slow
def test_interpolation_at_the_first_level_mixes_the_images():
    x_a, x_b = normal(0, 2, 50), normal(1, 2, 50)
    weights = jnp.array([0.0, 0.25, 1.0])
    mixed = between(0, *steps_of(1000), x_a, x_b, weights)
    for x, weight in zip(mixed, weights, strict=True):
        line = (1 - weight) * x_a + weight * x_b
        assert_moments(np.ravel(x - line), 0.0, 1e-4 * ((1 - weight) ** 2 + weight**2))


@pytest.mark.slow
def test_the_ends_of_an_interpolation_do_not_depend_on_the_other_end():
    x_a, x_b, x_c = (normal(seed, 2, 50) for seed in range(3))
    weights = jnp.array([0.0, 0.25, 1.0])
    one, two, three = (
        between(500, *steps_of(1000), *ends, weights)
        for ends in ((x_a, x_b), (x_a, x_c), (x_c, x_b))
    )
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[2], three[2])
    assert np.all(one[1] != two[1]) and np.all(one[2] != two[2])


@pytest.mark.slow
def test_interpolation_noises_the_two_images_independently():
    x = jnp.zeros((2, 5000))
    no_step = lambda keys, denoise_fn, schedule, state, t: state  # noqa: E731
    schedule = schedules.make_schedule(BETAS)
    a, b = samplers.interpolate(
        KEYS[:2],
        constant_denoiser,
        no_step,
        schedule,
        x,
        x,
        jnp.array([0.0, 1.0]),
        t=300,
    )
    var = oracles.noise_vars(schedule)[300]
    for x_t in (a, b):
        assert_moments(np.ravel(x_t), 0.0, var)
    assert_mean(np.ravel(a * b), 0.0)
    assert_mean(np.ravel(a[0] * a[1]), 0.0)


@pytest.mark.parametrize("t", [-1, 10])
def test_interpolation_at_no_step_is_an_error(t):
    x = jnp.zeros((2, 10))
    with pytest.raises(ValueError, match=rf"^t must be in \[0, 10\), got {t}\.$"):
        samplers.interpolate(
            KEYS[:2], constant_denoiser, visit_step, SHORT, x, x, jnp.array([0.5]), t=t
        )


def temporary_bytes(num_steps):
    schedule = schedules.make_schedule(schedules.cosine_betas(num_steps))

    def total(x_T):
        args = (KEYS[:4], oracles.wide_denoiser, ddim_with_noise, schedule)
        return jnp.sum(samplers.sample(*args, x_T))

    compiled = jax.jit(total).lower(jnp.zeros((4, 4096))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


BATCH_BYTES = 4 * 4096 * 4


def test_memory_does_not_grow_with_the_number_of_steps():  # B17
    growth = temporary_bytes(200) - temporary_bytes(20)
    assert growth < BATCH_BYTES  # less than one batch for 180 steps


@jax.jit
@jax.grad
def gradients(args):
    """Of samples on a padded schedule, whose skipped rows must not spoil gradients."""
    x_T, gain, eta = args
    schedule = schedules.pad(SHORT, 16)
    step_fn = functools.partial(samplers.ddim_step, eta=eta)
    denoise_fn = tanh_denoiser(schedule, gain)
    x_0 = samplers.sample(KEYS[:4], denoise_fn, step_fn, schedule, x_T)
    return jnp.sum(x_0 * normal(1, 4, 6))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradients_are_finite_at_the_ends_of_eta(eta):
    grads = gradients((normal(0, 4, 6), jnp.float32(0.5), jnp.float32(eta)))
    assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_interpolating_at_a_row_that_padding_added_is_refused():
    schedule = schedules.pad(schedules.make_schedule(schedules.cosine_betas(50)), 60)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(1))
    x = jnp.zeros((1, 2))
    denoise_fn = oracles.gaussian_denoiser(schedule, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"t must be in \[0, 50\), got 55"):
        samplers.interpolate(
            keys, denoise_fn, samplers.ddim_step, schedule, x, x, jnp.ones(1), t=55
        )


def test_slerp_of_equal_opposite_and_zero_images_has_finite_gradients():
    x = jnp.array([[3.0, 4.0]])

    @jax.jit
    def gradients(a, b):
        return jax.grad(
            lambda a, b: samplers.slerp(a, b, jnp.array([0.25])).sum(), argnums=(0, 1)
        )(a, b)

    for y in (x, -x, 0 * x):
        grads = gradients(x, y)
        assert all(np.isfinite(g).all() for g in grads)


def test_slerp_of_opposite_images_goes_straight_through_the_middle():
    x = jnp.array([[3.0, 4.0]])
    middle = samplers.slerp(x, -x, jnp.array([0.25]))
    np.testing.assert_allclose(middle, 0.5 * x, **F32)
