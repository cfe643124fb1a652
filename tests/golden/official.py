"""The official cases in our words: schedules, objectives, denoisers, steps, noise."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from jax_diffusion import diffusion, samplers, schedules
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


class Network(NamedTuple):
    """A network and how a case reads its output; hashable, as jax.jit wants it."""

    objective: Objective
    clip: bool
    denoised: tuple[float, float] | None  # official denoised_fn: scale and shift
    constants: tuple[float, ...] | None  # of the closed-form network

    def model_fn(self, x, t):
        """The closed-form network of golden/README.md."""
        a, b, c, va, vb = self.constants
        mean = a * x * jnp.cos(b * t.reshape(-1, 1, 1, 1).astype(x.dtype)) + c
        if not self.objective.learns_variance:
            return mean
        return jnp.concatenate([mean, va * x + vb], axis=-1)

    def denoiser(self, schedule, model_fn=None):
        """Of the closed-form network, or of another one."""
        model_fn = model_fn or self.model_fn
        denoise_fn = diffusion.denoiser(model_fn, schedule, self.objective)

        def changed(x_t, t):
            prediction = denoise_fn(x_t, t)
            scale, shift = self.denoised
            return prediction._replace(x_0=scale * prediction.x_0 + shift)

        changed = changed if self.denoised else denoise_fn
        return diffusion.clip_x_0(changed) if self.clip else changed


def network(account, case):
    denoised = constants = None
    if case.get("denoised_fn"):
        denoised = tuple(account.json["denoised_fn"][k] for k in ("mul", "add"))
    model = case.get("model", "fake_model").removesuffix(" (learned)")
    if model in account.json:
        constants = tuple(account.json[model][k] for k in ("a", "b", "c", "va", "vb"))
    clip = case.get("clip_denoised", False)
    return Network(objective(case), clip, denoised, constants)


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
    return samplers.ddpm_step


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
# `samplers.normal` that looks up the noise of that step.

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
    """Draws noise[k] at iteration k, which has num_steps - 1 - k steps to go."""

    def normal(keys, shape):
        assert shape == noise.shape[2:]
        to_go = jax.random.key_data(keys)[0, 0].astype(jnp.int32)
        return noise[num_steps - 1 - to_go]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "normal", normal)
        yield
