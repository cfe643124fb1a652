"""The official cases in our words: schedules, objectives, denoisers, steps, noise."""

import contextlib
import dataclasses
import fractions
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from jax_diffusion import diffusion, guidance, samplers, schedules
from jax_diffusion.diffusion import Objective, Prediction

MEAN_TYPES = {"PREVIOUS_X": "mu", "START_X": "x_0", "EPSILON": "eps"}


def schedule(account, betas, *, keep=None, rescale=False):
    """A schedule of stored betas: as shipped, or every leaf in double."""
    make = schedules.tabulate if account.double else schedules.make_schedule
    table = make(betas, keep=keep, rescale_timesteps=rescale)
    return jax.tree.map(jnp.asarray, table)


def spaced_schedule(account, case, key):
    """The schedule of a case that may keep only a part of the steps."""
    betas, keep = account[key], case["section_counts"]
    if keep is not None:
        keep = schedules.spaced_steps(len(betas), keep)
    return schedule(account, betas, keep=keep, rescale=case["rescale_timesteps"])


def objective(case, **options):
    """That of a case, or of Ho et al. and the DDIM repository, who have no other."""
    case = {"mean_type": "EPSILON", "var_type": "FIXED_LARGE"} | case
    mean_type, var_type = MEAN_TYPES[case["mean_type"]], case["var_type"].lower()
    return Objective(mean_type, var_type, **options)


def stored_model(account, config, case):
    """A network whose output is the stored one."""
    outputs = account.read(config, f"model_output/{case['mean_type']}")
    if objective(case).learns_variance:
        outputs += account.read(config, f"model_var_values/{case['var_type']}")
    return constant_model(outputs)


def constant_model(outputs):
    """Whose output is, of all channels together, always the same."""
    output = jnp.concatenate(outputs, axis=-1)
    return lambda x_t, timesteps: output


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The closed-form network of golden/README.md, but for its shift."""

    a: float
    b: float
    c: float
    va: float
    vb: float

    def scale(self, t):
        return self.a * jnp.cos(self.b * t)


@dataclasses.dataclass(frozen=True)
class Smooth:
    """The closed-form network that diffusers called; `tau` is a quarter of T."""

    p: float
    q: float
    c: float
    va: float
    vb: float
    tau: float

    def scale(self, t):
        return self.p - self.q * jnp.exp(-t / self.tau)


class Network(NamedTuple):
    """A network and how a case reads its output; hashable, as jax.jit wants it."""

    objective: Objective
    clip: bool
    denoised: tuple[float, float] | None  # official denoised_fn: scale and shift
    closed_form: Cosine | Smooth | None
    cond: tuple[float, float, float] | None = None  # official cond_fn: g, h and k

    def model_fn(self, x, t):
        """The closed-form network of golden/README.md."""
        f = self.closed_form
        mean = f.scale(t.reshape(-1, 1, 1, 1).astype(x.dtype)) * x + f.c
        if not self.objective.learns_variance:
            return mean
        return jnp.concatenate([mean, f.va * x + f.vb], axis=-1)

    def log_prob(self, x_t, t):
        """Whose gradient the official cond_fn of golden/README.md is."""
        g, h, k = self.cond
        return -g / 2 * (1 + k * t) * jnp.sum((h - x_t) ** 2, axis=(1, 2, 3))

    def denoiser(self, schedule, model_fn=None, log_prob=None):
        """Of the closed-form network, or of another one, and so for its guidance."""
        model_fn = model_fn or self.model_fn
        log_prob = log_prob or (self.log_prob if self.cond else None)
        denoise_fn = diffusion.denoiser(model_fn, schedule, self.objective)

        def changed(x_t, t):
            prediction = denoise_fn(x_t, t)
            scale, shift = self.denoised
            return prediction._replace(x_0=scale * prediction.x_0 + shift)

        changed = changed if self.denoised else denoise_fn
        changed = diffusion.clip_x_0(changed) if self.clip else changed
        return guidance.classifier(changed, schedule, log_prob) if log_prob else changed


def network(account, case):
    denoised = closed_form = cond = None
    if case.get("denoised_fn"):
        denoised = tuple(account.json["denoised_fn"][k] for k in ("mul", "add"))
    if case.get("cond_fn"):
        cond = tuple(account.json["cond_fn"][k] for k in ("g", "h", "k"))
    model = case.get("model", "fake_model").removesuffix(" (learned)")
    if model == "fake_model_smooth":
        tau = case["schedule"][-1] / 4
        closed_form = Smooth(**account.json[model], tau=tau)
    elif model in account.json:
        closed_form = Cosine(**account.json[model])
    clip = case.get("clip_denoised", False)
    return Network(objective(case), clip, denoised, closed_form, cond)


def gradient_of(grad):
    """A log probability that has this gradient."""
    return lambda x_t, timesteps: jnp.sum(grad * x_t, axis=(1, 2, 3))


def betas(case):
    """The betas of a case from our function of that name."""
    num_steps, ends = case["T"], {}
    if "beta_start" in case:
        ends = {"start": case["beta_start"], "end": case["beta_end"]}
    match case["family"], case["name"]:
        case (("openai" | "lucidrains"), "linear"):
            return schedules.linear_betas(num_steps)
        case (("openai" | "lucidrains"), "cosine"):
            return schedules.cosine_betas(num_steps)
        case "ai504", "cosine":
            return schedules.cosine_betas(num_steps, min_beta=1e-4, max_beta=0.9999)
        case "alphabar", _:
            names = {"exp": np.exp, "cos": np.cos, "sqrt": np.sqrt, "pi": np.pi}
            return schedules.betas_from_alpha_bar(
                lambda u: eval(case["alpha_bar"], names, {"t": u}),
                num_steps,
                max_beta=case["max_beta"],
            )
        case "lucidrains", "sigmoid":
            shape = {k: float(case[k]) for k in ("start", "end", "tau")}
            return schedules.sigmoid_alpha_bar_betas(num_steps, **shape)
        case (("ai504" | "ermongroup"), "sigmoid"):
            return schedules.sigmoid_betas(num_steps, **ends)
        case (("ai504" | "ho"), "linear"):
            return schedules.linear_betas(num_steps, rescale=False, **ends)
        case ("ai504", "quadratic") | ("ho", "quad"):
            return schedules.quadratic_betas(num_steps, **ends)
        case "ho", ("warmup10" | "warmup50"):
            fraction = int(case["name"].removeprefix("warmup")) / 100
            return schedules.warmup_betas(num_steps, fraction=fraction, **ends)
        case "ho", "const":
            return schedules.constant_betas(num_steps, value=case["beta_end"])
        case "ho", "jsd":
            return schedules.jsd_betas(num_steps)


def tables(s):
    """The rows of a schedule in float64, by their official names."""
    with np.errstate(divide="ignore"):  # where the signal ends in 0
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


def loss(case, num_steps):
    """The official loss as an objective, and the factor of our bound in its `vb`."""
    learned = case["var_type"].startswith("LEARNED")
    match case["loss_type"]:
        case "KL":
            return objective(case, loss="vlb", vlb_scale=1 / num_steps), 1
        case "RESCALED_KL":
            return objective(case, loss="vlb"), num_steps
        case "MSE" if learned:
            return objective(case, loss="hybrid", vlb_scale=1 / num_steps), 1
        case "RESCALED_MSE" if learned:
            return objective(case, loss="hybrid"), num_steps / 1000
    return objective(case), 0  # MSE, rescaled or not, and no `vb`


def raw_mean(case):
    """Whether the official result is a mean that does not follow a changed x_0."""
    changed = case["clip_denoised"] or case.get("denoised_fn")
    from_x_0 = "ddim" in case.get("fn", "")
    return changed and case["mean_type"] == "PREVIOUS_X" and not from_x_0


def step(case):
    """Our step for an official function."""
    if "reverse" in case["fn"]:
        return samplers.ddim_inversion_step
    if "ddim" in case["fn"] or case["fn"] == "generalized_steps":
        return samplers.ddim_step
    if case["fn"] == "dpmsolver":
        return samplers.dpmpp_2m_step
    return samplers.ddpm_step


def guides_mean(case):
    """Whether guidance shifts the mean, by the variance times its gradient."""
    guided = "cond" in case or case.get("cond_fn")
    return guided and step(case) is samplers.ddpm_step


# diffusers


def of_diffusers(case):
    """A case of a scheduler of diffusers in the words of the other ones."""
    var_type = case.get("variance_type", "fixed_small").removesuffix("_log")
    first_order = case.get("solver_order") == 1  # DPM-Solver++ is DDIM then
    return case | {
        "fn": "ddim" if first_order else case["key"].split("/")[0],
        "model": "fake_model_smooth",
        "mean_type": {"epsilon": "EPSILON", "sample": "START_X"}[
            case["prediction_type"]
        ],
        "var_type": var_type.upper(),
        "clip_denoised": case.get("clip_sample", False),
    }


def deviation(case):
    """Which steps of a scheduler of diffusers are not ours, and why.

    "all", "last", or None with the reason None.
    """
    num_steps, last_t = len(case["timesteps"]), case["timesteps"][-1]
    if "eta" in case:
        stride = case["schedule"][-1] // num_steps
        if set(np.diff(case["timesteps"])) != {-stride}:
            return "all", "fixed stride"
        if case["clip_sample"] and not case["use_clipped_model_output"]:
            return "all", "raw eps"
        if not case["set_alpha_to_one"]:
            return "last", "last level"
    elif "solver_order" in case:
        ours = case["solver_order"] < 3 and case["solver_type"] == "midpoint"
        if not ours or case["algorithm_type"] != "dpmsolver++":
            return "all", "other solver"
        few = num_steps < 15
        lower = case["euler_at_final"] or (few and case["lower_order_final"])
        if lower and case["final_sigmas_type"] == "sigma_min":
            return "last", "last order"
    elif case["variance_type"] == "fixed_large" and last_t > 0:
        return "last", "last noise"
    return None, None


def steps_of_diffusers(case):
    """Our steps for a list of timesteps of diffusers, and None or why it has others.

    Its "leading" takes multiples of floor(T / n), "trailing" rounds T - i T / n. With
    DPM-Solver, "linspace" and "leading" are rules for n + 1 steps without the smallest.
    """
    num_steps, n = case["num_train_timesteps"], case["num_inference_steps"]
    spacing, offset = case["timestep_spacing"], 0
    one_more = spacing != "trailing" and case["scheduler"].startswith("DPM")
    n += one_more
    if n > num_steps:
        return None, "twice"
    if spacing == "linspace":
        parts = fractions.Fraction(num_steps - 1, n - 1).denominator
        if parts % 2 == 0 and parts & (parts - 1):  # even, and not a power of two
            return None, "half-way"
        steps = schedules.spaced_steps(num_steps, n)
    elif spacing == "leading" and num_steps % n <= 1:
        steps, offset = schedules.uniform_steps(num_steps, n), case["steps_offset"]
    elif spacing == "trailing" and num_steps % n == 0:
        steps = schedules.trailing_steps(num_steps, n)
    else:
        return None, "rest"
    return steps[one_more:][::-1] + offset, None


def with_eta(step_fn, eta):
    takes_eta = step_fn is samplers.ddim_step
    return functools.partial(step_fn, eta=eta) if takes_eta else step_fn


def side_by_side(denoise_fns):
    """Gives each denoiser an equal part of the batch: one compilation for them all."""

    def denoise(x_t, t):
        parts = (jnp.split(a, len(denoise_fns)) for a in (x_t, t))
        said = [f(x, t) for f, x, t in zip(denoise_fns, *parts, strict=True)]
        log_vars = [jnp.broadcast_to(p.log_var, p.x_0.shape) for p in said]
        x_0 = jnp.concatenate([p.x_0 for p in said])
        return Prediction(x_0, jnp.concatenate(log_vars))

    return denoise


# The official noise in our samplers: a key that remembers the number of its step, and a
# `normal` that looks up the noise of that step.

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
def drawing(noise, num_steps):
    """Draws noise[k] at iteration k, whose step starts from row num_steps - 1 - k."""

    def normal(keys, shape):
        assert shape == noise.shape[2:]
        t = jax.random.key_data(keys)[0, 0].astype(jnp.int32)
        return noise[num_steps - 1 - t]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers.steps, "normal", normal)
        patch.setattr(samplers, "normal", normal)  # that `likelihood` draws with
        yield
