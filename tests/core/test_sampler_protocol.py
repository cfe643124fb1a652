"""What every row of SAMPLERS must do; a new row is tested by being one.

Orders of convergence that are known stand in `support.sampler_rows`; a deterministic
sampler that is not listed must converge at first order at least.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import oracles
from support.oracles import F32, F32_SUM, assert_moments, normal
from support.sampler_rows import every_sampler, order_of, params

from jax_diffusion import diffusion, guidance, registry, samplers, schedules
from jax_diffusion.diffusion import Prediction
from jax_diffusion.samplers import SAMPLERS, Sampler
from jax_diffusion.spacing import SPACINGS

# Where a step at t = 7 calls the denoiser, of samplers that are known.
CALLS = {name: [7] for name in SAMPLERS} | {"heun": [7, 6]}

MEAN, STD = 0.3, 0.5
MODES, WEIGHTS, MODE_STD = (-0.6, 0.6), (0.3, 0.7), 0.3
SIZES = (20, 40, 80, 160)  # steps: float32 is felt beyond, the next order before
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))
SHORT = schedules.make_schedule(schedules.cosine_betas(10))

deterministic = pytest.mark.parametrize(
    "name", params(name for name, row in SAMPLERS.items() if not row.adds_noise)
)


def solver(name, eta=0.0):
    row = SAMPLERS[name]
    return functools.partial(row.step, **({"eta": eta} if row.takes_eta else {}))


# The rows themselves


@every_sampler
def test_a_row_says_what_its_step_takes_and_has_defaults_that_exist(name):
    row = SAMPLERS[name]
    parameters = [*inspect.signature(row.step).parameters]
    assert parameters[:5] == ["keys", "denoise_fn", "schedule", "state", "t"]
    assert ("eta" in parameters) == row.takes_eta
    for option in [*inspect.signature(row.step).parameters.values()][5:]:
        assert option.kind == option.KEYWORD_ONLY and option.default != option.empty
    assert row.spacing in SPACINGS and (row.steps is None or row.steps > 0)
    assert samplers.as_sampler(row) is row


USERS = '''
"""A sampler that is not ours."""

from jax_diffusion.samplers import SampleState


def halfway_step(keys, denoise_fn, schedule, state, t, *, eta=1.0):
    x_0 = denoise_fn(state.x, t).x_0
    return SampleState(state.x + eta * (x_0 - state.x) / 2, x_0, state.log_snr)


def jump_step(keys, denoise_fn, schedule, state, t):
    return state._replace(x=denoise_fn(state.x, t).x_0)
'''


def test_a_users_step_by_module_and_name_becomes_a_sampler(tmp_path, monkeypatch):
    (tmp_path / "users_samplers.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)

    def sampler(name):
        found = registry.lookup("sampler", f"users_samplers:{name}", SAMPLERS)
        return samplers.as_sampler(found)

    row = sampler("halfway_step")
    assert row == Sampler(row.step, takes_eta=True, adds_noise=True)  # not known: noisy
    assert not sampler("jump_step").takes_eta
    x_T = normal(0, 2, 6)
    args = (KEYS[:2], constant_denoiser, row.step, SHORT, x_T)
    np.testing.assert_allclose(
        samplers.sample(*args), 0.4 + (x_T - 0.4) * 2.0**-10, **F32
    )


def test_an_eta_that_is_bound_already_is_left_alone():
    assert samplers.as_sampler(samplers.ddim_step).takes_eta
    bound = functools.partial(samplers.ddim_step, eta=0.5)
    assert not samplers.as_sampler(bound).takes_eta


# Convergence


@functools.cache
def log_uniform(num_steps, *, no_signal=False):
    """A schedule evenly spaced in log-SNR; perhaps one more step without signal."""
    ratios = oracles.log_uniform_ratios(num_steps)
    ratios = np.append(ratios, np.inf) if no_signal else ratios
    return schedules.make_schedule(oracles.betas_of_ratios(ratios))


@functools.partial(jax.jit, static_argnames=("name", "eta"))
def run(schedule, rows, x_T, *, name, eta=0.0):
    """Samples of a Gaussian, in the shape of x_T."""
    denoise_fn = oracles.affine_denoiser(rows)
    keys = KEYS[: len(x_T)]
    return samplers.sample(keys, denoise_fn, solver(name, eta), schedule, x_T)


def gaussian_ends(num_steps, num_images, num_columns, **options):
    """A padded schedule, its exact denoiser, x_T, and where the flow takes x_T."""
    schedule, z = log_uniform(num_steps, **options), normal(0, num_images, num_columns)
    signal = np.sqrt(oracles.alpha_bars(schedule))[-1]
    x_T = signal * MEAN + np.sqrt(oracles.marginal_vars(schedule, STD)[-1]) * z
    padded = schedules.pad(schedule, SIZES[-1] + 1)
    rows = oracles.gaussian_rows(padded, MEAN, STD)
    return padded, rows, jnp.float32(x_T), MEAN + STD * z


def gaussian_error(name, num_steps, **options):
    """How far the sampler is from the flow, which keeps quantiles."""
    *args, exact = gaussian_ends(num_steps, 50, 4, **options)
    return np.abs(run(*args, name=name) - exact).mean()


@functools.partial(jax.jit, static_argnames="name")
def run_mixture(schedule, levels, x_T, *, name):
    denoise_fn = oracles.mixture_of_levels(levels, MODES, WEIGHTS, MODE_STD)
    return samplers.sample(KEYS[:50], denoise_fn, solver(name), schedule, x_T)


def mixture_error(name, num_steps):
    x_T, truth = mixture_ends()
    schedule = schedules.pad(log_uniform(num_steps), SIZES[-1])
    levels = oracles.mixture_levels(schedule, MODE_STD)
    return np.abs(run_mixture(schedule, levels, x_T, name=name) - truth).mean()


@functools.cache
def mixture_ends():
    x_T = normal(0, 50, 4)  # every schedule ends in the same level
    mixture = (MODES, WEIGHTS, MODE_STD)
    return x_T, oracles.mixture_flow(log_uniform(SIZES[0]), *mixture, x_T)


def assert_order(name, data, error_fn):
    """The slope of log error over log step is the order of the sampler."""
    order, sizes = order_of(name, data, SIZES)
    errors = [error_fn(name, n) for n in sizes]
    measured = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    message = f"measured {measured:.2f}, errors {errors}"
    assert measured > (order or 1) - 0.2, message
    assert order is None or measured < order + 0.2, message
    return errors[-1], (4 / sizes[-1]) ** min(order or 1, 2)


@pytest.mark.slow
@deterministic
def test_the_error_on_a_gaussian_falls_with_the_order_of_the_sampler(name):
    error, allowed = assert_order(name, "gaussian", gaussian_error)
    assert error < allowed


@deterministic
def test_the_error_on_a_mixture_falls_with_the_order_of_the_sampler(name):
    """The denoiser is a sum of sigmoids, neither a line nor a constant."""
    assert_order(name, "mixture", mixture_error)


@pytest.mark.slow
@deterministic
def test_sampling_may_start_without_any_signal(name):
    """One step more, from an infinite ratio: the others still decide the order."""
    error_fn = functools.partial(gaussian_error, no_signal=True)
    assert_order(name, "gaussian", error_fn)


@every_sampler
def test_many_steps_give_the_moments_of_the_data(name):
    *args, _ = gaussian_ends(SIZES[-1], 200, 100)
    x_0 = run(*args, name=name, eta=1.0)
    # of first order: DDIM with eta 1 has 0.017 too little variance in 160 steps, as
    # follows from the linear recursion of it
    assert_moments(np.ravel(x_0), MEAN, STD**2, bias=0.02)


# Single steps


def constant_denoiser(x_t, t):
    return Prediction(jnp.full_like(x_t, 0.4), jnp.zeros((1, 1)))


def underway(name, schedule, t):
    """A state on its way at t, with a prediction made at t + 1."""
    log_snr = jnp.full((4, 1), schedule.now.log_snr[t + 1])
    state = samplers.start(normal(0, 4, 6), solver(name))
    return state._replace(x_0=normal(1, 4, 6), log_snr=log_snr)


@every_sampler
def test_the_last_step_returns_the_prediction_without_noise(name):
    t = jnp.zeros(4, jnp.int32)
    for eta in (0.0, 1.0):
        step_fn = solver(name, eta)
        x_0 = step_fn(KEYS[:4], constant_denoiser, SHORT, underway(name, SHORT, 0), t).x
        np.testing.assert_allclose(x_0, np.full((4, 6), 0.4), **F32)


@every_sampler
def test_a_chain_of_one_step_samples_its_prediction(name):
    schedule = schedules.make_schedule(schedules.cosine_betas(10), keep=[9])
    x_T = normal(0, 4, 6)

    def denoise_fn(x_t, t):
        return Prediction(jnp.tanh(2 * x_t), jnp.zeros((1, 1)))

    step_fn = solver(name, 1.0)
    x_0 = samplers.sample(KEYS[:4], denoise_fn, step_fn, schedule, x_T)
    np.testing.assert_allclose(x_0, jnp.tanh(2 * x_T), **F32)


@every_sampler
def test_a_step_asks_at_its_own_t_and_remembers_its_first_answer(name):  # B13
    asked = []

    def denoise_fn(x_t, t):
        asked.append(t)
        return Prediction(jnp.full_like(x_t, len(asked) / 4), jnp.zeros((1, 1)))

    t = jnp.full(4, 7, jnp.int32)
    state = solver(name)(KEYS[:4], denoise_fn, SHORT, underway(name, SHORT, 7), t)
    np.testing.assert_array_equal(asked[0], t)
    if name in CALLS:
        np.testing.assert_array_equal([t[0] for t in asked], CALLS[name])
    np.testing.assert_array_equal(state.x_0, np.full((4, 6), np.float32(0.25)))
    np.testing.assert_array_equal(state.log_snr, np.full((4, 1), SHORT.now.log_snr[7]))


# Schedules that end without signal


@every_sampler
def test_samples_and_gradients_are_finite_from_no_signal(name):
    betas = schedules.zero_terminal_snr(schedules.cosine_betas(10))
    schedule = schedules.make_schedule(betas)
    objectives = [
        diffusion.Objective("x_0", "fixed_small"),
        diffusion.Objective("v", "learned_range"),
    ]

    def total(objective, x_T, gain):
        def model_fn(x, timesteps):
            outputs = [x] * (1 + objective.learns_variance)
            return jnp.tanh(gain * jnp.concatenate(outputs, axis=-1))

        denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
        step_fn = solver(name, 1.0)
        x_0 = samplers.sample(KEYS[:4], denoise_fn, step_fn, schedule, x_T)
        return jnp.sum(x_0)

    @jax.jit
    def values_and_grads(*args):
        grad = jax.value_and_grad
        return [grad(functools.partial(total, o), (0, 1))(*args) for o in objectives]

    for value, grads in values_and_grads(normal(0, 4, 6), 2.0):
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(grad)) for grad in grads)
        assert grads[1] != 0


# One trace


def labeled_denoiser(schedule):
    """Some network that sees the whole image and its label, with its own variance."""

    def denoise(x_t, t, *, label):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        whole = jnp.mean(x_t, axis=1, keepdims=True)
        x_0 = jnp.tanh(x_t + whole + 0.3 * label[:, None])
        return Prediction(np.cos(np.arange(6.0, dtype=np.float32))[None] * x_0, log_var)

    return denoise


def guided_sample(keys, schedule, x_T, label, scale, eta, *, name):
    denoise_fn = guidance.classifier_free(
        labeled_denoiser(schedule), label, 0, scale, rescale=0.5
    )
    return samplers.sample(keys, denoise_fn, solver(name, eta), schedule, x_T)


X_T, LABEL = normal(0, 4, 6), jnp.array([1, 2, 3, 1])


@functools.cache
def thirty_settings():
    """schedule, scale and eta: six numbers of steps in five spacings."""
    betas = schedules.linear_betas(100)
    rules = [SPACINGS[r] for r in ("sections", "uniform", "trailing", "karras")]
    rules.append(SPACINGS["log_snr"])

    def setting(i):
        n = (1, 5, 9, 20, 50, 100)[i // 5]
        table = schedules.tabulate(betas, keep=rules[i % 5](betas, n))
        schedule = jax.tree.map(np.float32, table)
        return schedule, jnp.float32(i / 5), jnp.float32(i / 29)

    return [setting(i) for i in range(30)]


@functools.cache
def padded_settings():
    return [(schedules.pad(s, 100), *rest) for s, *rest in thirty_settings()]


@functools.cache
def samples_at_settings(name):
    """Samples at each of the settings, how often they were traced, and the function."""
    traces = []

    @jax.jit
    def sample(schedule, scale, eta):
        traces.append(None)
        return guided_sample(KEYS[:4], schedule, X_T, LABEL, scale, eta, name=name)

    results = [sample(*setting) for setting in padded_settings()]
    return results, len(traces), sample


@every_sampler
def test_one_trace_serves_every_spacing_eta_and_scale(name):  # B18
    results, num_traces, sample = samples_at_settings(name)
    assert num_traces == 1
    assert len({np.float32(x).tobytes() for x in results}) >= 26
    plain = sample(*thirty_settings()[17])  # 20 steps
    np.testing.assert_allclose(results[17], plain, **F32_SUM)


@pytest.mark.slow
@every_sampler
def test_vmap_over_schedules_etas_and_scales_equals_a_loop(name):
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *padded_settings()[7:22:7])
    together = jax.jit(
        jax.vmap(
            lambda *args: guided_sample(
                KEYS[:4], args[0], X_T, LABEL, *args[1:], name=name
            )
        )
    )(*stacked)
    one_by_one = samples_at_settings(name)[0][7:22:7]
    np.testing.assert_allclose(together, jnp.stack(one_by_one), **F32_SUM)
    assert np.abs(together[0] - together[1]).max() > 1e-2


# Batches, keys, padding

SAME = dict(rtol=0, atol=1e-5)  # of images of size 1: sums in another order


@functools.partial(jax.jit, static_argnames="name")
def batch_of(keys, x_T, label, *, name, schedule=SHORT):
    """Guided samples, whose x_0 is thresholded image by image."""
    denoise_fn = guidance.classifier_free(
        labeled_denoiser(schedule), label, 0, 3.0, rescale=0.5
    )
    denoise_fn = diffusion.threshold_x_0(denoise_fn, 0.8)
    return samplers.sample(keys, denoise_fn, solver(name, 0.5), schedule, x_T)


BATCH = (KEYS[:8], normal(0, 8, 6), jnp.arange(8) % 3 + 1)


@every_sampler
def test_an_image_is_the_same_alone_and_in_any_batch(name):  # B15
    args, whole = BATCH, batch_of(*BATCH, name=name)
    assert len(np.unique(np.round(whole, 3), axis=0)) == 8

    turned = batch_of(*(a[::-1] for a in args), name=name)
    np.testing.assert_allclose(turned[::-1], whole, **SAME)
    alone = batch_of(*(a[3:4] for a in args), name=name)
    np.testing.assert_allclose(alone, whole[3:4], **SAME)
    others = batch_of(KEYS[8:16], *args[1:], name=name)
    row = SAMPLERS[name]
    differs = np.any(others != whole, axis=1)  # by the keys alone
    assert np.all(differs == (row.adds_noise or row.takes_eta))

    padded = batch_of(*args, name=name, schedule=schedules.pad(SHORT, 16))
    np.testing.assert_allclose(padded, whole, **F32)


@pytest.mark.slow
@every_sampler
def test_an_image_is_the_same_on_any_device(name):  # B15
    whole = batch_of(*BATCH, name=name)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data")))
    apart = batch_of(*split, name=name)
    assert {s.data.shape for s in apart.addressable_shards} == {(1, 6)}
    np.testing.assert_allclose(apart, whole, **SAME)


# Gradients and memory


def weighted_sum(args, name):
    """Of samples on a padded schedule, in the precision of the arguments."""
    table = schedules.tabulate(schedules.cosine_betas(10))
    schedule = schedules.pad(jax.tree.map(jnp.asarray, table), 16)
    x_0 = guided_sample(KEYS[:4], schedule, args[0], LABEL, *args[1:], name=name)
    return jnp.sum(x_0 * np.cos(np.arange(24.0)).reshape(4, 6))


@every_sampler
def test_gradients_of_guided_sampling_equal_finite_differences(name):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        value = jax.jit(functools.partial(weighted_sum, name=name))
        at = (jnp.asarray(rng.normal(size=(4, 6))), jnp.array(2.0), jnp.array(0.75))
        gradients = jax.jit(jax.grad(value))
        grads = gradients(at)
        for i, direction in enumerate((rng.normal(size=(4, 6)), 1.0, 1.0)):
            ahead, behind = (
                value((*at[:i], at[i] + h * direction, *at[i + 1 :]))
                for h in (2**-12, -(2**-12))  # exact in float32, which scale is cast to
            )
            along = jnp.sum(grads[i] * direction)
            # the third derivative times 1e-8, and the rounding of 1e-9 over h
            np.testing.assert_allclose(
                along, (ahead - behind) * 2**11, rtol=2e-5, atol=1e-5
            )
        assert np.all(grads[0] != 0) and grads[1] != 0
        assert (grads[2] != 0) == SAMPLERS[name].takes_eta
        for eta in (0.0, 1.0):
            ends = gradients((*at[:2], jnp.array(eta)))
            assert all(np.all(np.isfinite(grad)) for grad in ends)


def temporary_bytes(name, num_steps):
    schedule = schedules.make_schedule(schedules.cosine_betas(num_steps))

    def total(x_T):
        args = (KEYS[:4], oracles.wide_denoiser, solver(name, 1.0), schedule)
        return jnp.sum(samplers.sample(*args, x_T))

    compiled = jax.jit(jax.grad(total)).lower(jnp.zeros((4, 4096))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@every_sampler
def test_memory_of_gradients_grows_by_the_images_only_not_by_the_network(name):
    growth = temporary_bytes(name, 200) - temporary_bytes(name, 20)
    batch = 4 * 4096 * 4
    assert growth < 180 * 4 * batch  # the network alone would hold 32
