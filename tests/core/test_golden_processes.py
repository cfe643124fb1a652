"""Parity with official codes of EDM, flows and VDM: the arrays of golden/processes/.

Levels of every code are given to `schedules.from_levels`, and its arrays compared with
what our one set of conversions, losses and samplers computes there. REST says of every
other array why not. See test_golden.py for the chains of betas.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import official
from golden.account import (
    PROCESSES,
    RELATIVE_OF_PROCESSES,
    load,
    names_in,
    parity,
    total,
)
from support import oracles

from jax_diffusion import (
    diffusion,
    guidance,
    likelihood,
    losses,
    samplers,
    schedules,
    timesteps,
)
from jax_diffusion.diffusion import Objective, Prediction
from jax_diffusion.samplers import SAMPLERS
from jax_diffusion.training import averages, post_hoc_ema

ROWS = 19  # of every padded table, so that one program serves all cases

LEVELS = {  # x = signal x_0 + noise eps, from their sigma
    "edm": lambda sigma: (np.ones_like(sigma), sigma),
    "vp": lambda sigma: (1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma)),
    "flow": lambda sigma: (1 - sigma, sigma),
}
TABULATE = {True: schedules.from_levels.__wrapped__, False: schedules.from_levels}
"""Whether an account is in float64 -> what makes a table."""


def exact(account, key):
    """An input that the official code computes itself, in the account's precision."""
    account[key]
    if account.double and f"{key}_f64" in account.arrays:
        key += "_f64"
    elif f"{key}_f64" in account.arrays:
        account[f"{key}_f64"]
    return np.float64(account[key])


def schedule_of(account, kind, sigma, told=None):
    """The table of these levels, and the row of each of them, int32 [b]."""
    order = np.argsort(sigma)
    told = sigma if told is None else told
    columns = (*LEVELS[kind](np.float64(sigma)[order]), np.float64(told)[order])
    make = TABULATE[account.double]
    rows = jnp.asarray(np.argsort(order), jnp.int32)
    return jax.tree.map(jnp.asarray, make(*columns)), rows


def denoised(name, m, s, level, x):
    """The closed forms of golden/processes/README.md, at a level."""
    a, b = level.signal, level.noise
    if name == "gauss":
        return m + a * s**2 / (a**2 * s**2 + b**2) * (x - a * m)
    return a * x / (a**2 + b**2) + 0.1 * jnp.tanh(x / (a + b))


def closed_form(name, m, s, schedule):
    def denoise_fn(x_t, t):
        level = schedules.take(schedule, t, x_t.ndim).now
        m_b, s_b = (jnp.broadcast_to(a, x_t.shape) for a in (m, s))
        return Prediction(denoised(name, m_b, s_b, level, x_t), 0 * level.signal)

    return denoise_fn


# Levels


@parity("processes/edm_sampling", precisions=["float64"])
def test_sigmas_of_edm_are_the_official_ones(account):
    for case in (*account.json["edm_sampler"], *account.json["grids"]):
        if case["fn"] == "edm_sampler" and case["net"] == "plain":
            key = case["key"].removesuffix("/t_steps") + "/t_steps"
            compare_karras(account, key, case["parameters"])


@parity("processes/edm2")
def test_sigmas_of_edm2_are_the_official_ones(account):
    for case in account.json["sampler"]:
        compare_karras(account, f"{case['key']}/t_steps", case["parameters"], 4e-6)


@parity("processes/kdiffusion")
def test_karras_sigmas_of_k_diffusion_are_ours(account):
    for case in account.json["sigmas"]:
        if case["fn"] == "get_sigmas_karras":
            parameters = dict(case["parameters"])
            parameters["num_steps"] = parameters.pop("n")
            compare_karras(account, case["key"], parameters, 4e-6)


def compare_karras(account, key, parameters, rounding=1e-12):
    """To 1e-12, or to the float32 that they are computed in."""
    names = "num_steps", "sigma_min", "sigma_max", "rho"
    given = {name: parameters[name] for name in names if name in parameters}
    if "rho" in given:
        given["rho"] = float(given["rho"])
    sigma = np.append(schedules.edm_levels(**given).noise[::-1], 0.0)
    account.compare(key, sigma, tolerance=rounding * np.maximum(sigma, 1e-3))


@parity("processes/flow_diffusers", precisions=["float64"])
def test_shifted_sigmas_of_diffusers_are_those_of_our_flow(account):
    for case in account.json["flow_euler"]:
        if case["key"].startswith("flow_euler/custom_sigmas"):
            levels = schedules.flow_levels(4, shift=case["config"]["shift"])
            told = levels.timesteps[::-1]
            sigma = np.append(levels.noise[::-1], 0.0)
            account.compare(f"{case['key']}/sigmas", sigma, tolerance=1e-6)
            account.compare(f"{case['key']}/timesteps", told, tolerance=1e-3)


@parity("processes/conversions")
def test_levels_in_every_representation_are_the_official_ones(account):
    sigma = np.float64(account["sigma"])
    for name, s in (("vp", sigma), ("flow", sigma / (1 + sigma))):
        table, rows = schedule_of(account, name, s)
        account.compare(f"{name}_signal", table.now.signal[rows])
        account.compare(f"{name}_noise", table.now.noise[rows])
        account.compare(f"{name}_half_log_snr", table.now.log_snr[rows] / 2)
        if name == "flow":
            account.compare("flow_s", table.now.noise[rows])


@parity("processes/conversions")
def test_noised_images_and_v_are_the_official_ones(account):
    x_0, eps = account.read("ddpm", "x_0", "eps")
    account["ddpm/t"]
    alpha_bar = exact(account, "ddpm/alphas_cumprod")
    table, rows = schedule_of(account, "vp", np.sqrt(1 / alpha_bar - 1))
    x_t = diffusion.q_sample(table, x_0, rows, eps)
    account.compare("ddpm/x_t", x_t)
    v = diffusion.target(table, Objective("v"), x_0, x_t, rows, eps)
    account.compare("ddpm/v", v)


# Real times


def normal_places(account, key):
    """u of draws from the normal distribution, as float32 or in double."""
    u = oracles.normal_cdf(account[key])
    return jnp.asarray(u, float if account.double else jnp.float32)


@parity("processes/edm")
def test_sigmas_that_edm_trains_on_are_our_quantiles(account):
    for case in account.json["loss"]:
        if case["class_name"] == "EDMLoss":
            given = case["parameters"]
            u = normal_places(account, case["random_input"])
            sigma = timesteps.log_normal(u, mean=given["P_mean"], std=given["P_std"])
            compare_rounded(account, f"{case['key']}/sigma", sigma)


@parity("processes/edm2")
def test_sigmas_that_edm2_trains_on_are_our_quantiles(account):
    for case in account.json["loss"]:
        given = case["parameters"]
        u = normal_places(account, case["random_input"])
        sigma = timesteps.log_normal(u, mean=given["P_mean"], std=given["P_std"])
        compare_rounded(account, f"{case['key']}/sigma", sigma)


@parity("processes/flow_diffusers")
def test_times_that_a_flow_trains_on_are_our_quantiles(account):
    for case in account.json["training"]:
        given = case["parameters"]
        if given["weighting_scheme"] == "logit_normal":
            mean, std = given["logit_mean"], given["logit_std"]
            u = normal_places(account, "training/normal")
            s = timesteps.logit_normal(u, mean=mean, std=std)
            compare_rounded(account, case["key"], s)


@parity("processes/kdiffusion_wrappers")
def test_log_normal_sigmas_of_k_diffusion_are_our_quantiles(account):
    for case in account.json["sigma_sampling"]:
        if case["fn"] == "rand_log_normal":
            given = case["parameters"]
            u = account.read("sigma_sampling", "u")[0]
            sigma = timesteps.log_normal(u, mean=given["loc"], std=given["scale"])
            compare_rounded(account, case["key"], sigma)


def compare_rounded(account, key, ours):
    """A quantile of u is no better than u itself, 2**-24 of 1."""
    golden = account.arrays[key].astype(np.float64)
    account.compare(key, ours, tolerance=2e-5 * golden)


# Outputs


@parity("processes/flow")
def test_paths_and_conversions_of_flow_matching_are_ours(account):
    x_0, eps, _ = account.read("", "x_data", "eps", "t")
    for case in account.json["path"]:
        key, condot = case["key"], case["key"] == "path/condot"
        signal, noise = (exact(account, f"{key}/{name}") for name in ("alpha", "sigma"))
        order = np.argsort(noise / signal)
        make = TABULATE[account.double]
        table = make(signal[order], noise[order], np.arange(len(order), dtype=float))
        table = jax.tree.map(jnp.asarray, table)
        rows = jnp.asarray(np.argsort(order), jnp.int32)
        account.compare(f"{key}/x_t", diffusion.q_sample(table, x_0, rows, eps))
        if condot:  # their velocity goes to the data, ours to the noise
            account.compare(f"{key}/u_t", x_0 - eps)
        if account.double:  # conversions are float32 only
            continue
        (x_t,) = account.read(key, "x_t")
        of = table, x_t, rows
        target = diffusion.x_0_from_eps(*of, eps)
        account.compare(f"{key}/epsilon_to_target", target)
        account.compare(f"{key}/target_to_epsilon", diffusion.eps_from_x_0(*of, x_0))
        if condot:
            (u,) = account.read(key, "u_t")
            found = diffusion.x_0_from_flow(*of, -u)
            account.compare(f"{key}/velocity_to_target", found)
            found = diffusion.eps_from_x_0(*of, found)
            account.compare(f"{key}/velocity_to_epsilon", found)
            velocity = -diffusion.flow_from_x_0(*of, x_0)
            account.compare(f"{key}/target_to_velocity", velocity)
            velocity = -diffusion.flow_from_x_0(*of, target)
            account.compare(f"{key}/epsilon_to_velocity", velocity)


@parity("processes/edm")
def test_preconditioned_networks_of_edm_are_ours(account):
    for case in account.json["precond"]:
        key, sigma = case["key"], account[case["sigma_key"]]
        raw, x = account.read(key, "F", "x")
        if case["kind"] == "edm":
            compare_preconditioned(account, key, sigma, x, raw, case)
        elif case["kind"] in ("vp", "ve", "iddpm"):
            # eps-networks, on the variance-preserving levels or on EDM's; their
            # VE-network predicts -eps.
            ve = case["kind"] == "ve"
            table, rows = schedule_of(account, "edm" if ve else "vp", sigma)
            level = schedules.take(table, rows, x.ndim).now
            c_in = np.ones_like(level.signal) if ve else level.signal
            account.compare(f"{key}/x_in", c_in * x)
            account.compare(f"{key}/c_in", np.ravel(c_in))
            x_0 = diffusion.x_0_from_eps(
                table, c_in * x, rows, -raw if ve else raw[..., : x.shape[-1]]
            )
            account.compare(f"{key}/D", x_0)


def compare_preconditioned(account, key, sigma, x, raw, case, *, names=None):
    """c_in and the like, read off as the official ones were; and the prediction."""
    names = names or dict(model_input="x_in", denoised="D")
    told = np.log(np.float64(sigma)) / 4
    table, rows = schedule_of(account, "edm", sigma, told)
    sigma_data, seen = case["parameters"].get("sigma_data", 0.5), []

    def output(x, raw):
        def model_fn(x, timesteps):
            seen.append((x, timesteps))
            return raw

        network = diffusion.precondition(model_fn, table, float(sigma_data))
        return network(x, table.timesteps[rows])

    account.compare(f"{key}/{names['denoised']}", output(x, raw))
    account.compare(f"{key}/{names['model_input']}", seen[-1][0])
    one, zero = jnp.ones_like(x), jnp.zeros_like(x)
    account.compare(f"{key}/c_skip", output(one, zero)[:, 0, 0, 0])
    account.compare(f"{key}/c_in", seen[-1][0][:, 0, 0, 0])
    account.compare(f"{key}/c_out", output(zero, one)[:, 0, 0, 0])
    if f"{key}/c_noise" in account.arrays:
        account.compare(f"{key}/c_noise", seen[-1][1])


# Losses


def compare_loss(account, key, args, elementwise, *, eps):
    """The loss of each image, and of each value, which `elementwise` computes."""
    loss = losses.training_loss(jax.random.key(0), *args, eps=eps).loss
    account.compare(f"{key}loss_sum", loss)
    account.compare(f"{key}loss", elementwise)


@parity("processes/edm")
def test_losses_of_edm_are_ours(account):
    x_0, eps, raw = account.read("loss", "x_0", "noise", "F")
    m, s = account.read("denoiser", "m", "s")
    for case in account.json["loss"]:
        key, given = case["key"], case["parameters"]
        edm = case["class_name"] == "EDMLoss"
        sigma = exact(account, f"{key}/sigma")
        account[case["random_input"]]
        told = np.log(sigma) / 4
        table, rows = schedule_of(account, "edm", sigma, told)
        weighting = "edm" if edm else "snr"
        sigma_data = given.get("sigma_data", 0.5)
        objective = Objective(
            "x_0", weighting=weighting, sigma_data=sigma_data, reduction="sum"
        )
        weight = losses.loss_weight(table, objective, rows)
        account.compare(f"{key}/weight", weight)
        x_t = diffusion.q_sample(table, x_0, rows, eps)
        account.compare(f"{key}/x_noisy", x_t)
        level = schedules.take(table, rows, x_0.ndim).now
        weight = weight.reshape(-1, 1, 1, 1)
        for name in ("gauss", "tanh"):
            m_b, s_b = (jnp.broadcast_to(a, x_0.shape) for a in (m, s))
            D = denoised(name, m_b, s_b, level, x_t)
            args = (lambda x, t, D=D: D), table, objective, x_0, rows
            each = weight * (D - x_0) ** 2
            compare_loss(account, f"{key}/{name}/", args, each, eps=eps)
        if edm:
            account.compare(f"{key}/precond/c_noise", table.timesteps[rows])
            fixed = table, objective, x_0, rows
            compare_raw_loss(account, f"{key}/precond/", raw, *fixed, eps=eps)


def compare_raw_loss(account, key, raw, table, objective, x_0, rows, *, eps):
    """The loss around the raw output, and its gradient by that."""

    def network(raw):
        return diffusion.precondition(
            lambda x, t: raw, table, float(objective.sigma_data)
        )

    def loss(raw):
        args = jax.random.key(0), network(raw), table, objective, x_0, rows
        return losses.training_loss(*args, eps=eps).loss

    x_t = diffusion.q_sample(table, x_0, rows, eps)
    D = network(raw)(x_t, table.timesteps[rows])
    weight = losses.loss_weight(table, objective, rows).reshape(-1, 1, 1, 1)
    account.compare(f"{key}loss_sum", loss(raw))
    account.compare(f"{key}loss", weight * (D - x_0) ** 2)
    account.compare(f"{key}grad_F", jax.grad(lambda raw: loss(raw).sum())(raw))


@parity("processes/kdiffusion_wrappers")
def test_wrappers_of_k_diffusion_are_ours(account):
    x_0, eps, raw = account.read("", "x_0", "noise", "F")
    sigma = account["sigma"]
    x_t = x_0 + jnp.asarray(sigma, x_0.dtype).reshape(-1, 1, 1, 1) * eps
    for case in account.json["wrappers"]:
        key = case["key"]
        if case["class_name"] != "VDenoiser":
            names = dict(model_input="model_input", denoised="denoised")
            compare_preconditioned(account, key, sigma, x_t, raw, case, names=names)
        if key in ("Denoiser_karras", "SimpleLossDenoiser"):
            table, rows = schedule_of(account, "edm", sigma)
            sigma_data = float(case["parameters"].get("sigma_data", 0.5))
            # The simple loss is that of eps.
            weighting = "edm" if key == "Denoiser_karras" else "snr"
            objective = Objective("x_0", weighting=weighting, sigma_data=sigma_data)
            network = diffusion.precondition(lambda x, t: raw, table, sigma_data)
            args = jax.random.key(0), network, table, objective, x_0, rows
            account.compare(f"{key}/loss", losses.training_loss(*args, eps=eps).loss)
    table, rows = schedule_of(account, "vp", sigma)
    level = schedules.take(table, rows, x_0.ndim).now
    keys = {"VDenoiser": "v", "discrete/eps": "eps", "discrete/v": "v"}
    for key, mean_type in keys.items():
        account.compare(f"{key}/model_input", level.signal * x_t)
        objective = Objective(mean_type)
        found = diffusion.predict(table, objective, raw, level.signal * x_t, rows)
        account.compare(f"{key}/denoised", found.x_0)
        args = jax.random.key(0), lambda x, t: raw, table, objective, x_0, rows
        account.compare(f"{key}/loss", losses.training_loss(*args, eps=eps).loss)


@parity("processes/kdiffusion_wrappers")
def test_sigmas_of_a_chain_are_those_of_k_diffusion(account):
    betas = np.linspace(1e-4, 0.02, 1000)
    level = schedules.tabulate(betas).now
    sigmas = account.arrays["discrete/sigmas"]
    account.compare(
        "discrete/sigmas", level.noise / level.signal, tolerance=2e-4 * sigmas
    )  # theirs from a float32 alpha_bar


# Samplers


@functools.partial(jax.jit, static_argnames=("name", "denoiser", "order"))
def frames_of(
    schedule, ts, num_rows, m, s, x_T, noise, numbers, *, name, denoiser, order=3
):
    """The state after every step: one program for all tables and grids."""
    step_fn = SAMPLERS[name].step
    if SAMPLERS[name].takes_eta:
        step_fn = functools.partial(step_fn, eta=numbers["eta"])
    denoise_fn = closed_form(denoiser.split("+")[0], m, s, schedule)
    if "+" in denoiser:  # a network and the one that guides it
        weak_fn = closed_form(denoiser.split("+")[1], m, s, schedule)
        denoise_fn = autoguided(denoise_fn, weak_fn, numbers["guidance"])
    state = samplers.start(x_T, step_fn)
    if name == "unipc":
        state = state._replace(earlier=state.earlier[: order - 1])
    with official.drawing(noise, num_rows):
        args = official.step_keys(len(x_T)), denoise_fn, step_fn, schedule
        return samplers.sample_frames(*args, num_frames=ROWS, ts=ts, state=state)


def autoguided(denoise_fn, weak_fn, scale):
    def denoise(x_t, t):
        x_0, weak = denoise_fn(x_t, t), weak_fn(x_t, t).x_0
        return x_0._replace(x_0=weak + scale * (x_0.x_0 - weak))

    return denoise


def run_official(account, case, table, x_T, name, *, down_to, noise=None, **options):
    """x after the step at each row, from the top row down."""
    ts = np.arange(table.num_steps - 1, down_to - 1, -1)
    m, s = account.read("denoiser", "m", "s")
    numbers = {k: options.pop(k, 0.0) for k in ("eta", "guidance")}
    if noise is None:
        noise = np.zeros((ROWS, *x_T.shape))
    frames = frames_of(
        schedules.pad(table, ROWS),
        jnp.asarray(np.pad(ts, (ROWS - len(ts), 0), constant_values=-1), jnp.int32),
        jnp.int32(table.num_steps),
        *(m, s, x_T, jnp.asarray(noise, x_T.dtype)),
        {k: jnp.asarray(v, x_T.dtype) for k, v in numbers.items()},
        **{"name": name, "denoiser": case.get("denoiser")} | options,
    )
    if (called := f"{case['key']}/model_sigma") in account.arrays:
        sigma = np.asarray(table.now.noise)[ts]
        account.compare(called, sigma, tolerance=1e-5 * sigma.max())
    return frames.x[-len(ts) :]


def compare_samples(
    account, case, kind, sigmas, name, x_T, *, last=None, why=None, **options
):
    """Every step of a loop over falling sigmas, the last of which may be 0.

    All but the `last` ones, and `why` so.
    """
    up = np.float64(sigmas)[::-1]
    to_data = up[0] == 0
    table, _ = schedule_of(account, kind, up[1:] if to_data else up)
    down_to = 0 if to_data else 1
    x = run_official(account, case, table, x_T, name, down_to=down_to, **options)
    where = np.arange(len(x)) < len(x) - (last or 0)
    account.compare(f"{case['key']}/samples", x, where=where, why=why)


def compare_pairs(account, case, sigmas, middle_fn, name, x_T, noise=None):
    """Every step of a solver of two stages: the second one at `middle_fn(from, to)`."""
    up = np.float64(sigmas)[::-1]
    to_data = up[0] == 0
    up = up[1:] if to_data else up
    middles = middle_fn(up[1:], up[:-1])
    table, _ = schedule_of(
        account, "edm", np.insert(up, np.arange(1, len(up)), middles)
    )
    down_to = 0 if to_data else 1
    if noise is not None:
        noise = of_one_path(up[1:], middles, up[:-1], np.float64(noise))
    x = run_official(account, case, table, x_T, name, down_to=down_to, noise=noise)
    ends = np.append(np.arange(1, len(x), 2), [len(x) - 1] if to_data else [])
    account.compare(f"{case['key']}/samples", x[ends.astype(int)])


def of_one_path(start, middle, end, noise):
    """Draws for two parts of a step, of those for its first part and for all of it."""

    def std(a, b):  # of what a step from a to b adds
        return b * np.sqrt(1 - (b / a) ** 2)

    drawn = np.zeros((ROWS, *noise.shape[1:]))
    for k, (a, b, c) in enumerate(
        zip(start[::-1], middle[::-1], end[::-1], strict=True)
    ):
        first, whole = std(a, b) * noise[2 * k], std(a, c) * noise[2 * k + 1]
        drawn[2 * k] = noise[2 * k]
        drawn[2 * k + 1] = (whole - (c / b) ** 2 * first) / std(b, c)
    return drawn


@parity("processes/kdiffusion", slow=["float64"])
def test_samplers_of_k_diffusion_are_ours_at_every_step(account):
    (unit,) = account.read("", "x_T_unit")
    (noise,) = account.read("", "noise")
    ours = {name: name for name in SAMPLERS} | {"euler": "ddim"}
    ours["euler_ancestral"] = "ddim"  # for every eta
    ours["dpmpp_2s_ancestral"] = "dpmpp_2s"
    for case in account.json["samplers"]:
        family, *_, options = case["key"].split("/")
        noisy = "ancestral" in family or "sde" in family
        eta = case["parameters"].get("eta", 1.0) if noisy else 0.0
        sde = "m_sde" in family and (eta != 1 or options.startswith("heun"))
        pairs = family in ("dpmpp_sde", "dpmpp_2s_ancestral")
        sde |= pairs and eta not in ((0, 1) if family == "dpmpp_sde" else (0,))
        churns = family == "euler" and options != "churn0"
        if family not in ours or family == "heun" or eta > 1 or churns or sde:
            continue
        sigmas = account[case["grid"]]
        x_T = unit * jnp.asarray(sigmas[0], unit.dtype)
        drawn = case["parameters"].get("s_noise", 1.0) * noise
        args = account, case, "edm", sigmas
        if pairs:
            r = case["parameters"].get("r", 1 / 2)
            name = "dpmpp_sde" if eta else "dpmpp_2s"
            compare_pairs(
                *(account, case, sigmas, lambda a, b, r=r: a ** (1 - r) * b**r),
                *(name, x_T, drawn if eta else None),
            )
            continue
        compare_samples(*args, ours[family], x_T, eta=float(eta), noise=drawn)
        if family == "euler_ancestral" and eta == 1:
            compare_samples(*args, family, x_T, noise=drawn)


@parity("processes/kdiffusion", slow=["float64"])
def test_heuns_method_of_k_diffusion_is_that_of_edm(account):
    (unit,) = account.read("", "x_T_unit")
    for case in account.json["samplers"]:
        if case["key"].startswith("heun/"):
            sigmas, given = account[case["grid"]], case["parameters"]
            names = dict(s_churn="churn", s_tmin="s_min", s_tmax="s_max")
            churn = {names[k]: v for k, v in given.items() if k in names}
            args = account, case, sigmas, unit, account["noise"]
            compare_churned(*args, s_noise=given.get("s_noise", 1.0), **churn)


def compare_churned(
    account,
    case,
    sigmas,
    unit,
    noise,
    *,
    s_noise=1.0,
    levels_fn=None,
    guidance=1.0,
    denoiser=None,
    **churn,
):
    """Every step of EDM's algorithm 2, before noise raises what it leads to."""
    up = np.float64(sigmas)[::-1]
    to_data = up[0] == 0
    up = up[1:] if to_data else up
    exact = schedules.churned.__wrapped__(up, levels_fn, **{"churn": 0.0} | churn)
    dtype = float if account.double else jnp.float32
    table = jax.tree.map(lambda a: jnp.asarray(a, dtype), exact)
    plain, raised = up[::-1], exact.now.noise[::-2]
    added = np.sqrt(np.maximum(raised**2 - plain**2, 0)) * s_noise
    added = added.reshape(-1, *[1] * unit.ndim) * np.float64(noise[: len(up)])
    drawn = np.zeros((ROWS, *unit.shape))
    drawn[1 : 2 * len(up) - 2 : 2] = s_noise * np.float64(noise[1 : len(up)])
    x_T = jnp.asarray(unit * plain[0] + added[0], unit.dtype)
    x = run_official(
        *(account, case, table, x_T, "edm_heun"),
        down_to=0 if to_data else 1,
        noise=drawn,
        guidance=guidance,
        denoiser=denoiser or case["denoiser"],
    )
    reached = np.float64(x[1::2]) - added[1:]
    reached = np.concatenate([reached, x[-1:]]) if to_data else reached
    account.compare(f"{case['key']}/samples", reached)


def rounding_of_iddpm(account):
    """Levels at the nearest sigmas that their network knows, falling in its table."""
    table, _ = load("processes/edm")
    known = np.float64(table["precond/iddpm/u"])

    def levels_fn(sigma):
        nearest = np.abs(known - np.reshape(sigma, (-1, 1))).argmin(axis=1)
        return schedules.sigma_levels(known[nearest])

    return levels_fn


@parity("processes/edm_sampling", slow=["float64"])
def test_the_stochastic_sampler_of_edm_is_ours(account):
    (unit,) = account.read("", "x_T")
    ablations = account.json["ablation_sampler"]
    for case in (*account.json["edm_sampler"], *ablations):
        given = case["parameters"]
        in_time = {given.get(k, d) for k, d in TIME_IS_SIGMA.items()} - {
            "linear",
            "none",
        }
        if in_time or given.get("solver") == "euler":
            continue
        sigmas = account[f"{case['key']}/t_steps"]
        names = dict(S_churn="churn", S_min="s_min", S_max="s_max")
        options = {names[k]: float(v) for k, v in given.items() if k in names}
        if case["net"] == "iddpm":
            options["levels_fn"] = rounding_of_iddpm(account)
        if "alpha" in given:
            first = jnp.asarray(sigmas[0], unit.dtype) * unit
            between = functools.partial(part_of_the_way, given["alpha"])
            compare_pairs(account, case, sigmas, between, "edm_heun", first)
            continue
        s_noise = given.get("S_noise", 1.0)
        args = account, case, sigmas, unit, account["noise"]
        compare_churned(*args, s_noise=s_noise, **options)


TIME_IS_SIGMA = dict(schedule="linear", scaling="none")


def part_of_the_way(alpha, start, end):
    return start + alpha * (end - start)


@parity("processes/edm2", slow=["float64"])
def test_the_stochastic_sampler_of_edm2_with_autoguidance_is_ours(account):
    (unit,) = account.read("", "x_T")
    for case in account.json["sampler"]:
        given, sigmas = case["parameters"], exact(account, f"{case['key']}/t_steps")
        names = dict(S_churn="churn", S_min="s_min", S_max="s_max")
        churn = {names[k]: float(v) for k, v in given.items() if k in names}
        low, high = churn.get("s_min", 0.0), churn.get("s_max", np.inf)
        draws = (sigmas[:-1] >= low) & (sigmas[:-1] <= high) & ("churn" in churn)
        order = np.where(draws, np.cumsum(draws) - 1, 0)  # it draws there only
        compare_churned(
            *(account, case, sigmas, unit, account["noise"][order]),
            s_noise=given.get("S_noise", 1.0),
            guidance=given.get("guidance", 1.0),
            denoiser=f"{case['net']}+{case['gnet']}",
            **churn,
        )


@parity("processes/kdiffusion")
def test_the_ancestral_step_of_k_diffusion_is_ddims(account):
    """Of sigma to sigma: how much of eps is kept, and how much is drawn."""
    high, low = account["ancestral/sigma_from"], account["ancestral/sigma_to"]
    ones = jnp.ones((2, 1, 1, 1), float if account.double else jnp.float32)
    for eta in account.json["ancestral"]["etas"]:
        if eta > 1:
            continue
        kept, drawn = [], []
        for a, b in zip(high, low, strict=True):
            sigmas = [a] if b == 0 else [b, a]
            table, _ = schedule_of(account, "edm", np.array(sigmas))
            x = a * jnp.array([1.0, 0.0], ones.dtype).reshape(2, 1, 1, 1)
            t = jnp.full(2, len(sigmas) - 1, jnp.int32)
            unit = jnp.array([0.0, 1.0], ones.dtype).reshape(1, 2, 1, 1, 1)
            with official.drawing(unit, len(sigmas)):
                state = samplers.ddim_step(
                    official.step_keys(2),
                    lambda x, t: Prediction(0 * x, 0 * x),
                    table,
                    samplers.start(x),
                    t,
                    eta=float(eta),
                )
            kept.append(state.x[0, 0, 0, 0])
            drawn.append(state.x[1, 0, 0, 0])
        account.compare(f"ancestral/eta{eta}/sigma_down", np.array(kept))
        account.compare(f"ancestral/eta{eta}/sigma_up", np.array(drawn))


@parity("processes/flow_diffusers", slow=["float64"])
def test_flow_match_euler_of_diffusers_is_ddim_without_noise(account):
    (x_T,) = account.read("", "x_T")
    for case in account.json["flow_euler"]:
        if case["denoiser"] is None or case["num_draws"]:
            continue
        exact(account, f"{case['key']}/timesteps")
        sigmas = exact(account, f"{case['key']}/sigmas")
        compare_samples(account, case, "flow", sigmas, "ddim", x_T)


@parity("processes/flow_diffusers")
def test_scale_noise_of_diffusers_is_the_forward_process(account):
    x_0, eps = account.read("scale_noise", "x_0", "eps")
    account["scale_noise/index"]
    exact(account, "scale_noise/timesteps")
    table, rows = schedule_of(account, "flow", exact(account, "scale_noise/sigmas"))
    account.compare("scale_noise/out", diffusion.q_sample(table, x_0, rows, eps))


@parity("processes/multistep_diffusers", slow=["float64"])
def test_solvers_of_diffusers_are_ours_on_their_levels(account):
    (x_T, noise) = account.read("", "x_T", "noise")
    groups = ("dpmsolver_ode", "dpmsolver_sde", "deis", "unipc")
    for case in (case for name in groups for case in account.json[name]):
        if (name := our_solver(case)) is None:
            continue
        exact(account, f"{case['key']}/timesteps")
        sigmas = exact(account, f"{case['key']}/sigmas")
        kind = "flow" if case["config"]["use_flow_sigmas"] else "vp"
        eta = 1.0 if case["num_draws"] else 0.0
        args = account, case, kind, sigmas, name, x_T
        options = {}
        if name == "unipc":
            options = dict(order=case["config"]["solver_order"])
            if not case["config"]["lower_order_final"]:
                options |= dict(last=2, why="order lowered at the end")
        compare_samples(*args, eta=eta, noise=noise, **options)


def our_solver(case):
    """The name of our sampler for a scheduler's case, or None."""
    config, order = case["config"], case["config"]["solver_order"]
    if case["scheduler"].startswith("UniPC"):
        if order == 1 or config["solver_type"] == "bh1" or not config["predict_x0"]:
            return None
        never = len(config["disable_corrector"]) >= case["num_inference_steps"]
        some = config["disable_corrector"] and not never
        return None if some else "dpmpp_2m" if never else "unipc"
    kinds = {"dpmsolver++": 0, "sde-dpmsolver++": 1, "deis": 0}
    if config["algorithm_type"] not in kinds or order > 2:
        return None
    if order == 1:
        return "ddim"
    sde = config["algorithm_type"] == "sde-dpmsolver++"
    if config["solver_type"] != "midpoint" or config["algorithm_type"] == "deis":
        return None
    return "dpmpp_2m_sde" if sde else "dpmpp_2m"


@parity("processes/edm_sampling", slow=["float64"])
def test_eulers_method_of_the_ablation_is_ddim_where_time_is_sigma(account):
    (x_T,) = account.read("", "x_T")
    for case in account.json["ablation_sampler"]:
        given = case["parameters"]
        time_is_sigma = given.get("schedule", "linear") == "linear"
        time_is_sigma = time_is_sigma and given.get("scaling", "none") == "none"
        if time_is_sigma and given.get("solver") == "euler":
            sigmas = account[f"{case['key']}/t_steps"]
            first = jnp.asarray(sigmas[0], x_T.dtype)
            compare_samples(account, case, "edm", sigmas, "ddim", first * x_T)


@parity("processes/flow", slow=["float64"])
def test_eulers_method_of_flow_matching_is_ddim_without_noise(account):
    (x_T,) = account.read("ode", "x_init")
    for case in account.json["ode"]:
        if case["method"] == "euler":
            sigmas = 1 - np.float64(account[case["grid"]])
            sigmas[-1] = max(sigmas[-1], 0.0)
            compare_samples(account, case, "flow", sigmas, "ddim", x_T)


# Likelihoods

NATS = 1e-7
"""How far our log-densities may be off in float64.

The error of Heun's method is of second order in its steps. Of results with 150 and 300
steps for each factor e of noise / signal, `in_the_limit` cancels that, and what is left
is of fourth order, 1 / 150^4 being 2e-9. The official ones of tolerance 1e-10 are
1.2e-8 off their closed form, as the json says.
"""
FAR = 1e9  # noise in which nothing is left of a mean of 1, to 1e-8 nats


def of_vectors(schedule, name, m, s, turn):
    """Denoises data N(m, turn s^2 turn^T), or is `tanh_full` with the matrix `turn`."""

    def denoise_fn(x_t, t):
        level = schedules.take(schedule, t, x_t.ndim).now
        a, b = level.signal, level.noise
        if name == "tanh_full":
            bent = 0.1 * jnp.tanh(x_t @ turn.T / (a + b))
            return Prediction(a * x_t / (a**2 + b**2) + bent, 0 * a)
        m_b, s_b = (jnp.broadcast_to(c, x_t.shape) for c in (m @ turn, s))
        x_0 = denoised("gauss", m_b, s_b, level, x_t @ turn) @ turn.T
        return Prediction(x_0, 0 * a)

    return denoise_fn


@functools.partial(jax.jit, static_argnames=("name", "probes"))
def log_prob(keys, schedule, x, *, probes, **network):
    args = keys, of_vectors(schedule, **network), schedule, x
    return likelihood.ode_log_prob(*args, probes=probes).total


def in_the_limit(account, kind, ends, x, network, probe=None):
    """log p(x) by the probability flow between two ratios of noise to signal.

    It is extrapolated to infinitely many steps (Richardson). Levels of "flow" go on to
    pure noise. The divergence is exact, or estimated by the probe.
    """
    keys = jax.random.key(0) if probe is None else keys_of_signs(probe)
    probes, totals = None if probe is None else 1, []
    num_steps = 150 * math.ceil(math.log(ends[1] / ends[0]))
    for count in (num_steps, 2 * num_steps):
        sigma = np.geomspace(*ends, count + 1)
        if kind == "flow":
            sigma = np.append(sigma / (1 + sigma), 1.0)
        schedule = schedules.pad(schedule_of(account, kind, sigma)[0], 10_000)
        found = log_prob(keys, schedule, x, **network, probes=probes)
        totals.append(np.float64(found))
    coarse, fine = totals
    return fine + (fine - coarse) / 3


def keys_of_signs(probe):
    """Keys from which `ode_log_prob` draws these vectors of signs, [b, d]."""
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(512))
    half, shape = jnp.float32(0.5), probe.shape[1:]
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, half, shape))
    signs = 2 * np.asarray(draw(samplers.fold_in(keys, 1))) - 1
    same = (signs == np.sign(probe)[:, None]).all(axis=-1)
    assert same.any(axis=1).all()
    return keys[same.argmax(axis=1)]


def correlated(account):
    """What `of_vectors` takes for data N(m, A A^T + 0.1 I)."""
    m, matrix = account.read("likelihood", "m", "A")
    var, turn = np.linalg.eigh(matrix @ matrix.T + 0.1 * np.eye(len(m)))
    s, turn = (jnp.asarray(a, m.dtype) for a in (np.sqrt(var), turn))
    return dict(name="gauss", m=m, s=s, turn=turn)


def compare_nats(account, key, ours, *, theirs=0.0):
    """To our own error, in float32 that of all arrays here, and `theirs`."""
    rounding = RELATIVE_OF_PROCESSES * np.abs(account.arrays[key]).max()
    own = NATS if account.double else rounding
    account.compare(key, ours, tolerance=own + theirs)


@parity("processes/kdiffusion_wrappers")
def test_log_likelihoods_of_k_diffusion_are_ours(account):
    """From noise sigma_min, that x has already, to the prior N(0, sigma_max^2).

    Their solver with its default tolerance is up to 0.0021 nats off, as the json says.
    """
    x, probe, matrix, m, s = account.read("likelihood", "x", "probe", "A", "m", "s")
    networks = {
        "gauss": dict(name="gauss", m=m, s=s, turn=jnp.eye(len(m), dtype=m.dtype)),
        "gauss_full": correlated(account),
        "tanh_full": dict(name="tanh_full", m=m, s=s, turn=matrix),
    }
    cases = account.json["likelihood"]
    theirs = max(case["max_error_of_tol1e_4"] for case in cases)
    for case in cases:
        key, low, high = case["key"], case["sigma_min"], case["sigma_max"]
        args = x, networks[case["denoiser"]]
        ours = in_the_limit(account, "edm", (low, high), *args, probe)
        compare_nats(account, f"{key}/ll_tol1e-4", ours, theirs=theirs)
        if not account.double:
            continue
        account.compare(f"{key}/ll_tol1e-10", ours, tolerance=NATS)
        if case["denoiser"] == "gauss":
            ours = in_the_limit(account, "edm", (low, high), *args)
            account.compare(f"{key}/ode_closed_form", ours, tolerance=NATS)
        if case["denoiser"] != "tanh_full":
            ours = in_the_limit(account, "edm", (low, FAR), *args)
            account.compare(f"{key}/density_closed_form", ours, tolerance=NATS)


@parity("processes/flow")
def test_log_likelihoods_of_flow_matching_are_ours(account):
    """To the error of their midpoint rule with steps h of 0.05.

    The json says it for the exact divergence. By the Euler-Maclaurin formula a part of
    it is h^2 / 24 tr(C^-1 - C): the time derivative of the velocity's Jacobian is C - 1
    at t = 0 and C^-1 - 1 at t = 1. A probe v has v^T (C^-1 - C) v in place of the
    trace, another number by at most v^T v times the largest distance of an eigenvalue
    from their mean.
    """
    x, probe = account.read("likelihood", "x_1", "probe")
    network, ends = correlated(account), (1e-5, FAR)
    cases = {case["key"]: case for case in account.json["likelihood"]}
    exact = cases["likelihood/midpoint_exact"]
    theirs = 1.01 * np.abs(exact["error_vs_density"])  # which has three digits
    ours = in_the_limit(account, "flow", ends, x, network)
    compare_nats(account, "likelihood/midpoint_exact/ll", ours, theirs=theirs)
    if account.double:
        account.compare("likelihood/density_closed_form", ours, tolerance=NATS)
    var = np.float64(network["s"]) ** 2
    change = 1 / var - var
    most = len(var) * np.max(np.abs(change - change.mean()))
    theirs = theirs + exact["step_size"] ** 2 / 24 * most
    ours = in_the_limit(account, "flow", ends, x, network, probe)
    compare_nats(account, "likelihood/midpoint_probe/ll", ours, theirs=theirs)


@parity("processes/flow")
def test_eulers_method_of_flow_matching_from_data_to_noise_is_ddim_inversion(account):
    """On its float32 times, after a step to 1 - 0.05, in which noise is predicted 0."""
    (x,) = account.read("likelihood", "x_1")
    network = correlated(account)
    t = np.float32(1) - np.arange(1, 21, dtype=np.float32) * np.float32(0.05)
    table, _ = schedule_of(account, "flow", 1 - np.float64(np.append(t[:-1], 0)))
    denoise_fn = of_vectors(table, **network)
    x_T = samplers.invert(denoise_fn, table, table.now.signal[0] * x)
    account.compare("likelihood/euler_exact/x_0", x_T)


# Guidance


@parity("processes/guidance")
def test_classifier_free_guidance_of_diffusers_is_ours(account):
    cond, uncond = account.read("", "cond", "uncond")
    num_steps, b = cond.shape[:2]
    label, t = jnp.ones(b, jnp.int32), jnp.zeros(b, jnp.int32)
    cases = [*account.json["cfg"]]
    for key in account.json["rescale"]:  # of uncond, to the spread of cond
        given = {"guidance_rescale": key["guidance_rescale"], "guidance_scale": 0.0}
        cases.append({"key": key["key"], "parameters": given})
    for case in cases:
        given, results = case["parameters"], []
        for k in range(num_steps):
            both = jnp.stack([cond[k], uncond[k]], axis=1)
            both = both.reshape(2 * b, *cond.shape[2:])
            original = given.get("use_original_formulation", False)
            scale = given["guidance_scale"] + original
            first, last = (
                int(given.get(name, default) * num_steps)
                for name, default in (("start", 0.0), ("stop", 1.0))
            )
            if not first <= k < last:
                scale = 1.0
            guided = guidance.classifier_free(
                lambda x, t, *, label, both=both: Prediction(both, jnp.zeros((1,) * 4)),
                *(label, 0, float(scale)),
                rescale=float(given["guidance_rescale"]),
            )
            results.append(guided(cond[k], t).x_0)
        account.compare(case["key"], jnp.stack(results))


def guided(method, strong, weak, scale, x_t=0.0, t=0, **options):
    """What a method of `guidance.pairs` makes of two predictions of x_0 [b, ...]."""
    fns = (
        lambda x, t, x_0=x_0: Prediction(x_0, jnp.zeros((1,) * 4))
        for x_0 in (strong, weak)
    )
    x_t, t = jnp.full_like(strong, x_t), jnp.full(len(strong), t, jnp.int32)
    return method(*fns, float(scale), **options)(x_t, t).x_0


@parity("processes/guidance")
def test_autoguidance_of_diffusers_and_edm2_is_ours(account):
    cond, uncond = account.read("", "cond", "uncond")
    for case in account.json["autoguidance"]:
        given, method = case["parameters"], guidance.autoguidance
        original = given.get("use_original_formulation", False)
        scale = given.get("guidance", given.get("guidance_scale")) + original
        rescale = float(given.get("guidance_rescale", 0.0))
        pairs = zip(cond, uncond, strict=True)
        found = [guided(method, *pair, scale, rescale=rescale) for pair in pairs]
        found, tolerance = jnp.stack(found), None
        if float(np.float32(scale)) != scale:  # what a scale is to us
            tolerance = np.asarray(1e-5 * jnp.abs(found).max())
        account.compare(case["key"], found, tolerance=tolerance)


@parity("processes/guidance")
def test_adaptive_projected_guidance_of_diffusers_is_ours(account):
    """The momentum is the test's: a sum over steps, in place of each difference.

    diffusers adds the projection to uncond, but for its "original" case, which is the
    paper's and ours.
    """
    cond, uncond = account.read("", "cond", "uncond")
    for case in account.json["apg"]:
        given, average, found = case["parameters"], 0.0, []
        if case["key"] == "apg/channel_norm":
            continue
        for strong, weak in zip(cond, uncond, strict=True):
            average = strong - weak + (given["momentum"] or 0.0) * average
            original = given.get("use_original_formulation", False)
            x_0 = guided(
                *(guidance.adaptive_projected, strong, strong - average),
                given["guidance_scale"] + 1,
                eta=float(given["eta"]),
                norm=given["norm_threshold"] or None,
            )
            found.append(x_0 if original else x_0 + (weak - strong))
        key = case["key"]
        pred = f"{key}/pred" if f"{key}/pred" in account.arrays else key
        account.compare(pred, jnp.stack(found))


@parity("processes/guidance")
def test_cfg_zero_star_of_diffusers_and_its_authors_is_ours(account):
    """Of x_t = 0 on a flow, x_0 is -noise times the flow."""
    cond, uncond = account.read("", "cond", "uncond")
    sigma = np.linspace(0.25, 1.0, len(cond))
    table, _ = schedule_of(account, "flow", sigma)
    for case in account.json["cfg_zero_star"]:
        given, found = case["parameters"], []
        if case["key"] == "cfg_zero_star/optimized_scale":
            given = {"guidance_scale": 0.0, "zero_init_steps": 0}  # of uncond alone
        for k, flows in enumerate(zip(cond, uncond, strict=True)):
            t = len(cond) - 1 - k
            noise = table.now.noise[t]
            x_0 = guided(
                *(guidance.zero_star, *(-noise * flow for flow in flows)),
                given["guidance_scale"] + given.get("use_original_formulation", False),
                t=t,
                schedule=table,
                zero_steps=given["zero_init_steps"],
                rescale=float(given.get("guidance_rescale", 0.0)),
            )
            found.append(-x_0 / noise)
        found = jnp.stack(found)
        if "optimized_scale" in case["key"]:
            axes = tuple(range(2, found.ndim))
            found = jnp.sum(found * uncond, axes) / jnp.sum(uncond**2, axes)
        account.compare(case["key"], found)


# VDM


def vdm_schedule(account, gamma):
    make = TABULATE[account.double]
    levels = schedules.log_snr_levels(-np.sort(np.float64(gamma)))
    return jax.tree.map(jnp.asarray, make(*levels))


@parity("processes/vdm")
def test_levels_and_noised_data_of_vdm_are_ours(account):
    (eps,) = account.read("", "eps")
    f = jnp.asarray(exact(account, "f"), eps.dtype)
    gamma = -9.0 + 14.0 * np.float64(account["t"])
    table = vdm_schedule(account, gamma)
    rows = jnp.asarray(np.argsort(np.argsort(gamma)), jnp.int32)
    level = schedules.take(table, rows, 1).now
    account.compare("gamma", -level.log_snr)
    account.compare("alpha2", level.signal**2)
    account.compare("sigma2", level.noise**2)
    account.compare("z_t", diffusion.q_sample(table, f, rows, eps))


@parity("processes/vdm")
def test_the_loss_of_vdm_in_discrete_time_is_ours(account):
    """Of the terms between levels; the decoder is another one."""
    (eps,) = account.read("", "eps")
    f = jnp.asarray(exact(account, "f"), eps.dtype)
    gamma = np.linspace(-9, 5, 51)
    table = vdm_schedule(account, gamma)
    rows = jnp.asarray(np.ceil(np.float64(account["t"]) * 50), jnp.int32)

    def eps_hat(z, timesteps):  # told the log-SNR, -gamma
        scale = jnp.sqrt(jax.nn.sigmoid(-timesteps))
        return 0.9 * z * scale[:, None] + 0.05

    objective = Objective("eps", weighting="vdm")
    args = jax.random.key(0), eps_hat, table, objective, f, rows
    bits = losses.training_loss(*args, eps=eps).loss
    # A mean over 51 rows with the decoder's, theirs over 50 terms.
    account.compare("loss/T50/diff", jnp.mean(bits, keepdims=True) * 50 / 51)


@parity("processes/vdm")
def test_the_loss_of_vdm_in_continuous_time_is_ours(account):
    """The bound of linear log-SNR: half its range times the error in eps."""
    (eps,) = account.read("", "eps")
    f = jnp.asarray(exact(account, "f"), eps.dtype)
    gamma = -9.0 + 14.0 * np.float64(account["t"])
    table = vdm_schedule(account, gamma)
    rows = jnp.asarray(np.argsort(np.argsort(gamma)), jnp.int32)

    def eps_hat(z, timesteps):
        return 0.9 * z * jnp.sqrt(jax.nn.sigmoid(-timesteps))[:, None] + 0.05

    def weighting(schedule, t):
        return jnp.full(t.shape, 14 / 2 / np.log(2).item(), eps.dtype)

    objective = Objective("eps", weighting=weighting)
    args = jax.random.key(0), eps_hat, table, objective, f, rows
    bits = losses.training_loss(*args, eps=eps).loss
    account.compare("loss/T0/diff", jnp.mean(bits, keepdims=True))


@parity("processes/vdm", slow=["float64"])
def test_sampling_of_vdm_is_ancestral_sampling_on_its_levels(account):
    z_1, noise = account.read("sample", "z_1", "noise")
    table = vdm_schedule(account, np.linspace(-9, 5, 9))

    def eps_hat(z, timesteps):
        return 0.9 * z * jnp.sqrt(jax.nn.sigmoid(-timesteps))[:, None] + 0.05

    objective = Objective("eps", var_type="fixed_small")
    denoise_fn = diffusion.denoiser(eps_hat, table, objective)
    with official.drawing(noise, 9):
        keys, ts = official.step_keys(len(z_1)), jnp.arange(8, 0, -1)
        frames = samplers.sample_frames(
            keys, denoise_fn, samplers.ddpm_step, table, z_1, num_frames=8, ts=ts
        )
    account.compare("sample/z", frames.x)


# Averages by power functions (EDM2)


def table(account, key, ours):
    """Compares with an array that the official code computes in float64."""
    size = np.abs(account.arrays[key])
    tolerance = 1e-10 * size + 1e-12 * size.max() if account.double else 2e-7
    account.compare(key, ours, tolerance=tolerance)


@parity("processes/phema", precisions=["float64"])
def test_exponents_of_power_function_averages_are_the_official_ones(account):
    def gamma(key):
        return np.array([averages.gamma_from_width(std) for std in account[key]])

    table(account, "std_to_exp", gamma("std"))
    table(account, "lucidrains/gammas", gamma("std"))
    table(account, "exp", gamma("exp_to_std"))
    table(account, "std_to_exp", gamma("exp_to_std_of_exp"))


@parity("processes/phema")
def test_rates_of_power_function_averages_are_the_official_ones(account):
    def betas(t, widths):
        shares = [averages.power_function_share(jnp.asarray(t), w) for w in widths]
        return 1 - np.stack(shares)

    t = account["beta/t_next"] / account["beta/t_delta"]
    table(account, "beta/beta", betas(t, account["std"]))
    # One step later than the authors'.
    later = betas(np.arange(2, 42), account.json["lucidrains"]["sigma_rels"])
    table(account, "lucidrains/betas", later.T)


@parity("processes/phema")
def test_power_function_averages_of_a_trajectory_are_the_official_ones(account):
    (trajectory,) = account.read("", "trajectory")
    widths = account.json["power_function_ema"]["stds"]
    rates = dict(ema_decays=(), ema_warmup=True, ema_widths=widths)
    names = averages.average_names((), widths)

    def follow(first, steps, count):
        def update(kept, inputs):
            kept = averages.update(kept, *inputs, **rates)
            return kept, jnp.stack([kept[name] for name in names])

        at, kept = jnp.asarray(steps), dict.fromkeys(names, trajectory[first])
        return jax.lax.scan(update, kept, (trajectory[first + 1 :][:count], at))[1]

    account.compare("ema", follow(0, np.arange(60), 60))
    # There the first update copies the parameters whatever the rates are.
    later = follow(1, np.arange(2, 41), 39)
    copied = jnp.broadcast_to(trajectory[1], later[:1].shape)
    account.compare("lucidrains/ema", jnp.concatenate([copied, later]))


@parity("processes/phema")
def test_averages_that_are_reconstructed_are_the_official_ones(account):
    kept = np.asarray(account.read("", "ema_f64" if account.double else "ema")[0])
    widths = account.json["power_function_ema"]["stds"]
    for case in account.json["reconstruct"]:
        key = case["key"]
        steps = (account[f"{key}/in_nimg"] / 1024).astype(int)
        std, wanted = account[f"{key}/in_std"], account[f"{key}/out_std"]
        last = int(case["out_nimg"] / 1024)
        snapshots = {
            (step, width): kept[step - 1, widths.index(width)]
            for step, width in zip(steps.tolist(), std.tolist(), strict=True)
        }
        fits = [post_hoc_ema.fit_profile(steps, std, w, last)[0] for w in wanted]
        table(account, f"{key}/coefficients", np.stack(fits, axis=1))
        found = [
            post_hoc_ema.average_of_width(
                snapshots, snapshots.get, w, last, max_residual=1.0
            )
            for w in wanted
        ]
        account.compare(f"{key}/out", np.stack(found))


@parity("processes/phema", precisions=["float64"])
def test_products_of_profiles_are_the_official_ones(account):
    keys = [f"correlation/{which}" for which in ("a_ofs", "a_std", "b_ofs", "b_std")]
    args = [account[key] for key in keys]
    table(account, "correlation/out", post_hoc_ema.profile_product(*args))


@parity("processes/phema", precisions=["float64"])
def test_coefficients_of_ema_pytorch_are_ours_before_they_are_divided_by_their_sum(
    account,
):
    case, weights = account.json["lucidrains"], account.arrays["lucidrains/weights"]
    steps, std = np.repeat([10, 20, 30, 40], 2), np.tile(case["sigma_rels"], 4)
    fits = [
        post_hoc_ema.fit_profile(steps, std, w, 40)[0] for w in case["out_sigma_rels"]
    ]
    table(account, "lucidrains/weights", np.stack(fits, axis=1) * weights.sum(0))


# The sum of it all

REST = {  # why an array is not compared, by the file's name and what its key matches
    "other: noise of another eta in a solver whose eta is 1 here, or 0": {
        "kdiffusion": r"dpmpp_[23]m_sde/.*eta0|dpmpp_(sde|2s_ancestral)/.*eta(0\.5|1)",
    },
    "other: B(h) = h in UniPC, which is NaN at the data, orders and correctors of it "
    "that are not UniPC's, and noise as what is predicted": {
        "multistep_diffusers": "unipc/(bh1|bh2_order1|.*disable_corrector|.*eps)",
    },
    "other: a third order with a wrong sign, or starting in another way": {
        "multistep_diffusers": "dpmsolver_(sde/sdepp|ode/pp)_order3",
    },
    "other: times of other codes, and how their training draws them": {
        "edm": "precond/vp.*(/t$|sigma_of_t|t_of_sigma)",
        "kdiffusion_wrappers": "sigma_sampling/|VDenoiser/t_to_sigma|discrete/(t$|t_to|"
        "sigma_to_t|get_sigmas)",
        "flow_diffusers": "training/",
        "conversions": "(vp_t|v_t|cosine_t|fm_vp_t|vp_sigma_back|v_sigma_back)",
    },
    "not built: a loss with learned uncertainty; learning rates of EDM2": {
        "edm2": "loss/|lr/",
    },
    "other: a norm of each channel; a sum over steps, which the test keeps": {
        "guidance": "apg/(channel_norm|.*/running_average)",
    },
    "other: log-densities by 20 steps of Euler's method, a tenth of a nat off; where "
    "the midpoint rule leads to, which ode_log_prob does not return": {
        "flow": "likelihood/(euler_exact/ll|midpoint_(exact|probe)/x_0)",
    },
    "other: parameters of a denoiser that no case of the file calls": {
        "kdiffusion_wrappers": "denoiser/",
    },
    "other: eta above 1": {
        "kdiffusion": "(ancestral|euler_ancestral/tanh/karras)/eta3"
    },
    "other: solvers that the issue does not ask for": {
        "kdiffusion": "lms/|dpm_|dpmpp_2m_sde/.*/heun|euler/.*/churn(_window)?/",
        "multistep_diffusers": "deis/|dpmsolver_sde/(sde_|.*heun)",
        "flow": "ode/.*(midpoint|heun|rk4)|ode/step_size|ode/grid/short",
    },
    "other: Euler's and Heun's method in a time that is not sigma": {
        "edm_sampling": "ablation_sampler/(vp_vp_vp|ve_ve|edm_vp_vp|edm_ve|vp_churn)",
        "flow": "ode/.*/model_t",
        "flow_diffusers": "flow_heun/",
    },
    "other: grids that are given to from_levels": {
        "edm_sampling": "grid/",
        "kdiffusion": "sigmas/(exponential|polyexponential|vp)",
        "flow_diffusers": "flow_euler/inverted_grid",
        "multistep_diffusers": "base_betas/",
    },
    "other: what eps-networks of EDM's code are told, their rounded sigmas; factors "
    "that follow from x_in and D": {
        "edm": "precond/(vp|ve|iddpm)|loss/(vp|ve)",
        "kdiffusion_wrappers": "VDenoiser/c_|.*/model_(cond|t)|discrete/(t|alphas)",
    },
    "other: a weighting of another code": {
        "kdiffusion_wrappers": "Denoiser_(snr|soft_min_snr)/(loss|weight)|.*/weight",
    },
    "other: all noise is renewed": {"flow_diffusers": "flow_euler/stochastic|noise$"},
    "other: velocities in another time, paths with extra noise": {
        "flow": "path/.*(d_alpha|d_sigma|u_t|snr_inverse|velocity)|torchcfm/"
    },
    "other: averages by a number of images and its ramp-up; a profile for plots; "
    "coefficients that do not sum to 1": {
        "phema": "traditional/|response/|lucidrains/synthesized"
    },
    "other: a decoder of another kind; x_pred is wrong in the notebook": {
        "vdm": "data_logprob|loss/T.*(latent|loss|recon)|sample/x_pred|x$|x_|eps_0"
    },
}


@pytest.mark.slow  # as it fills all accounts
def test_every_array_is_compared_or_an_input_or_its_reason_is_told():
    reasons = set()
    for path in PROCESSES:
        file = path.removesuffix(".npz")
        account, name = total(file), file.removeprefix("processes/")
        for key in names_in(file) - account.ratios.keys() - account.inputs:
            told = [
                reason
                for reason, patterns in REST.items()
                if name in patterns and re.match(patterns[name], key)
            ]
            assert told, f"{path}: {key}"
            reasons.update(told[:1])
    assert reasons == REST.keys()
