"""Wrong use of the library: pyright refuses the lines marked so. Never run."""

import functools

import jax
import jax.numpy as jnp

from jax_diffusion import diffusion, editing, guidance, likelihood, losses, samplers
from jax_diffusion.diffusion import DenoiseFn, Objective, Prediction
from jax_diffusion.samplers import SampleState, StepFn
from jax_diffusion.schedules import NoiseSchedule, cosine_betas, make_schedule, pad

schedule = make_schedule(cosine_betas(10))
key = jax.random.key(0)
keys = samplers.image_keys(key, jnp.arange(3))
x = samplers.normal(keys, (4, 4, 2))
t = jnp.zeros(3, jnp.int32)
label = jnp.arange(3)
v = Objective("v")
step = samplers.ddim_step


def model_fn(x: jax.Array, timesteps: jax.Array) -> jax.Array:
    return x


def own(x: jax.Array, t: jax.Array) -> Prediction:
    return Prediction(x, jnp.zeros(()))


def labeled(x: jax.Array, t: jax.Array, *, label: jax.Array) -> Prediction:
    return own(x, t)


def blind(x: jax.Array) -> Prediction:
    return Prediction(x, jnp.zeros(()))


def short_step(
    keys: jax.Array, denoise_fn: DenoiseFn, state: SampleState, t: jax.Array
) -> SampleState:
    return state


def array_step(
    keys: jax.Array,
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: jax.Array,
) -> jax.Array:
    return state.x


def log_prob(x_0: jax.Array) -> jax.Array:
    return -x_0[:, 0, 0, 0]


denoise = diffusion.denoiser(model_fn, schedule, v)

# Swapped.
samplers.sample(keys, step, denoise, schedule, x)  # wrong
samplers.sample(denoise, keys, step, schedule, x)  # wrong
samplers.sample(keys, denoise, schedule, step, x)  # wrong
samplers.sample(keys, denoise, step, x, schedule)  # wrong
diffusion.denoiser(schedule, model_fn, v)  # wrong
diffusion.denoiser(model_fn, v, schedule)  # wrong
diffusion.q_sample(x, schedule, t, x)  # wrong
losses.training_loss(model_fn, key, schedule, v, x, t)  # wrong
losses.training_loss(key, model_fn, v, schedule, x, t)  # wrong
likelihood.bits_per_dim(key, schedule, denoise, x)  # wrong
guidance.classifier(schedule, denoise, log_prob)  # wrong
guidance.classifier(denoise, log_prob, schedule)  # wrong
guidance.posterior(log_prob, denoise)  # wrong
guidance.classifier_free(label, labeled, 0, 2.0)  # wrong
editing.edit(keys, step, denoise, schedule, x, t=3)  # wrong
pad(12, schedule)  # wrong

# Missing.
samplers.sample(keys, denoise, step, schedule)  # wrong
samplers.sample(keys, denoise, schedule, x)  # wrong
denoise(x)  # wrong
own(x)  # wrong
diffusion.denoiser(model_fn, schedule)  # wrong
diffusion.clip_x_0(labeled)(x, t)  # wrong
samplers.sample(keys, labeled, step, schedule, x)  # wrong
samplers.sample(keys, diffusion.clip_x_0(labeled), step, schedule, x)  # wrong
likelihood.bits_per_dim(key, labeled, schedule, x)  # wrong
guidance.posterior(labeled, log_prob)(x, t)  # wrong
guidance.classifier_free(labeled, label, 2.0)  # wrong
losses.training_loss(key, model_fn, schedule, v, x)  # wrong
editing.edit(keys, denoise, step, schedule, x)  # wrong
step(keys, denoise, schedule, t)  # wrong

# Misspelt.
samplers.sample(keys, denoise, step, schedule, x, t=t)  # wrong
samplers.sample(keys, denoise, functools.partial(step, ete=0.5), schedule, x)  # wrong
diffusion.threshold_x_0(denoise, quantil=0.9)  # wrong
diffusion.clip_x_0(labeled)(x, t, lable=label)  # wrong
guidance.classifier_free(labeled, label, 0, 2.0, rescaled=0.5)  # wrong
guidance.within(schedule, 2.0, hihg=3.0)  # wrong
losses.training_loss(key, model_fn, schedule, v, x, t, noise=x)  # wrong
Objective(meantype="v")  # wrong
Objective("velocity")  # wrong
Objective(weighting="snrs")  # wrong
print(schedule.signal)  # wrong
print(schedule.now.sigma)  # wrong
print(own(x, t).x0)  # wrong
print(samplers.start(x).x0)  # wrong

# Of another form.
samplers.sample(keys, model_fn, step, schedule, x)  # wrong
diffusion.clip_x_0(model_fn)  # wrong
samplers.sample(keys, blind, step, schedule, x)  # wrong
samplers.sample(keys, denoise, short_step, schedule, x)  # wrong
samplers.sample(keys, denoise, array_step, schedule, x)  # wrong
samplers.inpaint(short_step, x, x)  # wrong
samplers.as_sampler(denoise)  # wrong
one: DenoiseFn = blind  # wrong
two: StepFn = array_step  # wrong
three: float = schedule.betas  # wrong
