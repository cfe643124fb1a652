"""Parity with the official code: all arrays of `golden/`, by its own lists of cases.

golden/README.md tells where the numbers come from. Each test goes through one or more
of the case lists and hands what we compute to an `Account`, which compares it with the
stored array of that name; the last test counts what became of every single array.

Tolerances. `noise_floor.json` holds the float32 rounding error of the official code.
Computed by us in float32, a result may differ by `FLOORS` times that. Computed by us in
float64 it may differ by no more than that error itself, and where the official float64
result is stored, by 1e-10 of it.
"""

import collections
import contextlib
import functools
import itertools
import json
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from jax_diffusion import diffusion, likelihood, losses, samplers, schedules, timesteps
from jax_diffusion.diffusion import Objective

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
NOISE_FLOOR = json.loads((GOLDEN / "noise_floor.json").read_text())

ULP = 2.0**-52  # of a float64 near 1
ULP_32 = 2.0**-23
FLOORS = 4  # their rounding error and ours, and twice that for another order of sums
TABLE = 1e-12  # relative, float64 against float64

# Lists of cases that hold their results themselves.
LISTS = {
    "schedules": ["official_errors"],
    "respacing": [
        "space_timesteps",
        "space_timesteps_errors",
        "ermongroup_sequences",
        "ermongroup_errors",
    ],
}
NOT_EXPRESSED = {
    "guidance": "classifier guidance is not written yet",
    "clipped mu": "official PREVIOUS_X keeps its raw mean while x_0 is clipped; ours "
    "follows the clipped x_0",
    "more steps": "the DDIM repository takes more steps than asked where n does not "
    "divide T; ours takes n",
}
IN_PART = {
    "variance at 0": "not row t = 0, where the official variance is 0 but its log is "
    "that of row 1; we have the log only",
    "float32 cdf": "not where a difference of two float32 cdfs is noise; in float64 "
    "they are compared everywhere",
}
VAR_TYPES = "LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"
MEAN_TYPES = {"PREVIOUS_X": "mu", "START_X": "x_0", "EPSILON": "eps"}


# The account: what was read, what was compared, and how far it was off.


@functools.cache
def load(file):
    """The arrays of a golden file and its json."""
    with np.load(GOLDEN / f"{file}.npz", allow_pickle=False) as arrays:
        return dict(arrays), json.loads((GOLDEN / f"{file}.json").read_text())


class Account:
    """What became of the arrays of one golden file, in float32 or in double."""

    def __init__(self, file, double=False):
        self.file, self.double = file, double
        self.arrays, self.json = load(file)
        self.inputs = set()
        self.ratios = {}  # error / tolerance
        self.in_part = {}  # name -> reason
        self.not_expressed = {}  # name -> reason

    def __getitem__(self, key):
        """An input, as stored."""
        self.inputs.add(key)
        return self.arrays[key]

    def array(self, key):
        """An input as a JAX array, floats in the precision of this account."""
        stored = self[key]
        return jnp.asarray(stored, float if stored.dtype.kind == "f" else jnp.int32)

    def compare(self, key, ours, *, tolerance=None, where=None, why=None):
        """Notes error / tolerance; only of the rows `where`, if given, for `why`."""
        if self.double and f"{key}_f64" in self.arrays:
            key += "_f64"
        golden, ours = self.arrays[key], np.asarray(ours)
        assert ours.shape == golden.shape, (key, ours.shape, golden.shape)
        if tolerance is None:
            tolerance = self._tolerance(key)
        tolerance = np.broadcast_to(tolerance, golden.shape)
        if where is not None:
            ours, golden, tolerance = ours[where], golden[where], tolerance[where]
            self.in_part[key] = why
        self.ratios[key] = max(self.ratios.get(key, 0), _ratio(ours, golden, tolerance))

    def equal(self, name, ours, golden):
        """The same for what the json holds itself, which must be equal."""
        self.ratios[name] = 0.0 if np.array_equal(ours, golden) else np.inf

    def leave(self, reason, *names):
        self.not_expressed.update(dict.fromkeys(names, reason))

    def _tolerance(self, key):
        golden = np.abs(self.arrays[key])
        if key.endswith("_f64"):
            return 1e-10 * golden + 1e-12 * golden.max()
        floor = NOISE_FLOOR[f"{self.file}.npz"][key][0]
        if self.double:  # floors are stored with three digits
            return 1.01 * floor + 1e-9 * golden.max()
        return FLOORS * floor + 1e-6 * golden.max()


def _ratio(ours, golden, tolerance):
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(ours.astype(np.float64) - golden)
        ratio = np.where(ours == golden, 0.0, error / tolerance)  # inf equals inf
    return np.nan_to_num(ratio, nan=np.inf).max(initial=0.0)


ACCOUNTS = []


def parity(file, *, precisions=("float32", "float64")):
    """Makes a test of a function that fills an account; each runs once a process."""

    def decorate(fill):
        @functools.cache
        def account(precision):
            account = Account(file, double=precision == "float64")
            with jax.enable_x64(account.double):
                fill(account)
            return account

        @pytest.mark.parametrize("precision", precisions)
        def test(precision):
            ratios = account(precision).ratios
            far = {k: r for k, r in ratios.items() if not r <= 1}
            worst = sorted(far, key=far.get, reverse=True)[:8]
            assert not far, (len(far), len(ratios), {k: far[k] for k in worst})

        test.__name__, test.__doc__ = fill.__name__, fill.__doc__
        ACCOUNTS.extend((file, account, precision) for precision in precisions)
        return test

    return decorate


# Reading the cases.


def schedule(account, betas, *, keep=None, rescale=False):
    """A schedule of stored betas: as shipped, or every leaf in double."""
    make = schedules.tabulate if account.double else schedules.make_schedule
    table = make(betas, keep=keep, rescale_timesteps=rescale)
    return jax.tree.map(jnp.asarray, table)


def spaced_schedule(account, case, betas):
    """The schedule of a case that may keep a part of the steps only."""
    keep = case["section_counts"]
    if keep is not None:
        keep = schedules.spaced_steps(len(betas), keep)
    return schedule(account, betas, keep=keep, rescale=case["rescale_timesteps"])


def objective(case, **options):
    return Objective(MEAN_TYPES[case["mean_type"]], case["var_type"].lower(), **options)


def stored_output(account, config, case):
    """The output of the network that the case stores."""
    output = account.array(f"{config}/model_output/{case['mean_type']}")
    if not objective(case).learns_variance:
        return output
    var_values = account.array(f"{config}/model_var_values/{case['var_type']}")
    return jnp.concatenate([output, var_values], axis=-1)


def constant_model(output):
    return lambda x, t: output


def fake_model(constants, learned):
    """The closed-form network of golden/README.md."""
    a, b, c, va, vb = constants

    def model_fn(x, t):
        t = t.reshape(-1, 1, 1, 1).astype(x.dtype)
        mean = a * x * jnp.cos(b * t) + c
        return jnp.concatenate([mean, va * x + vb], axis=-1) if learned else mean

    return model_fn


def denoiser(model_fn, schedule, objective, clip, denoised=None):
    """With the official denoised_fn, a scale and a shift of x_0, before the clipping"""
    denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
    if denoised is not None:
        denoise_fn = _shift_x_0(denoise_fn, *denoised)
    return diffusion.clip_x_0(denoise_fn) if clip else denoise_fn


def _shift_x_0(denoise_fn, scale, shift):
    def shifted(x_t, t):
        prediction = denoise_fn(x_t, t)
        return prediction._replace(x_0=scale * prediction.x_0 + shift)

    return shifted


def denoised_fn(account, case):
    constants = account.json["denoised_fn"]
    return (constants["mul"], constants["add"]) if case.get("denoised_fn") else None


def model_constants(account, name="fake_model"):
    return tuple(account.json[name][k] for k in ("a", "b", "c", "va", "vb"))


def clips_mu(case):
    return case["mean_type"] == "PREVIOUS_X" and case["clip_denoised"]


def compare_timesteps(account, key, ours):
    """Times 1000 / T in the official float32, and in our float64 rounded once."""
    account.compare(key, ours, tolerance=2 * ULP_32 * account.arrays[key])


def assert_8_bit(account, key, name="x_start"):
    """The data are 8-bit ones, as the discretised likelihood takes them to be."""
    x = account[f"{key}/{name}"].astype(np.float64)
    assert np.array_equal(np.rint(127.5 * (x + 1)), account[f"{key}/{name}_u8"])


def spread(a, like):
    """A coefficient of shape [b, 1, ...] in the shape of the image."""
    return np.broadcast_to(a, like.shape)


# The official noise in our samplers: keys that remember which step they are for, and a
# `samplers.normal` that looks the noise of that step up.

_remembering = define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: jnp.zeros(1, jnp.uint32),
    split=None,
    random_bits=None,
    fold_in=lambda key, number: number.reshape(1),
    name="remembers the last number folded in",
    tag="step",
)


def step_keys(num_images):
    data = jnp.zeros((num_images, 1), jnp.uint32)
    return jax.random.wrap_key_data(data, impl=_remembering)


@contextlib.contextmanager
def official_noise(noise, num_steps):
    """Draws noise[k] at iteration k, when num_steps - 1 - k steps are still to go."""

    def normal(keys, shape):
        assert shape == noise.shape[2:]
        to_go = jax.random.key_data(keys)[0, 0].astype(jnp.int32)
        return noise[num_steps - 1 - to_go]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "normal", normal)
        yield


# schedules and respacing


def official_tables(s):
    """The official names of what a NoiseSchedule holds."""
    return {
        "betas": s.betas,
        "alphas_cumprod": s.now.signal**2,
        "alphas_cumprod_prev": s.prev.signal**2,
        "alphas_cumprod_next": s.next.signal**2,
        "sqrt_alphas_cumprod": s.now.signal,
        "sqrt_one_minus_alphas_cumprod": s.now.noise,
        "log_one_minus_alphas_cumprod": 2 * np.log(s.now.noise),
        "sqrt_recip_alphas_cumprod": 1 / s.now.signal,
        "sqrt_recipm1_alphas_cumprod": s.now.noise / s.now.signal,
        "posterior_variance": np.exp(s.posterior_log_var),
        "posterior_log_variance_clipped": s.posterior_log_var,
        "posterior_mean_coef1": s.posterior_x_0,
        "posterior_mean_coef2": s.posterior_x_t,
    }


def compare_tables(account, case, s):
    for name, ours in official_tables(s).items():
        key = f"{case['key']}/{name}"
        tolerance = TABLE * np.abs(account.arrays[key])
        match name:
            case "log_one_minus_alphas_cumprod":  # log(1 - tiny): absolute error
                tolerance = tolerance + 4 * ULP
            case "sqrt_recipm1_alphas_cumprod":  # sqrt(1 / alpha_bar - 1): cancels
                tolerance = tolerance + ULP / (s.now.signal * s.now.noise)
        if name == "posterior_variance":
            rows = np.arange(len(ours)) > 0
            account.compare(
                key, ours, tolerance=tolerance, where=rows, why="variance at 0"
            )
        else:
            account.compare(key, ours, tolerance=tolerance)


@parity("schedules", precisions=["float64"])
def test_tables_of_every_schedule_are_the_official_ones(account):
    for case in account.json["cases"]:
        with np.errstate(divide="ignore"):  # where alpha_bar ends in 0
            s = schedules.tabulate(account[f"{case['key']}/betas"])
            compare_tables(account, case, s)


def our_betas(case):
    num_steps, ends = case["T"], {}
    if "beta_start" in case:
        ends = {"start": case["beta_start"], "end": case["beta_end"]}
    match case["family"], case["name"]:
        case (("openai" | "lucidrains"), "linear"):
            return schedules.linear_betas(num_steps)
        case (("openai" | "lucidrains"), "cosine"):
            return schedules.cosine_betas(num_steps)
        case "lucidrains", "sigmoid":
            shape = {k: float(case[k]) for k in ("start", "end", "tau")}
            return schedules.sigmoid_alpha_bar_betas(num_steps, **shape)
        case "alphabar", _:
            names = {"exp": np.exp, "cos": np.cos, "sqrt": np.sqrt, "pi": np.pi}
            return schedules.betas_from_alpha_bar(
                lambda u: eval(case["alpha_bar"], names, {"t": u}),
                num_steps,
                max_beta=case["max_beta"],
            )
        case "ai504", "cosine":
            return schedules.cosine_betas(num_steps, min_beta=1e-4, max_beta=0.9999)
        case (("ai504" | "ho"), "linear"):
            return schedules.linear_betas(num_steps, rescale=False, **ends)
        case ("ai504", "quadratic") | ("ho", "quad"):
            return schedules.quadratic_betas(num_steps, **ends)
        case (("ai504" | "ermongroup"), "sigmoid"):
            return schedules.sigmoid_betas(num_steps, **ends)
        case "ho", ("warmup10" | "warmup50"):
            fraction = int(case["name"].removeprefix("warmup")) / 100
            return schedules.warmup_betas(num_steps, fraction=fraction, **ends)
        case "ho", "const":
            return schedules.constant_betas(num_steps, value=case["beta_end"])
        case "ho", "jsd":
            return schedules.jsd_betas(num_steps)


@parity("schedules", precisions=["float64"])
def test_beta_functions_give_the_official_betas(account):
    for case in account.json["cases"]:
        ours = our_betas(case)
        # 1 - alpha_bar[t] / alpha_bar[t - 1] is as good as the quotient near 1.
        from_ratio = case["name"] == "cosine" or case["family"] == "alphabar"
        from_ratio |= case["family"] == "lucidrains"
        slack = 1.0 if from_ratio else 0.0
        tolerance = TABLE * ours + 4 * ULP * slack
        account.compare(f"{case['key']}/betas", ours, tolerance=tolerance)
        if (key := f"{case['key']}/betas_torch_float32") in account.arrays:
            slack = 1.0 if from_ratio else ours.max()
            account.compare(key, ours, tolerance=4 * ULP_32 * slack)


@parity("schedules", precisions=["float64"])
def test_schedules_that_the_official_code_refuses_are_refused(account):
    for i, case in enumerate(account.json["official_errors"]):
        if case["error"] == "NotImplementedError":  # an unknown name
            refused = case["name"] not in schedules.BETAS
        else:
            with pytest.raises(ValueError):
                schedules.make_schedule(schedules.BETAS[case["name"]](case["T"]))
            refused = True
        account.equal(f"official_errors[{i}]", refused, True)


@parity("respacing", precisions=["float64"])
def test_tables_of_respaced_chains_are_the_official_ones(account):
    for case in account.json["respaced"]:
        key = case["key"]
        steps = case["original_num_steps"], case["section_counts"]
        keep = schedules.spaced_steps(*steps)
        s = schedules.tabulate(account[f"{key}/base_betas"], keep=keep)
        compare_tables(account, case, s)
        account.compare(f"{key}/timestep_map", s.timesteps, tolerance=0)


@parity("respacing", precisions=["float64"])
def test_subsets_of_steps_are_the_official_ones(account):
    for i, case in enumerate(account.json["space_timesteps"]):
        ours = schedules.spaced_steps(case["num_timesteps"], case["section_counts"])
        account.equal(f"space_timesteps[{i}]", ours, case["timesteps"])
    for i, case in enumerate(account.json["ermongroup_sequences"]):
        name = f"ermongroup_sequences[{i}]"
        num_steps, n = case["T"], case["timesteps"]
        if case["skip_type"] == "quad":  # a step visited twice is the same step
            ours = schedules.quadratic_steps(num_steps, n)
            account.equal(name, ours, sorted(set(case["seq"])))
        elif num_steps % n:
            assert len(schedules.uniform_steps(num_steps, n)) == n < case["count"]
            account.leave("more steps", name)
        else:
            account.equal(name, schedules.uniform_steps(num_steps, n), case["seq"])


@parity("respacing", precisions=["float64"])
def test_impossible_subsets_of_steps_are_refused(account):
    for i, case in enumerate(account.json["space_timesteps_errors"]):
        with pytest.raises(ValueError):
            schedules.spaced_steps(case["num_timesteps"], case["section_counts"])
        account.equal(f"space_timesteps_errors[{i}]", True, True)
    for i, case in enumerate(account.json["ermongroup_errors"]):
        with pytest.raises(ValueError):
            schedules.uniform_steps(case["T"], case["timesteps"])
        account.equal(f"ermongroup_errors[{i}]", True, True)


# process and p_mean_variance


@parity("process")
def test_forward_process_posterior_and_conversions_are_the_official_ones(account):
    for case in account.json["cases"]:
        key = case["key"]
        s = schedule(account, account[f"{key}/betas"])
        names = "x_start", "noise", "x_t", "eps_in", "xprev_in", "xstart_in", "t"
        x_0, eps, x_t, eps_in, x_prev, x_0_in, t = (
            account.array(f"{key}/{name}") for name in names
        )
        mean, log_var = diffusion.q_mean_log_var(s, x_0, t)
        posterior_mean, posterior_log_var = diffusion.q_posterior(s, x_0, x_t, t)
        ours = {
            "q_sample": diffusion.q_sample(s, x_0, t, eps),
            "q_mean_variance/mean": mean,
            "q_mean_variance/log_variance": spread(log_var, x_0),
            "q_mean_variance/variance": spread(jnp.exp(log_var), x_0),
            "q_posterior_mean_variance/mean": posterior_mean,
            "q_posterior_mean_variance/log_variance_clipped": spread(
                posterior_log_var, x_0
            ),
            "predict_xstart_from_eps": diffusion.x_0_from_eps(s, x_t, t, eps_in),
            "predict_xstart_from_xprev": diffusion.x_0_from_mu(s, x_t, t, x_prev),
            "predict_eps_from_xstart": diffusion.eps_from_x_0(s, x_t, t, x_0_in),
        }
        for name, value in ours.items():
            account.compare(f"{key}/{name}", value)
        account.compare(
            f"{key}/q_posterior_mean_variance/variance",
            spread(jnp.exp(posterior_log_var), x_0),
            where=np.asarray(t) > 0,
            why="variance at 0",
        )
        assert_8_bit(account, key)


def compare_reverse_step(account, case, prefix, s, output, x_t, t):
    """p(x_{t-1} | x_t) and its x_0, of this output of the network."""
    denoise_fn = denoiser(
        constant_model(output),
        s,
        objective(case),
        case["clip_denoised"],
        denoised_fn(account, case),
    )
    x_0, log_var = denoise_fn(x_t, t)
    account.compare(f"{prefix}pred_xstart", x_0)
    rows = {}
    if case["var_type"] == "FIXED_SMALL":
        rows = {"where": np.asarray(t) > 0, "why": "variance at 0"}
    account.compare(f"{prefix}variance", spread(jnp.exp(log_var), x_0), **rows)
    if f"{prefix}log_variance" in account.arrays:
        account.compare(f"{prefix}log_variance", spread(log_var, x_0))
    if clips_mu(case):
        account.leave("clipped mu", f"{prefix}mean")
    else:
        mean, _ = diffusion.q_posterior(s, x_0, x_t, t)
        account.compare(f"{prefix}mean", mean)


@parity("p_mean_variance")
def test_mean_and_variance_of_the_reverse_step_are_the_official_ones(account):
    for case in account.json["cases"]:
        config = case["config"]
        s = schedule(account, account[f"{config}/betas"])
        x_t, t = account.array(f"{config}/x_t"), account.array(f"{config}/t")
        output = stored_output(account, config, case)
        compare_reverse_step(account, case, f"{case['key']}/", s, output, x_t, t)


@parity("process")
def test_reverse_step_of_guided_diffusion_without_guidance_is_the_official_one(account):
    for config in (case["key"] for case in account.json["cases"]):
        s = schedule(account, account[f"{config}/betas"])
        x_t, eps, t = (account.array(f"{config}/{k}") for k in ("x_t", "eps_in", "t"))
        account.leave("guidance", f"{config}/cond_grad")
        for var_type, clip in itertools.product(VAR_TYPES, (False, True)):
            output = eps
            if var_type.startswith("LEARNED"):
                var_values = account.array(f"{config}/var_{var_type}")
                output = jnp.concatenate([eps, var_values], axis=-1)
            case = {"mean_type": "EPSILON", "var_type": var_type, "clip_denoised": clip}
            key = f"{config}/condition/{var_type}/clip{clip:d}"
            compare_reverse_step(account, case, f"{key}/p_", s, output, x_t, t)
            guided = (
                "condition_mean",
                "condition_score/mean",
                "condition_score/pred_xstart",
            )
            account.leave("guidance", *(f"{key}/{name}" for name in guided))


# losses and likelihood


@parity("losses")
def test_gaussian_kl_and_discretised_likelihood_are_the_official_ones(account):
    key = "fn/normal_kl"
    names = "mean1", "logvar1", "mean2", "logvar2"
    mean_1, log_var_1, mean_2, log_var_2 = (account.array(f"{key}/{k}") for k in names)
    zero = jnp.zeros_like(mean_1)
    kl = losses.normal_kl
    account.compare(f"{key}/out", kl(mean_1, log_var_1, mean_2, log_var_2))
    account.compare(f"{key}/out_vs_std_normal", kl(mean_1, log_var_1, zero, zero))

    key = "fn/approx_standard_normal_cdf"
    cdf = losses._approx_normal_cdf(account.array(f"{key}/x"))
    account.compare(f"{key}/out", cdf)

    key = "fn/discretized_gaussian_log_likelihood"
    args = [account.array(f"{key}/{k}") for k in ("x", "means", "log_scales")]
    log_p = losses.discretized_gaussian_log_likelihood(*args)
    grads = jax.grad(
        lambda *args: losses.discretized_gaussian_log_likelihood(*args).sum(),
        argnums=(1, 2),
    )(*args)
    # log(p) of a difference p of two cdfs near 1 is off by their rounding over p.
    exact = account.arrays[f"{key}/out_f64"]
    rounding = 4 * (ULP if account.double else ULP_32) / np.exp(exact)
    rows = {"where": account[f"{key}/reliable_f32"] == 1, "why": "float32 cdf"}
    rows = {} if account.double else rows
    for name, ours in zip(("out", "grad_means", "grad_log_scales"), (log_p, *grads)):
        scale = np.abs(account.arrays[f"{key}/{name}_f64"])
        tolerance = (1e-10 if account.double else 1e-6) * scale + rounding * (
            1 if name == "out" else 1 + scale
        )
        account.compare(f"{key}/{name}", ours, tolerance=tolerance, **rows)
    assert_8_bit(account, key, "x")


def our_loss(case, num_steps):
    """The official loss as an objective, and what its `vb` is in units of ours."""
    learned = case["var_type"].startswith("LEARNED")
    match case["loss_type"]:
        case "MSE" if learned:
            return objective(case, loss="hybrid", vlb_scale=1 / num_steps), 1
        case "RESCALED_MSE" if learned:
            return objective(case, loss="hybrid"), num_steps / 1000
        case "KL":
            return objective(case, loss="vlb", vlb_scale=1 / num_steps), 1
        case "RESCALED_KL":
            return objective(case, loss="vlb"), num_steps
        case _:
            return objective(case, loss="l2"), 0


def loss_and_gradient(s, ours, output, x_0, t, eps):
    """Gradient by the output of the network, loss terms, and what it was told."""

    def loss(output):
        told = []

        def model_fn(x_t, timesteps):
            told.append(timesteps)
            return output

        key = jax.random.key(0)
        terms = losses.training_loss(key, model_fn, s, ours, x_0, t, eps=eps)
        return terms.loss.sum(), (terms, *told)

    grad, (terms, told) = jax.grad(loss, has_aux=True)(output)
    return grad, terms, told


@parity("losses")
def test_training_losses_and_their_gradients_are_the_official_ones(account):
    for case in account.json["training_losses"]:
        config, key = case["config"], case["key"]
        s = schedule(
            account, account[f"{config}/betas"], rescale=case["rescale_timesteps"]
        )
        x_0, eps, t = (
            account.array(f"{config}/{k}") for k in ("x_start", "noise", "t")
        )
        ours, vb_scale = our_loss(case, s.num_steps)
        output = stored_output(account, config, case)
        grad, terms, told = loss_and_gradient(s, ours, output, x_0, t, eps)
        values = {"loss": terms.loss, "mse": terms.mse, "vb": vb_scale * terms.vlb}
        for term in case["terms"]:
            account.compare(f"{key}/{term}", values[term])
        account.compare(f"{key}/grad_model_output", grad)
        compare_timesteps(account, f"{config}/t_received", told)
        assert_8_bit(account, config)


@parity("losses")
def test_training_losses_of_respaced_chains_are_the_official_ones(account):
    for case in account.json["spaced_training_losses"]:
        inputs, key = case["inputs"], case["key"]
        betas = account[f"{inputs}/base_betas"]
        s = spaced_schedule(account, case, betas)
        kept = schedules.spaced_steps(len(betas), case["section_counts"])
        account.compare(f"{inputs}/timestep_map", kept, tolerance=0)
        x_0, eps, t = (
            account.array(f"{inputs}/{k}") for k in ("x_start", "noise", "t")
        )
        ours, vb_scale = our_loss(case, s.num_steps)
        model_fn = fake_model(model_constants(account), learned=True)
        terms = losses.training_loss(
            jax.random.key(0), model_fn, s, ours, x_0, t, eps=eps
        )
        account.compare(f"{key}/loss", terms.loss)
        account.compare(f"{key}/mse", terms.mse)
        account.compare(f"{key}/vb", vb_scale * terms.vlb)
        compare_timesteps(account, f"{key}/t_received", s.timesteps[t])


@parity("losses")
def test_loss_of_the_ddim_repository_is_ours_summed_over_pixels(account):
    for case in account.json["ermongroup_loss"]:
        key = case["key"]
        s = schedule(account, account[f"{key}/betas"])
        x_0, eps, t = (account.array(f"{key}/{k}") for k in ("x_start", "noise", "t"))
        model_fn = fake_model(model_constants(account), learned=False)
        terms = losses.training_loss(
            jax.random.key(0), model_fn, s, Objective(), x_0, t, eps=eps
        )
        summed = terms.loss * x_0[0].size
        account.compare(f"{key}/loss_keepdim", summed)
        account.compare(f"{key}/loss", summed.mean()[None])
        compare_timesteps(account, f"{key}/t_received", s.timesteps[t])


@parity("losses")
def test_terms_of_the_bound_are_the_official_ones(account):
    for case in account.json["vb_terms_bpd"]:
        config, key = case["config"], case["key"]
        s = schedule(account, account[f"{config}/betas"])
        x_0, x_t, t = (account.array(f"{config}/{k}") for k in ("x_start", "x_t", "t"))
        output = stored_output(account, config, case)
        clip = case["clip_denoised"]
        denoise_fn = denoiser(constant_model(output), s, objective(case), clip)
        prediction = denoise_fn(x_t, t)
        account.compare(f"{key}/pred_xstart", prediction.x_0)
        if clips_mu(case):
            account.leave("clipped mu", f"{key}/output", f"{key}/output_f64")
        else:
            bits = losses.vlb_terms(s, prediction, x_0, x_t, t)
            account.compare(f"{key}/output", bits)


@functools.partial(jax.jit, static_argnames=("objective", "constants", "clip"))
def official_bits(s, x_0, noise, *, objective, constants, clip):
    model_fn = fake_model(constants, objective.learns_variance)
    denoise_fn = denoiser(model_fn, s, objective, clip)
    with official_noise(noise, s.num_steps):
        return likelihood.bits_per_dim(step_keys(len(x_0)), denoise_fn, s, x_0)


@parity("losses")
def test_bits_per_dim_and_their_terms_are_the_official_ones(account):
    for case in account.json["prior_bpd"]:
        config = case["config"]
        s, x_0 = (
            schedule(account, account[f"{config}/betas"]),
            account.array(f"{config}/x_start"),
        )
        account.compare(case["key"], likelihood.prior_bpd(s, x_0))
    for case in account.json["calc_bpd_loop"]:
        inputs, key = case["inputs"], case["key"]
        betas = "betas" if case["section_counts"] is None else "base_betas"
        s = spaced_schedule(account, case, account[f"{inputs}/{betas}"])
        bits = official_bits(
            s,
            account.array(f"{inputs}/x_start"),
            account.array(f"{inputs}/noise"),
            objective=objective(case),
            constants=model_constants(account, case["model"].split()[0]),
            clip=case["clip_denoised"],
        )
        account.compare(f"{key}/prior_bpd", bits.prior)
        account.compare(f"{key}/xstart_mse", bits.x_0_mse[:, ::-1])  # theirs descend
        account.compare(f"{key}/mse", bits.eps_mse[:, ::-1])
        if clips_mu(case):
            names = [f"{key}/{k}{p}" for k in ("vb", "total_bpd") for p in ("", "_f64")]
            account.leave("clipped mu", *names)
        else:
            account.compare(f"{key}/vb", bits.vlb[:, ::-1])
            account.compare(f"{key}/total_bpd", bits.total)
        compare_timesteps(account, f"{inputs}/model_t", s.timesteps[::-1])
        assert_8_bit(account, inputs)


# sampling


def step_of(case):
    """Which of our steps an official function takes."""
    if "reverse" in case["fn"]:
        return samplers.ddim_inversion_step
    if "ddim" in case["fn"] or case["fn"] == "generalized_steps":
        return samplers.ddim_step
    return samplers.ddpm_step


def with_eta(step_fn, eta):
    if step_fn is samplers.ddim_step:
        return functools.partial(step_fn, eta=eta)
    return step_fn


@parity("sampling")
def test_single_sampling_steps_are_the_official_ones(account):
    for case in account.json["single"]:
        inputs, key = case["inputs"], case["key"]
        results = f"{key}/sample", f"{key}/pred_xstart"
        if "cond" in case:
            account.leave("guidance", *results, f"{inputs}/cond_grad")
            continue
        s = schedule(account, account[f"{inputs}/betas"])
        x_t, t = account.array(f"{inputs}/x_t"), account.array(f"{inputs}/t")
        output = stored_output(account, inputs, case)
        clip = case["clip_denoised"]
        denoise_fn = denoiser(constant_model(output), s, objective(case), clip)
        step_fn = with_eta(step_of(case), case.get("eta"))
        with official_noise(account.array(f"{inputs}/noise")[None], num_steps=1):
            state = step_fn(step_keys(len(t)), denoise_fn, s, samplers.start(x_t), t)
        account.compare(results[1], state.x_0)
        if step_of(case) is samplers.ddpm_step and clips_mu(case):
            account.leave("clipped mu", results[0])
        else:
            account.compare(results[0], state.x)


@functools.partial(
    jax.jit, static_argnames=("step_fn", "objective", "constants", "clip", "denoised")
)
def official_frames(
    s, x_T, noise, num_steps, eta, *, step_fn, objective, constants, clip, denoised
):
    """All states of a loop; those of a padded schedule come last."""
    model_fn = fake_model(constants, objective.learns_variance)
    denoise_fn = denoiser(model_fn, s, objective, clip, denoised)
    with official_noise(noise, num_steps):
        return samplers.sample_frames(
            step_keys(len(x_T)),
            denoise_fn,
            with_eta(step_fn, eta),
            s,
            x_T,
            num_frames=s.num_steps,
        )


def compare_loop(account, case, s, *, mean_type, var_type, clip, denoised=None):
    """One compilation serves all lengths and eta: the schedules are padded."""
    key, noise = case["key"], account.array("loops/noise")
    frames = official_frames(
        schedules.pad(s, len(noise)),
        account.array("loops/x_T"),
        noise,
        s.num_steps,
        case["eta"] or 0.0,
        step_fn=step_of(case),
        objective=Objective(mean_type, var_type),
        constants=model_constants(account),
        clip=clip,
        denoised=denoised,
    )
    account.compare(f"{key}/samples", frames.x[-s.num_steps :])
    account.compare(f"{key}/pred_xstart", frames.x_0[-s.num_steps :])


@parity("sampling")
def test_sampling_loops_are_the_official_ones_at_every_step(account):
    for case in account.json["loops"]:
        if step_of(case) is samplers.ddim_inversion_step:
            continue
        key = case["key"]
        s = spaced_schedule(account, case, account[case["base_betas"]])
        compare_timesteps(account, f"{key}/model_t", s.timesteps[::-1])
        results = f"{key}/samples", f"{key}/pred_xstart"
        if case["cond_fn"]:
            account.leave("guidance", *results)
        elif step_of(case) is samplers.ddpm_step and clips_mu(case):
            account.leave("clipped mu", *results)
        else:
            ours = objective(case)
            compare_loop(
                account,
                case,
                s,
                mean_type=ours.mean_type,
                var_type=ours.var_type,
                clip=case["clip_denoised"],
                denoised=denoised_fn(account, case),
            )


@parity("sampling")
def test_ddim_inversion_is_the_official_one_at_every_step(account):
    for case in account.json["loops"]:
        if step_of(case) is not samplers.ddim_inversion_step:
            continue
        key = case["key"]
        s = spaced_schedule(account, case, account[case["base_betas"]])
        model_fn = fake_model(model_constants(account), learned=False)
        x_0 = account.array(f"{key}/x_0")
        frames = samplers.sample_frames(
            step_keys(len(x_0)),
            denoiser(model_fn, s, objective(case), case["clip_denoised"]),
            samplers.ddim_inversion_step,
            s,
            x_0,
            num_frames=s.num_steps,
            ts=jnp.arange(s.num_steps),
        )
        account.compare(f"{key}/samples", frames.x)
        compare_timesteps(account, f"{key}/model_t", s.timesteps)


@parity("sampling")
def test_samplers_of_the_ddim_repository_are_ours_at_every_step(account):
    for case in account.json["ermongroup"]:
        betas = account[case["base_betas"]].astype(np.float32)  # as theirs are
        s = schedule(account, betas, keep=case["seq"])
        compare_timesteps(account, f"{case['key']}/model_t", s.timesteps[::-1])
        compare_loop(
            account,
            case,
            s,
            mean_type="eps",
            var_type="fixed_large",
            clip=step_of(case) is samplers.ddpm_step,  # the other one never clips
        )


# timestep_sampler


@parity("timestep_sampler")
def test_loss_second_moment_sampler_is_the_official_one_after_every_update(account):
    exact = 1e-12 if account.double else 1e-6
    for case in account.json["cases"]:
        key, num_steps = case["key"], case["num_timesteps"]
        sampler = timesteps.loss_second_moment(
            num_steps,
            history=case["history_per_term"],
            uniform_prob=case["uniform_prob"],
        )
        sample = jax.jit(sampler.sample, static_argnums=2)
        update = jax.jit(sampler.update)
        state, states = sampler.init(), []
        for ts, loss in zip(
            account.array(f"{key}/ts"), account.array(f"{key}/losses"), strict=True
        ):
            states.append(state)
            state = update(state, ts, loss)
        states.append(state)
        importance = np.full((len(states), num_steps), np.nan)
        for row, state in zip(importance, states, strict=True):
            t, weight = sample(
                jax.random.key(0), state, 100_000
            )  # enough to draw every t
            row[t] = weight
        official_sum = account.arrays[f"{key}/weights"].sum(axis=1, keepdims=True)
        ours = {
            "loss_history": np.stack([state.losses for state in states]),
            "loss_counts": np.stack([state.counts for state in states]),
            "warmed_up": np.any(importance != 1, axis=1),
            "importance_weights": importance,
            "weights": official_sum / (num_steps * importance),  # not normalised
        }
        for name, value in ours.items():
            tolerance = exact * account.arrays[f"{key}/{name}"]
            account.compare(f"{key}/{name}", value, tolerance=tolerance)


@parity("timestep_sampler")
def test_uniform_sampler_weighs_every_timestep_the_same(account):
    num_steps = len(account.arrays["uniform/weights"])
    t, weight = timesteps.uniform(num_steps).sample(jax.random.key(0), (), 1000)
    ours = np.full(num_steps, np.nan)
    ours[t] = weight
    account.compare("uniform/weights", ours, tolerance=0)


# The sum of it all.


def names_in(file):
    """Every array of a golden file, and every case of its lists."""
    listed = {
        f"{name}[{i}]"
        for name in LISTS.get(file, [])
        for i in range(len(load(file)[1][name]))
    }
    return set(MANIFEST[f"{file}.npz"]) | listed


def test_every_array_is_compared_or_an_input_or_not_expressed(request, capsys):
    counts, worst, reasons = collections.Counter(), {}, {}
    for file in (name.removesuffix(".npz") for name in MANIFEST):
        accounts = [run(precision) for f, run, precision in ACCOUNTS if f == file]
        compared = merged(account.ratios for account in accounts)
        left = merged(account.not_expressed for account in accounts)
        inputs = set().union(*(account.inputs for account in accounts))
        inputs -= compared.keys() | left.keys()
        assert names_in(file) == compared.keys() | left.keys() | inputs
        assert not compared.keys() & left.keys()
        counts += {"compared": len(compared), "inputs": len(inputs)}
        counts += {"not expressed": len(left)}
        in_part = merged(account.in_part for account in accounts)
        for name, reason in (left | in_part).items():
            reasons.setdefault(reason, []).append(f"{file}: {name}")
        worst[file] = max(compared.values())
    assert reasons.keys() == NOT_EXPRESSED.keys() | IN_PART.keys()
    with capsys.disabled():
        report(counts, worst, reasons, names=request.config.option.verbose > 0)


def merged(dicts):
    return functools.reduce(operator.or_, dicts)


def report(counts, worst, reasons, *, names):
    print(f"\ngolden: {sum(counts.values())} arrays and cases,", end=" ")
    print(", ".join(f"{count} {fate}" for fate, count in counts.items()))
    print("largest error / tolerance:", end=" ")
    print(", ".join(f"{file} {ratio:.2f}" for file, ratio in worst.items()))
    for reason, members in reasons.items():
        kind, why = "not expressed", NOT_EXPRESSED.get(reason)
        if why is None:
            kind, why = "compared in part", IN_PART[reason]
        print(f"{kind}, {len(members)}, such as {members[0]}: {why}")
        if names:
            print(*(f"    {member}" for member in members), sep="\n")
