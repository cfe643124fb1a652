"""Parity with the official code: all arrays of `golden/`, by its own lists of cases.

golden/README.md tells where the numbers come from and what the keys mean;
golden/account.py compares, and holds the tolerances. The last test, a slow one, counts
what became of every single array; `pytest -v -m slow` names those that were not
compared.
"""

import collections
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import official
from golden.account import MANIFEST, names_in, parity, report, total
from support import xla_options

from jax_diffusion import diffusion, likelihood, losses, samplers, schedules, timesteps

REASONS = {
    "raw mean": "not expressed: with PREVIOUS_X the official clipping and denoised_fn "
    "change x_0 but not the mean; our mean follows x_0",
    "more steps": "not expressed: where n does not divide T the DDIM repository takes "
    "more than n steps, we take n",
    "no result": "not expressed: an input that no official result belongs to",
    "row 0": "without row t = 0, where the official posterior variance is 0 but its "
    "log that of row 1; we have the log only, also to scale guidance by",
    "fixed stride": "not expressed: DDIM of diffusers steps from t to t - floor(T / n) "
    "whichever its next t is; we step to the next t",
    "raw eps": "not expressed: DDIM of diffusers clips x_0 but keeps eps; ours is that "
    "of the clipped x_0",
    "other solver": "not expressed: DPM-Solver++(2M) with midpoint is our only one; "
    "not order 3, heun, nor DPM-Solver for eps",
    "rest": "not expressed: where floor(T / n) leaves a rest diffusers takes multiples "
    "of it, or rounds T - i T / n; we take floor(i T / n)",
    "half-way": "not expressed: a step half-way between two, which rounding decides: "
    "diffusers rounds a multiple, spaced_steps, as in improved-diffusion, a sum",
    "twice": "not expressed: a timestep that comes more than once",
    "last order": "without the last step, of first order there but ours of second",
    "last level": "without the last step, from the level of t = 0 to that level there, "
    "ours to the clean image",
    "last noise": "without the last step, where diffusers adds noise unless t = 0; we "
    "add none on the way to the clean image",
    "float32 cdf": "without differences of two cdfs that float32 loses; the float64 "
    "test has them all",
}
VAR_TYPES = "LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"

TABLE = 1e-12  # relative error of a float64 table
MOST_STEPS = 21  # of any loop, all of which are padded to that
ULP, ULP_32 = 2.0**-52, 2.0**-23  # of a float64 and a float32 near 1


def spread(a, like):
    """A coefficient of shape [b, 1, ...] in the shape of the image."""
    return np.broadcast_to(a, like.shape)


def compare_timesteps(account, key, ours):
    """Times 1000 / T in float32 there, in float64 and then rounded here."""
    account.compare(key, ours, tolerance=2 * ULP_32 * account.arrays[key])


def assert_8_bit(account, prefix, name="x_start"):
    """The data are the 8-bit ones that the discretized likelihood is for."""
    x, x_u8 = account[f"{prefix}/{name}"], account[f"{prefix}/{name}_u8"]
    assert np.array_equal(np.rint(127.5 * (x.astype(np.float64) + 1)), x_u8)


# schedules, respacing


def compare_tables(account, key, s):
    with np.errstate(divide="ignore"):
        slack = {  # where theirs cancels: log(1 - tiny), and sqrt(1 / x - 1) near 1
            "log_one_minus_alphas_cumprod": 4 * ULP,
            "sqrt_recipm1_alphas_cumprod": ULP / (s.now.signal * s.now.noise),
        }
    rows = {"posterior_variance": {"where": slice(1, None), "why": "row 0"}}
    for name, ours in official.tables(s).items():
        tolerance = TABLE * np.abs(account.arrays[f"{key}/{name}"])
        tolerance, options = tolerance + slack.get(name, 0.0), rows.get(name, {})
        account.compare(f"{key}/{name}", ours, tolerance=tolerance, **options)


@parity("schedules", precisions=["float64"])
def test_tables_of_every_schedule_are_the_official_ones(account):
    for case in account.json["cases"]:
        s = schedules.tabulate(account[f"{case['key']}/betas"])
        compare_tables(account, case["key"], s)


@parity("schedules", precisions=["float64"])
def test_beta_functions_give_the_official_betas(account):
    for case in account.json["cases"]:
        key, ours = case["key"], official.betas(case)
        tolerance = TABLE * ours
        # 1 - alpha_bar[t] / alpha_bar[t - 1] is no better than that quotient near 1;
        # where alpha_bar is float32, no better than its error over alpha_bar[t - 1].
        rough = 4 * ULP_32 / account.arrays[f"{key}/alphas_cumprod_prev"]
        if case["name"] == "cosine" or case["family"] == "alphabar":
            tolerance = tolerance + 4 * ULP
        if (case["family"], case["name"]) == ("lucidrains", "sigmoid"):
            tolerance = tolerance + rough  # of its ends, torch.tensor(start / tau)
        account.compare(f"{key}/betas", ours, tolerance=tolerance)
        if (name := f"{key}/betas_torch_float32") in account.arrays:
            account.compare(name, ours, tolerance=rough)


@parity("schedules", precisions=["float64"])
def test_schedules_that_the_official_code_refuses_are_refused(account):
    for i, case in enumerate(account.json["official_errors"]):
        unknown = case["error"] == "NotImplementedError"
        with pytest.raises(KeyError if unknown else ValueError):
            schedules.make_schedule(schedules.BETAS[case["name"]](case["T"]))
        account.equal(f"official_errors[{i}]", "refused", "refused")


@parity("respacing", precisions=["float64"])
def test_tables_of_respaced_chains_are_the_official_ones(account):
    for case in account.json["respaced"]:
        key, num_steps = case["key"], case["original_num_steps"]
        keep = schedules.spaced_steps(num_steps, case["section_counts"])
        s = schedules.tabulate(account[f"{key}/base_betas"], keep=keep)
        compare_tables(account, key, s)
        account.compare(f"{key}/timestep_map", s.timesteps, tolerance=0)


@parity("respacing", precisions=["float64"])
def test_subsets_of_steps_are_the_official_ones(account):
    for i, case in enumerate(account.json["space_timesteps"]):
        ours = schedules.spaced_steps(case["num_timesteps"], case["section_counts"])
        account.equal(f"space_timesteps[{i}]", ours, case["timesteps"])
    for i, case in enumerate(account.json["ermongroup_sequences"]):
        name, steps = f"ermongroup_sequences[{i}]", (case["T"], case["timesteps"])
        if case["skip_type"] == "quad":  # to visit a step twice is to visit it once
            once = np.unique(case["seq"])
            account.equal(name, schedules.quadratic_steps(*steps), once)
        elif len(case["seq"]) == case["timesteps"]:
            account.equal(name, schedules.uniform_steps(*steps), case["seq"])
        else:
            account.leave("more steps", name)


@parity("respacing", precisions=["float64"])
def test_impossible_subsets_of_steps_are_refused(account):
    for i, case in enumerate(account.json["space_timesteps_errors"]):
        with pytest.raises(ValueError):
            schedules.spaced_steps(case["num_timesteps"], case["section_counts"])
        account.equal(f"space_timesteps_errors[{i}]", "refused", "refused")
    for i, case in enumerate(account.json["ermongroup_errors"]):
        with pytest.raises(ValueError):
            schedules.uniform_steps(case["T"], case["timesteps"])
        account.equal(f"ermongroup_errors[{i}]", "refused", "refused")


# process, p_mean_variance


@parity("process")
def test_forward_process_posterior_and_conversions_are_the_official_ones(account):
    for key in (case["key"] for case in account.json["cases"]):
        s = official.schedule(account, account[f"{key}/betas"])
        x_0, eps, x_t, t = account.read(key, "x_start", "noise", "x_t", "t")
        of = account.read(key, "eps_in", "xprev_in", "xstart_in")
        mean, log_var = diffusion.q_mean_log_var(s, x_0, t)
        log_var = spread(log_var, x_0)
        posterior_mean, posterior_log_var = diffusion.q_posterior(s, x_0, x_t, t)
        posterior_log_var = spread(posterior_log_var, x_0)
        ours = {
            "q_sample": diffusion.q_sample(s, x_0, t, eps),
            "q_mean_variance/mean": mean,
            "q_mean_variance/log_variance": log_var,
            "q_mean_variance/variance": np.exp(log_var),
            "q_posterior_mean_variance/mean": posterior_mean,
            "q_posterior_mean_variance/log_variance_clipped": posterior_log_var,
            "predict_xstart_from_eps": diffusion.x_0_from_eps(s, x_t, t, of[0]),
            "predict_xstart_from_xprev": diffusion.x_0_from_mu(s, x_t, t, of[1]),
            "predict_eps_from_xstart": diffusion.eps_from_x_0(s, x_t, t, of[2]),
        }
        for name, value in ours.items():
            account.compare(f"{key}/{name}", value)
        name, above_0 = "q_posterior_mean_variance/variance", np.asarray(t) > 0
        variance = np.exp(posterior_log_var)
        account.compare(f"{key}/{name}", variance, where=above_0, why="row 0")
        assert_8_bit(account, key)


def row_0(case):
    """Why not to compare the variance of t = 0; None where it is compared."""
    return "row 0" if case["var_type"] == "FIXED_SMALL" else None


def compare_reverse_step(account, case, prefix, s, model_fn, x_t, t):
    """p(x_{t-1} | x_t) and the predicted x_0."""
    x_0, log_var, _ = official.network(account, case).denoiser(s, model_fn)(x_t, t)
    log_var = spread(log_var, x_0)
    account.compare(f"{prefix}pred_xstart", x_0)
    if f"{prefix}log_variance" in account.arrays:
        account.compare(f"{prefix}log_variance", log_var)
    options = {"where": np.asarray(t) > 0, "why": row_0(case)}
    account.compare(f"{prefix}variance", np.exp(log_var), **options)
    if official.raw_mean(case):
        account.leave("raw mean", f"{prefix}mean")
    else:
        mean, _ = diffusion.q_posterior(s, x_0, x_t, t)
        account.compare(f"{prefix}mean", mean)


@parity("p_mean_variance")
def test_mean_and_variance_of_the_reverse_step_are_the_official_ones(account):
    for case in account.json["cases"]:
        key, config = case["key"], case["config"]
        s = official.schedule(account, account[f"{config}/betas"])
        model_fn = official.stored_model(account, config, case)
        x_t, t = account.read(config, "x_t", "t")
        compare_reverse_step(account, case, f"{key}/", s, model_fn, x_t, t)


def compare_guided_step(account, case, key, s, denoise_fn, x_t, t):
    """The mean as DDPM shifts it, x_0 as DDIM does, and its mean."""
    prediction = denoise_fn(x_t, t)
    mean = diffusion.guided_mean(s, prediction, x_t, t)
    options = {"where": np.asarray(t) > 0, "why": row_0(case)}
    account.compare(f"{key}/condition_mean", mean, **options)
    x_0 = diffusion.guided_x_0(s, prediction, t)
    account.compare(f"{key}/condition_score/pred_xstart", x_0)
    mean, _ = diffusion.q_posterior(s, x_0, x_t, t)
    account.compare(f"{key}/condition_score/mean", mean)


@parity("process")
def test_reverse_step_before_and_after_guidance_is_the_official_one(account):
    for config in (case["key"] for case in account.json["cases"]):
        s = official.schedule(account, account[f"{config}/betas"])
        x_t, eps, grad, t = account.read(config, "x_t", "eps_in", "cond_grad", "t")
        for var_type, clip in itertools.product(VAR_TYPES, (False, True)):
            key = f"{config}/condition/{var_type}/clip{clip:d}"
            case = {"mean_type": "EPSILON", "var_type": var_type, "clip_denoised": clip}
            outputs = [eps]
            if official.objective(case).learns_variance:
                outputs += account.read(config, f"var_{var_type}")
            model_fn = official.constant_model(outputs)
            compare_reverse_step(account, case, f"{key}/p_", s, model_fn, x_t, t)
            denoise_fn = official.network(account, case).denoiser(
                s, model_fn, official.gradient_of(grad)
            )
            compare_guided_step(account, case, key, s, denoise_fn, x_t, t)


# losses


@parity("losses")
def test_gaussian_kl_and_normal_cdf_are_the_official_ones(account):
    key = "fn/normal_kl"
    gaussians = account.read(key, "mean1", "logvar1", "mean2", "logvar2")
    account.compare(f"{key}/out", losses.normal_kl(*gaussians))
    standard = [jnp.zeros_like(gaussians[0])] * 2
    to_standard = losses.normal_kl(*gaussians[:2], *standard)
    account.compare(f"{key}/out_vs_std_normal", to_standard)
    key = "fn/approx_standard_normal_cdf"
    account.compare(f"{key}/out", losses._approx_normal_cdf(*account.read(key, "x")))


@parity("losses", slow=["float32"])
def test_discretized_likelihood_and_its_gradients_are_the_official_ones(account):
    key = "fn/discretized_gaussian_log_likelihood"
    x, mean, log_scale = account.read(key, "x", "means", "log_scales")
    log_p = losses.discretized_gaussian_log_likelihood
    grads = jax.grad(lambda *args: log_p(*args).sum(), argnums=(1, 2))
    # As users compile it: the quick code of conftest.py lacks the last places of tanh.
    exact = functools.partial(jax.jit, compiler_options=xla_options.AS_SHIPPED)
    grad_mean, grad_log_scale = exact(grads)(x, mean, log_scale)
    # A mass p that is the difference of two cdfs is off by their rounding, its log by
    # that over p, and its derivatives by as much per standard deviation. Masses below
    # 1e-12 are cut off and exact.
    p = np.exp(account.arrays[f"{key}/out_f64"])
    rounding = 4 * (ULP if account.double else ULP_32) * np.where(p > 2e-12, 1 / p, 0.0)
    per_std = rounding * np.exp(-account.arrays[f"{key}/log_scales"])
    rows = {"where": account[f"{key}/reliable_f32"] == 1, "why": "float32 cdf"}
    rows = {} if account.double else rows
    for name, ours, slack in (
        ("out", exact(log_p)(x, mean, log_scale), rounding),
        ("grad_means", grad_mean, per_std),
        ("grad_log_scales", grad_log_scale, per_std),
    ):
        relative = 1e-10 if account.double else 1e-6
        tolerance = relative * np.abs(account.arrays[f"{key}/{name}_f64"]) + slack
        account.compare(f"{key}/{name}", ours, tolerance=tolerance, **rows)
    assert_8_bit(account, key, "x")


def training_loss(output, s, ours, x_0, t, eps):
    """What the official tests differentiate, then the terms and the timesteps told."""
    told = []

    def model_fn(x_t, timesteps):
        told.append(timesteps)
        return output

    key = jax.random.key(0)
    terms = losses.training_loss(key, model_fn, s, ours, x_0, t, eps=eps)
    return terms.loss.sum(), (terms, *told)


@parity("losses", slow=["float32"])
def test_training_losses_and_their_gradients_are_the_official_ones(account):
    for case in account.json["training_losses"]:
        key, config = case["key"], case["config"]
        rescale = case["rescale_timesteps"]
        s = official.schedule(account, account[f"{config}/betas"], rescale=rescale)
        ours, vb_scale = official.loss(case, s.num_steps)
        output = official.stored_model(account, config, case)(None, None)
        args = output, s, ours, *account.read(config, "x_start", "t", "noise")
        if account.double:  # gradients take long, and are stored in float32 only
            _, (terms, told) = training_loss(*args)
        else:
            grad, (terms, told) = jax.grad(training_loss, has_aux=True)(*args)
            account.compare(f"{key}/grad_model_output", grad)
        values = {"loss": terms.loss, "mse": terms.mse, "vb": vb_scale * terms.vlb}
        for name in case["terms"]:
            account.compare(f"{key}/{name}", values[name])
        compare_timesteps(account, f"{config}/t_received", told)
        assert_8_bit(account, config)


@parity("losses")
def test_training_losses_of_respaced_chains_are_the_official_ones(account):
    for case in account.json["spaced_training_losses"]:
        key, inputs = case["key"], case["inputs"]
        s = official.spaced_schedule(account, case, f"{inputs}/base_betas")
        x_0, t, eps = account.read(inputs, "x_start", "t", "noise")
        ours, vb_scale = official.loss(case, s.num_steps)
        model_fn, key_0 = official.network(account, case).model_fn, jax.random.key(0)
        terms = losses.training_loss(key_0, model_fn, s, ours, x_0, t, eps=eps)
        account.compare(f"{key}/loss", terms.loss)
        account.compare(f"{key}/mse", terms.mse)
        account.compare(f"{key}/vb", vb_scale * terms.vlb)
        compare_timesteps(account, f"{key}/t_received", s.timesteps[t])
        if not case["rescale_timesteps"]:
            account.compare(f"{inputs}/timestep_map", s.timesteps, tolerance=0)


@parity("losses")
def test_loss_of_the_ddim_repository_is_ours_with_reduction_sum(account):
    for case in account.json["ermongroup_loss"]:
        key = case["key"]
        s = official.schedule(account, account[f"{key}/betas"])
        x_0, t, eps = account.read(key, "x_start", "t", "noise")
        network, key_0 = official.network(account, case), jax.random.key(0)
        objective = dataclasses.replace(network.objective, reduction="sum")
        terms = losses.training_loss(
            key_0, network.model_fn, s, objective, x_0, t, eps=eps
        )
        account.compare(f"{key}/loss_keepdim", terms.loss)
        account.compare(f"{key}/loss", terms.loss.mean(keepdims=True))
        compare_timesteps(account, f"{key}/t_received", s.timesteps[t])


@parity("losses")
def test_terms_of_the_bound_are_the_official_ones(account):
    for case in account.json["vb_terms_bpd"]:
        key, config = case["key"], case["config"]
        s = official.schedule(account, account[f"{config}/betas"])
        x_0, x_t, t = account.read(config, "x_start", "x_t", "t")
        model_fn = official.stored_model(account, config, case)
        prediction = official.network(account, case).denoiser(s, model_fn)(x_t, t)
        account.compare(f"{key}/pred_xstart", prediction.x_0)
        if official.raw_mean(case):
            account.leave("raw mean", f"{key}/output", f"{key}/output_f64")
        else:
            bits = losses.vlb_terms(s, prediction, x_0, x_t, t)
            account.compare(f"{key}/output", bits)


@parity("losses")
def test_prior_bits_are_the_official_ones(account):
    for case in account.json["prior_bpd"]:
        s = official.schedule(account, account[f"{case['config']}/betas"])
        (x_0,) = account.read(case["config"], "x_start")
        account.compare(case["key"], likelihood.prior_bpd(s, x_0))


# Sums over 1,000 steps in float32 need the roundings of compiled programs.
AS_PROGRAMS_ARE = {"xla_backend_optimization_level": 3}


@functools.partial(
    jax.jit, static_argnames="networks", compiler_options=AS_PROGRAMS_ARE
)
def bits_of_each(s, x_0, noise, *, networks):
    """Bits of every network on its own copy of the images, all in one batch."""
    x_0, noise = (jnp.concatenate([a] * len(networks), axis=-4) for a in (x_0, noise))
    denoise_fn = official.side_by_side([n.denoiser(s) for n in networks])
    with official.drawing(noise, s.num_steps):
        keys = official.step_keys(len(x_0))
        bits = likelihood.bits_per_dim(keys, denoise_fn, s, x_0)
    parts = zip(*(jnp.split(a, len(networks)) for a in bits), strict=True)
    return [likelihood.BitsPerDim(*part) for part in parts]


@parity("losses", slow=["float32", "float64"])
def test_bits_per_dim_and_their_terms_are_the_official_ones(account):
    cases_of = collections.defaultdict(list)
    for case in account.json["calc_bpd_loop"]:
        cases_of[case["inputs"]].append(case)
    for inputs, cases in cases_of.items():
        betas = "betas" if cases[0]["section_counts"] is None else "base_betas"
        s = official.spaced_schedule(account, cases[0], f"{inputs}/{betas}")
        networks = tuple(official.network(account, case) for case in cases)
        x_0, noise = account.read(inputs, "x_start", "noise")
        all_bits = bits_of_each(s, x_0, noise, networks=networks)
        for case, bits in zip(cases, all_bits, strict=True):
            compare_bits(account, case, bits)
        compare_timesteps(account, f"{inputs}/model_t", s.timesteps[::-1])
        assert_8_bit(account, inputs)


def compare_bits(account, case, bits):
    """Ours are in ascending order of t, theirs in descending order."""
    key = case["key"]
    account.compare(f"{key}/prior_bpd", bits.prior)
    account.compare(f"{key}/xstart_mse", bits.x_0_mse[:, ::-1])
    account.compare(f"{key}/mse", bits.eps_mse[:, ::-1])
    if official.raw_mean(case):
        names = "vb", "vb_f64", "total_bpd", "total_bpd_f64"
        account.leave("raw mean", *(f"{key}/{name}" for name in names))
    else:
        account.compare(f"{key}/vb", bits.vlb[:, ::-1])
        account.compare(f"{key}/total_bpd", bits.total)


# sampling


def row_0_of_sample(case):
    """The same of a sample, into which the variance comes by guidance."""
    return row_0(case) if official.guides_mean(case) else None


@parity("sampling", slow=["float32"])
def test_single_sampling_steps_are_the_official_ones(account):
    account.leave("no result", "single/linear_1000/model_var_values/LEARNED")
    for case in account.json["single"]:
        key, inputs = case["key"], case["inputs"]
        s = official.schedule(account, account[f"{inputs}/betas"])
        x_t, t, noise = account.read(inputs, "x_t", "t", "noise")
        model_fn, log_prob = official.stored_model(account, inputs, case), None
        if "cond" in case:
            log_prob = official.gradient_of(*account.read(inputs, "cond_grad"))
        denoise_fn = official.network(account, case).denoiser(s, model_fn, log_prob)
        step_fn = official.with_eta(official.step(case), case.get("eta"))
        state = samplers.start(x_t)
        with official.drawing(noise[None], num_steps=1):
            state = step_fn(official.step_keys(len(t)), denoise_fn, s, state, t)
        account.compare(f"{key}/pred_xstart", state.x_0)
        if official.raw_mean(case):
            account.leave("raw mean", f"{key}/sample")
        else:
            options = {"where": np.asarray(t) > 0, "why": row_0_of_sample(case)}
            account.compare(f"{key}/sample", state.x, **options)


@functools.partial(jax.jit, static_argnames=("step_fn", "network"))
def frames_of(s, x_T, noise, num_steps, eta, *, step_fn, network):
    """The state after every row of a schedule that may be padded."""
    keys, step_fn = official.step_keys(len(x_T)), official.with_eta(step_fn, eta)
    with official.drawing(noise, num_steps):
        return samplers.sample_frames(
            keys, network.denoiser(s), step_fn, s, x_T, num_frames=s.num_steps
        )


def states_of_loop(account, case, s, inputs):
    """The state after every step of a case, from its x_T and noise.

    Padded to one length, all schedules share a compilation; eta is traced.
    """
    num_steps, eta = s.num_steps, case.get("eta") or 0.0
    x_T, noise = account.read(inputs, "x_T", "noise")
    s = schedules.pad(s, MOST_STEPS)
    network, step_fn = official.network(account, case), official.step(case)
    frames = frames_of(s, x_T, noise, num_steps, eta, step_fn=step_fn, network=network)
    return jax.tree.map(lambda a: a[-num_steps:], frames)


def compare_loop(account, case, s):
    key, states = case["key"], states_of_loop(account, case, s, "loops")
    options = {"where": slice(-1), "why": row_0_of_sample(case)}
    account.compare(f"{key}/samples", states.x, **options)
    account.compare(f"{key}/pred_xstart", states.x_0)


@parity("sampling", slow=["float32", "float64"])
def test_sampling_loops_are_the_official_ones_at_every_step(account):
    for case in account.json["loops"]:
        if official.step(case) is samplers.ddim_inversion_step:
            continue
        key = case["key"]
        s = official.spaced_schedule(account, case, case["base_betas"])
        compare_timesteps(account, f"{key}/model_t", s.timesteps[::-1])
        if official.raw_mean(case):
            account.leave("raw mean", f"{key}/samples", f"{key}/pred_xstart")
        else:
            compare_loop(account, case, s)


@parity("sampling", slow=["float32"])
def test_samplers_of_the_ddim_repository_are_ours_at_every_step(account):
    for case in account.json["ermongroup"]:
        betas = account[case["base_betas"]]
        if not account.double:
            betas = betas.astype(np.float32)  # as theirs are
        s = official.schedule(account, betas, keep=case["seq"])
        compare_timesteps(account, f"{case['key']}/model_t", s.timesteps[::-1])
        compare_loop(account, case | {"clip_denoised": case["fn"] == "ddpm_steps"}, s)


@parity("sampling", slow=["float32"])
def test_ddim_inversion_is_the_official_one_at_every_step(account):
    for case in account.json["loops"]:
        if official.step(case) is not samplers.ddim_inversion_step:
            continue
        key, step_fn = case["key"], official.step(case)
        s = official.spaced_schedule(account, case, case["base_betas"])
        (x_0,) = account.read(key, "x_0")
        keys, denoise_fn = official.step_keys(len(x_0)), official.network(account, case)
        denoise_fn, ts = denoise_fn.denoiser(s), jnp.arange(s.num_steps)
        frames = samplers.sample_frames(
            keys, denoise_fn, step_fn, s, x_0, num_frames=s.num_steps, ts=ts
        )
        account.compare(f"{key}/samples", frames.x)
        compare_timesteps(account, f"{key}/model_t", s.timesteps)


# sampling_diffusers


def compare_solver_tables(account, case, s):
    """Timesteps, and sigmas: noise over signal, 0 in the end or that of t = 0."""
    key, num_steps = case["key"], len(case["timesteps"])
    told = s.timesteps[::-1][:num_steps]
    account.compare(f"{key}/timesteps", told, tolerance=0)
    sigmas = np.append((s.now.noise / s.now.signal)[::-1], 0.0)
    account.compare(f"{key}/sigmas", sigmas[: num_steps + 1])


@parity("sampling_diffusers", slow=["float32", "float64"])
def test_samplers_of_diffusers_are_ours_at_every_step(account):
    groups = (account.json[name] for name in ("ddpm", "ddim", "dpmsolver"))
    for case in map(official.of_diffusers, itertools.chain(*groups)):
        key, num_steps = case["key"], len(case["timesteps"])
        schedule = f"{case['schedule'][0]}_{case['schedule'][-1]}"
        # One that stops at the level of t = 0 is ours before the step to x_0.
        stops = [0] if case.get("final_sigmas_type") == "sigma_min" else []
        keep = stops + case["timesteps"][::-1]
        s = official.schedule(account, account[f"base_betas/{schedule}"], keep=keep)
        if "solver_order" in case:
            compare_solver_tables(account, case, s)
        names = (f"{key}/{name}" for name in ("pred_xstart", "x0_pred", "eps_pred"))
        (predicted,) = (name for name in names if name in account.arrays)
        steps, why = official.deviation(case)
        if steps == "all":
            account.leave(why, f"{key}/samples", predicted)
            continue
        states = states_of_loop(account, case, s, "")
        x, x_0 = states.x[:num_steps], states.x_0[:num_steps]
        account.compare(f"{key}/samples", x, where=slice(-1), why=why)
        account.compare(predicted, x_0)


@parity("sampling_diffusers", precisions=["float64"])
def test_timesteps_of_diffusers_are_ours_where_no_rounding_decides(account):
    for i, case in enumerate(account.json["timesteps"]):
        name, (ours, why) = f"timesteps[{i}]", official.steps_of_diffusers(case)
        if why is not None:
            account.leave(why, name)
        elif case["timesteps"] is not None:
            account.equal(name, ours, case["timesteps"])
        else:  # of long ones there are the ends and the sum
            summary = [len(ours), *ours[:8], *ours[-8:], ours.sum()]
            golden = [case["count"], *case["first"], *case["last"], case["sum"]]
            account.equal(name, summary, golden)


@parity("sampling_diffusers", precisions=["float64"])
def test_schedules_of_diffusers_are_ours(account):
    for name, betas in {
        "linear": schedules.linear_betas(100, rescale=False),
        "scaled_linear": schedules.quadratic_betas(100),
        "squaredcos_cap_v2": schedules.cosine_betas(100),
        "sigmoid": schedules.sigmoid_betas(100),
    }.items():
        # Theirs are float32: each factor 1 - beta of alpha_bar is rounded near 1.
        alpha_bar = schedules.tabulate(betas).now.signal ** 2
        rounding = ULP_32 * np.cumsum(1 / (1 - betas)) * alpha_bar
        key = f"diffusers_alphas_cumprod/{name}_100"
        account.compare(key, alpha_bar, tolerance=rounding)
        key = f"diffusers_betas/{name}_100"
        account.compare(key, betas, tolerance=4 * ULP_32 * betas)


# timestep_sampler


def states_of(sampler, batches):
    """The state before the first update and after each."""
    update = jax.jit(sampler.update)
    state = sampler.init()
    batches = list(batches)  # losses in 64 bits are kept in a history of 64 bits
    if isinstance(state, timesteps.LossHistory):
        state = state._replace(losses=state.losses.astype(batches[0][1].dtype))
    states = [state]
    for t, loss in batches:
        states.append(update(states[-1], t, loss))
    return states


def weights_of(sample, state, num_steps):
    """The weight of every timestep, from a batch large enough to hold them all."""
    weights = np.full(num_steps, np.nan)
    t, weight = sample(jax.random.key(0), state, 10_000)
    weights[t] = weight
    return weights


@parity("timestep_sampler", slow=["float32", "float64"])
def test_loss_second_moment_sampler_is_the_official_one_after_every_update(account):
    for case in account.json["cases"]:
        key, num_steps = case["key"], case["num_timesteps"]
        sampler = timesteps.loss_second_moment(
            num_steps,
            history=case["history_per_term"],
            uniform_prob=case["uniform_prob"],
        )
        states = states_of(
            sampler, zip(*account.read(key, "ts", "losses"), strict=True)
        )
        sample = jax.jit(sampler.sample, static_argnums=2)
        weights = np.stack([weights_of(sample, state, num_steps) for state in states])
        # Theirs are not normalized. The loss weight of t is 1 / (T p[t]).
        total_weight = account.arrays[f"{key}/weights"].sum(axis=1, keepdims=True)
        ours = {
            "loss_history": np.stack([state.losses for state in states]),
            "loss_counts": np.stack([state.counts for state in states]),
            "warmed_up": np.any(weights != 1, axis=1),
            "importance_weights": weights,
            "weights": total_weight / (num_steps * weights),
        }
        for name, value in ours.items():
            exact = 1e-12 if account.double else 1e-6
            tolerance = exact * account.arrays[f"{key}/{name}"]
            account.compare(f"{key}/{name}", value, tolerance=tolerance)


@parity("timestep_sampler")
def test_uniform_sampler_weighs_every_timestep_the_same(account):
    num_steps = len(account.arrays["uniform/weights"])
    weights = weights_of(timesteps.uniform(num_steps).sample, (), num_steps)
    account.compare("uniform/weights", weights, tolerance=0)


# The sum of it all.


@pytest.mark.slow  # as it fills all accounts
def test_every_array_is_compared_or_an_input_or_not_expressed(request, capsys):
    totals = {file: total(file) for file in (k.removesuffix(".npz") for k in MANIFEST)}
    used = set()
    for file, account in totals.items():
        compared, left = account.ratios.keys(), account.not_expressed.keys()
        assert not compared & left
        assert compared | left | account.inputs == names_in(file)
        used.update(account.not_expressed.values(), account.in_part.values())
    assert used == REASONS.keys()
    with capsys.disabled():
        report(totals, REASONS, names=request.config.option.verbose > 0)
