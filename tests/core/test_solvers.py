"""The solvers, against maps known in closed form: their order, steps and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from support import oracles
from support.oracles import F32, F32_SUM, assert_mean, assert_moments, normal

from jax_diffusion import diffusion, guidance, samplers, schedules
from jax_diffusion.diffusion import Prediction

MEAN, STD = 0.3, 0.5
MODES, WEIGHTS, MODE_STD = (-0.6, 0.6), (0.3, 0.7), 0.3
SIZES = (20, 40, 80, 160)  # steps: float32 is felt beyond, the next order before
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(200))
SHORT = schedules.make_schedule(schedules.cosine_betas(10))

STEPS = {
    "ddpm": samplers.ddpm_step,
    "ddim": samplers.ddim_step,
    "dpmpp_2m": samplers.dpmpp_2m_step,
    "heun": samplers.heun_step,
}
every_solver = pytest.mark.parametrize("name", STEPS)
second_order = pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
orders = pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)]
)


def solver(name, eta=0.0):
    return functools.partial(STEPS[name], **({"eta": eta} if name == "ddim" else {}))


@functools.cache
def log_uniform(num_steps, *, no_signal=False):
    """A schedule evenly spaced in log-SNR; perhaps one more step without signal."""
    ratios = oracles.log_uniform_ratios(num_steps)
    ratios = np.append(ratios, np.inf) if no_signal else ratios
    return schedules.make_schedule(oracles.betas_of_ratios(ratios))


@functools.partial(jax.jit, static_argnames="name")
def run(schedule, rows, x_T, *, name):
    """[50, 4] samples of a Gaussian."""
    denoise_fn = oracles.affine_denoiser(rows)
    return samplers.sample(KEYS[:50], denoise_fn, solver(name), schedule, x_T)


def gaussian_error(name, num_steps, **options):
    """How far the sampler is from the flow, which keeps quantiles."""
    schedule, z = log_uniform(num_steps, **options), normal(0, 50, 4)
    signal = np.sqrt(oracles.alpha_bars(schedule))[-1]
    x_T = signal * MEAN + np.sqrt(oracles.marginal_vars(schedule, STD)[-1]) * z
    padded = schedules.pad(schedule, SIZES[-1] + 1)
    rows = oracles.gaussian_rows(padded, MEAN, STD)
    x_0 = run(padded, rows, jnp.float32(x_T), name=name)
    return np.abs(x_0 - (MEAN + STD * z)).mean()


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


def fitted_order(errors):
    """The slope of log error over log step."""
    return -np.polyfit(np.log(SIZES), np.log(errors), 1)[0]


# --- convergence


@orders
def test_the_error_on_a_gaussian_falls_with_the_order_of_the_solver(name, order):
    errors = [gaussian_error(name, n) for n in SIZES]
    measured = fitted_order(errors)
    assert abs(measured - order) < 0.2, f"measured {measured:.2f}, errors {errors}"
    assert errors[-1] < 0.02**order


@orders
def test_the_error_on_a_mixture_falls_with_the_order_of_the_solver(name, order):
    """No line and no constant: the denoiser is a sum of sigmoids."""
    errors = [mixture_error(name, n) for n in SIZES]
    measured = fitted_order(errors)
    assert abs(measured - order) < 0.2, f"measured {measured:.2f}, errors {errors}"


@orders
def test_sampling_may_start_without_any_signal(name, order):
    """One step more, from an endless ratio: the others still decide the order."""
    errors = [gaussian_error(name, n, no_signal=True) for n in SIZES]
    measured = fitted_order(errors)
    assert abs(measured - order) < 0.2, f"measured {measured:.2f}, errors {errors}"


# --- single steps


def tanh_denoiser(schedule, gain=2.0):
    """Some denoiser that is not linear, with the posterior variance."""

    def denoise(x_t, t):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        return Prediction(jnp.tanh(gain * x_t), log_var)

    return denoise


def step_from(name, schedule, state, t):
    """One step with the denoiser tanh(2 x)."""
    t = jnp.full(state.x.shape[:1], t, jnp.int32)
    keys = KEYS[: state.x.shape[0]]
    return STEPS[name](keys, tanh_denoiser(schedule), schedule, state, t)


@functools.cache
def without_signal():
    """Ten steps, of which the last begins without any signal."""
    return schedules.make_schedule(
        schedules.zero_terminal_snr(schedules.cosine_betas(10))
    )


def underway(schedule, t):
    """A state on its way at t, with a prediction made at t + 1."""
    log_snr = jnp.full((4, 1), schedule.now.log_snr[t + 1])
    return samplers.SampleState(normal(0, 4, 6), normal(1, 4, 6), log_snr)


def test_the_first_step_of_dpmpp_2m_is_one_of_ddim():
    state = samplers.start(normal(0, 4, 6))
    two, one = (step_from(name, SHORT, state, 9).x for name in ("dpmpp_2m", "ddim"))
    np.testing.assert_allclose(two, one, **F32)


def test_the_last_step_of_dpmpp_2m_is_one_of_ddim():
    two, one = (
        step_from(name, SHORT, underway(SHORT, 0), 0).x for name in ("dpmpp_2m", "ddim")
    )
    np.testing.assert_allclose(two, one, **F32)


def test_dpmpp_2m_ignores_what_was_predicted_without_signal():
    schedule = without_signal()
    two, one = (
        step_from(name, schedule, underway(schedule, 8), 8).x
        for name in ("dpmpp_2m", "ddim")
    )
    np.testing.assert_allclose(two, one, **F32)


def log_ratios(schedule):
    """log(signal / noise) of every step, in float64."""
    alpha_bar, var = oracles.alpha_bars(schedule), oracles.noise_vars(schedule)
    return (np.log(alpha_bar) - np.log(var)) / 2


@pytest.mark.parametrize("t", [1, 5, 8])
def test_a_step_of_dpmpp_2m_is_that_of_the_paper(t):
    """Lu et al. 2022, algorithm 2, in its own terms: h, r, D and an exponential."""
    state = underway(SHORT, t)
    lam = log_ratios(SHORT)
    alpha, sigma = (
        np.sqrt(oracles.alpha_bars(SHORT)),
        np.sqrt(oracles.noise_vars(SHORT)),
    )
    h = lam[t - 1] - lam[t]
    r = (lam[t] - lam[t + 1]) / h
    x, last = (np.asarray(a, np.float64) for a in (state.x, state.x_0))
    D = (1 + 1 / (2 * r)) * np.tanh(2 * x) - last / (2 * r)
    expected = sigma[t - 1] / sigma[t] * x - alpha[t - 1] * np.expm1(-h) * D
    x_prev = step_from("dpmpp_2m", SHORT, state, t).x
    np.testing.assert_allclose(x_prev, expected, **F32_SUM)
    ddim = step_from("ddim", SHORT, state, t).x
    assert np.abs(ddim - expected).min(axis=-1).max() > 1e-4  # the last x_0 does matter


@pytest.mark.parametrize("t", [1, 5, 9])
def test_a_step_of_heun_is_that_of_the_paper(t):
    """Lu et al. 2022, algorithm 1 with r = 1: the data prediction of DPM-Solver++."""
    state = samplers.start(normal(0, 4, 6))
    alpha, sigma = (
        np.sqrt(oracles.alpha_bars(SHORT)),
        np.sqrt(oracles.noise_vars(SHORT)),
    )
    lam = log_ratios(SHORT)
    h, x = lam[t - 1] - lam[t], np.asarray(state.x, np.float64)
    decay, growth = sigma[t - 1] / sigma[t], -alpha[t - 1] * np.expm1(-h)
    u = decay * x + growth * np.tanh(2 * x)
    expected = decay * x + growth * (np.tanh(2 * x) + np.tanh(2 * u)) / 2
    x_prev = step_from("heun", SHORT, state, t).x
    np.testing.assert_allclose(x_prev, expected, **F32_SUM)
    assert np.abs(x_prev - step_from("ddim", SHORT, state, t).x).max() > 1e-3


def test_the_last_step_of_heun_is_one_of_ddim():
    state = samplers.start(normal(0, 4, 6))
    two, one = (step_from(name, SHORT, state, 0).x for name in ("heun", "ddim"))
    np.testing.assert_array_equal(two, one)


def test_a_chain_of_one_step_is_the_same_for_every_solver():
    schedule = schedules.make_schedule(schedules.cosine_betas(10), keep=[9])
    state = samplers.start(normal(0, 4, 6))
    for name in STEPS:
        x_0 = step_from(name, schedule, state, 0).x
        np.testing.assert_allclose(x_0, jnp.tanh(2 * state.x), **F32)


@pytest.mark.parametrize("name, where", [("dpmpp_2m", [7]), ("heun", [7, 6])])
def test_a_step_asks_where_it_should_and_remembers_its_first_answer(name, where):
    asked = []

    def denoise_fn(x_t, t):
        asked.append(t[0])
        return Prediction(jnp.full_like(x_t, len(asked) / 4), jnp.zeros((1, 1)))

    t = jnp.full(4, 7, jnp.int32)
    state = STEPS[name](KEYS[:4], denoise_fn, SHORT, underway(SHORT, 7), t)
    np.testing.assert_array_equal(asked, where)
    np.testing.assert_array_equal(state.x_0, np.full((4, 6), np.float32(0.25)))
    np.testing.assert_array_equal(state.log_snr, np.full((4, 1), SHORT.now.log_snr[7]))


# --- schedules that end without signal


@pytest.mark.parametrize(
    "name, mean_type",
    [("ddpm", "v"), ("ddim", "x_0"), ("dpmpp_2m", "v"), ("heun", "v")],
)
def test_samples_and_gradients_are_finite_from_no_signal(name, mean_type):
    schedule = without_signal()
    objective = diffusion.Objective(mean_type, "fixed_small")

    @jax.jit
    @jax.value_and_grad
    def total(x_T_and_gain):
        x_T, gain = x_T_and_gain
        denoise_fn = diffusion.denoiser(
            lambda x, timesteps: jnp.tanh(gain * x), schedule, objective
        )
        return jnp.sum(
            samplers.sample(KEYS[:4], denoise_fn, solver(name), schedule, x_T)
        )

    value, grads = total((normal(0, 4, 6), 2.0))
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(grad)) for grad in grads)
    assert grads[1] != 0


# --- a mixture

FAR, NARROW = (-0.6, 0.6), 0.1  # modes that are 12 deviations apart


def assert_mixture(x_0, *, bias=0.0):
    """Mean and variance of all, the weights, and mean and variance of each mode.

    `bias` is that of the variance in a mode, from the linear recursion of it.
    """
    x_0, mean = np.ravel(x_0), np.dot(WEIGHTS, FAR)
    var = np.dot(WEIGHTS, np.square(FAR)) - mean**2 + NARROW**2
    assert_moments(x_0, mean, var, bias=bias)
    assert_mean(x_0 > 0, WEIGHTS[1])
    assert_moments(x_0[x_0 > 0], FAR[1], NARROW**2, bias=bias)
    assert_moments(x_0[x_0 < 0], FAR[0], NARROW**2, bias=bias)


@second_order
def test_second_order_solvers_give_a_mixture_in_100_steps(name):
    schedule = log_uniform(100)
    denoise_fn = oracles.mixture_denoiser(schedule, FAR, WEIGHTS, NARROW)
    sample = functools.partial(samplers.sample, KEYS, denoise_fn, solver(name))
    assert_mixture(jax.jit(sample)(schedule, normal(0, 200, 100)))


@pytest.mark.parametrize(
    "var_type, bias", [("fixed_small", 0.00073), ("fixed_large", 0.00016)]
)
def test_ddpm_gives_a_mixture_in_1000_steps_with_either_variance(var_type, bias):
    schedule = schedules.make_schedule(schedules.linear_betas(1000))
    exact = oracles.mixture_denoiser(schedule, FAR, WEIGHTS, NARROW)
    objective = diffusion.Objective("x_0", var_type)

    def denoise_fn(x_t, t):
        return diffusion.predict(schedule, objective, exact(x_t, t).x_0, x_t, t)

    sample = functools.partial(samplers.sample, KEYS, denoise_fn, samplers.ddpm_step)
    assert_mixture(jax.jit(sample)(schedule, normal(0, 200, 100)), bias=bias)


@pytest.mark.parametrize("eta, bias", [(0.0, 0.00034), (1.0, 0.00073)])
def test_ddim_gives_a_mixture_in_1000_steps(eta, bias):
    schedule = schedules.make_schedule(schedules.linear_betas(1000))
    denoise_fn = oracles.mixture_denoiser(schedule, FAR, WEIGHTS, NARROW)
    step_fn = functools.partial(samplers.ddim_step, eta=eta)
    sample = functools.partial(samplers.sample, KEYS, denoise_fn, step_fn)
    assert_mixture(jax.jit(sample)(schedule, normal(0, 200, 100)), bias=bias)


# --- one trace


def labelled_denoiser(schedule):
    """Some network that sees the whole image and its label, with its own variance."""

    def denoise(x_t, t, *, label):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        whole = jnp.mean(x_t, axis=1, keepdims=True)
        x_0 = jnp.tanh(x_t + whole + 0.3 * label[:, None])
        return Prediction(np.cos(np.arange(6.0, dtype=np.float32))[None] * x_0, log_var)

    return denoise


def guided_sample(keys, schedule, x_T, label, scale, eta, *, name):
    denoise_fn = guidance.classifier_free(
        labelled_denoiser(schedule), label, 0, scale, rescale=0.5
    )
    return samplers.sample(keys, denoise_fn, solver(name, eta), schedule, x_T)


FEW_BETAS = schedules.linear_betas(100)
SPACINGS = {
    "sections": schedules.spaced_steps,
    "uniform": schedules.uniform_steps,
    "trailing": schedules.trailing_steps,
    "karras": lambda _, n: schedules.karras_steps(FEW_BETAS, n),
    "log_snr": lambda _, n: schedules.log_snr_steps(FEW_BETAS, n),
}


def thirty_settings():
    """schedule, scale and eta: six numbers of steps in five spacings."""
    for i in range(30):
        rule, n = list(SPACINGS.values())[i % 5], (1, 5, 9, 20, 50, 100)[i // 5]
        keep = rule(100, n)
        schedule = schedules.make_schedule(FEW_BETAS, keep=keep)
        yield schedule, jnp.float32(i / 5), jnp.float32(i / 29)


@every_solver
def test_one_trace_serves_every_spacing_eta_and_scale(name):  # B18
    traces = []

    @jax.jit
    def sample(*args):
        traces.append(None)
        return guided_sample(*args, name=name)

    x_T, label = normal(0, 4, 6), jnp.array([1, 2, 3, 1])
    results = {}
    for i, (schedule, scale, eta) in enumerate(thirty_settings()):
        padded = schedules.pad(schedule, 100)
        results[i] = sample(KEYS[:4], padded, x_T, label, scale, eta)
    assert len(traces) == 1
    assert len({np.float32(x).tobytes() for x in results.values()}) >= 26
    for i, (schedule, scale, eta) in enumerate(thirty_settings()):
        if i in (8, 17):
            plain = sample(KEYS[:4], schedule, x_T, label, scale, eta)
            np.testing.assert_allclose(results[i], plain, **F32_SUM)
    assert len(traces) == 3


# --- batches

SAME = dict(rtol=0, atol=1e-5)  # of images of size 1: sums in another order


@functools.partial(jax.jit, static_argnames="name")
def batch_of(keys, x_T, label, *, name):
    return guided_sample(keys, SHORT, x_T, label, 3.0, 0.5, name=name)


@every_solver
def test_an_image_is_the_same_alone_in_any_batch_and_on_any_device(name):  # B15
    args = (KEYS[:8], normal(0, 8, 6), jnp.arange(8) % 3 + 1)
    whole = batch_of(*args, name=name)
    assert len(np.unique(np.round(whole, 3), axis=0)) == 8

    turned = batch_of(*(a[6::-1] for a in args), name=name)
    np.testing.assert_allclose(turned[::-1], whole[:7], **SAME)
    alone = batch_of(*(a[3:4] for a in args), name=name)
    np.testing.assert_allclose(alone, whole[3:4], **SAME)

    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = jax.device_put(args, NamedSharding(mesh, PartitionSpec("data")))
    apart = batch_of(*split, name=name)
    assert {s.data.shape for s in apart.addressable_shards} == {(1, 6)}
    np.testing.assert_allclose(apart, whole, **SAME)


# --- transformations


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_vmap_over_schedules_etas_and_scales_equals_a_loop(name):
    settings = list(thirty_settings())[7:22:7]
    padded = [(schedules.pad(s, 100), scale, eta) for s, scale, eta in settings]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)

    def sample(schedule, scale, eta):
        x_T, label = normal(0, 4, 6), jnp.array([1, 2, 3, 1])
        return guided_sample(KEYS[:4], schedule, x_T, label, scale, eta, name=name)

    together, one = jax.jit(jax.vmap(sample))(*stacked), jax.jit(sample)
    for x_0, setting in zip(together, padded, strict=True):
        np.testing.assert_allclose(x_0, one(*setting), **F32_SUM)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def weighted_sum(args, name):
    """Of samples on a padded schedule, in the precision of the arguments."""
    table = schedules.tabulate(schedules.cosine_betas(10))
    schedule = schedules.pad(jax.tree.map(jnp.asarray, table), 16)
    x_T, scale, eta = args
    label = jnp.array([1, 2, 3, 1])
    x_0 = guided_sample(KEYS[:4], schedule, x_T, label, scale, eta, name=name)
    return jnp.sum(x_0 * np.cos(np.arange(24.0)).reshape(4, 6))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_gradients_of_guided_sampling_equal_finite_differences(name):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        value = jax.jit(functools.partial(weighted_sum, name=name))
        at = (jnp.asarray(rng.normal(size=(4, 6))), jnp.array(2.0), jnp.array(0.75))
        grads = jax.jit(jax.grad(value))(at)
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
        assert (grads[2] != 0) == (name == "ddim")


def temporary_bytes(name, num_steps):
    schedule = schedules.make_schedule(schedules.cosine_betas(num_steps))

    def total(x_T):
        args = (KEYS[:4], oracles.wide_denoiser, STEPS[name], schedule)
        return jnp.sum(samplers.sample(*args, x_T))

    compiled = jax.jit(jax.grad(total)).lower(jnp.zeros((4, 4096))).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@second_order
def test_memory_of_gradients_grows_by_the_images_only_not_by_the_network(name):
    growth = temporary_bytes(name, 200) - temporary_bytes(name, 20)
    batch = 4 * 4096 * 4
    assert growth < 180 * 4 * batch  # the network alone would hold 32
