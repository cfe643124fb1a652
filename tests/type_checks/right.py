"""Right use of the library, which pyright accepts. Never run."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_diffusion import diffusion, editing, guidance, likelihood, losses, samplers
from jax_diffusion.diffusion import DenoiseFn, Objective, Prediction
from jax_diffusion.samplers import SampleState, StepFn
from jax_diffusion.schedules import NoiseSchedule, cosine_betas, make_schedule

schedule = make_schedule(cosine_betas(10))
key = jax.random.key(0)
keys = samplers.image_keys(key, jnp.arange(3))
x_T = samplers.normal(keys, (4, 4, 2))
t = jnp.zeros(3, jnp.int32)
label = jnp.arange(3)


# The fields of a schedule are arrays.
shape: tuple[int, ...] = schedule.now.signal.shape
ratio: jax.Array = schedule.now.noise / schedule.now.signal
first: jax.Array = schedule.betas[0]


# Networks and denoisers of one's own.
def model_fn(x: jax.Array, timesteps: jax.Array) -> jax.Array:
    return x * timesteps[:, None, None, None]


def own(x: jax.Array, t: jax.Array) -> Prediction:
    return Prediction(x, jnp.zeros(()))


def labeled(x_t, t, *, label):
    return Prediction(x_t * label[:, None, None, None], jnp.zeros(()))


class Net(nn.Module):
    def __call__(self, x, timesteps):
        return x


denoise_fn = diffusion.denoiser(model_fn, schedule, Objective())
named: DenoiseFn = own
also: DenoiseFn = lambda x, t: Prediction(x, jnp.zeros(()))  # noqa: E731
prediction: Prediction = denoise_fn(x_t=x_T, t=t) if False else denoise_fn(x_T, t)
with_label = diffusion.denoiser(lambda x, t, *, label: x, schedule, Objective())
with_label(x_T, t, label=label).x_0.mean()
of_a_module = diffusion.denoiser(Net(), schedule, Objective())


# Wrappers, ours and one's own.
def halved(denoise_fn: DenoiseFn) -> DenoiseFn:
    def wrapped(x_t, t):
        prediction = denoise_fn(x_t, t)
        return prediction._replace(x_0=0.5 * prediction.x_0)

    return wrapped


clipped = diffusion.clip_x_0(own)
diffusion.threshold_x_0(diffusion.clip_x_0(labeled))(x_T, t, label=label)
free = guidance.classifier_free(labeled, label, 3, 2.0)
text = guidance.classifier_free(labeled, {"label": label}, {"label": 0}, jnp.ones(3))
steered = guidance.classifier(
    halved(free), schedule, lambda x, timesteps, t: -x[:, 0, 0, 0], scale=1.0
)
measured = guidance.posterior(clipped, lambda x_0: -x_0[:, 0, 0, 0])


# Steps, ours and one's own.
class Weighted(NamedTuple):
    x: jax.Array
    x_0: jax.Array
    log_snr: jax.Array
    log_weight: jax.Array


def own_step(
    keys: jax.Array,
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    state: SampleState,
    t: jax.Array,
) -> SampleState:
    prediction = denoise_fn(state.x, t)
    return state._replace(x=prediction.x_0)


def weighing(step_fn: StepFn) -> StepFn:
    def step(keys, denoise_fn, schedule, state, t):
        return step_fn(keys, denoise_fn, schedule, state, t)

    return step


steps: list[StepFn] = [
    samplers.ddim_step,
    own_step,
    functools.partial(samplers.ddim_step, eta=0.5),
    functools.partial(own_step),
    weighing(samplers.ddpm_step),
    samplers.inpaint(samplers.heun_step, x_T, jnp.ones((4, 4, 1))),
    samplers.on_step(samplers.dpmpp_2m_step, print),
]
for step in steps:
    x: jax.Array = samplers.sample(keys, steered, step, schedule, x_T)
samplers.sample(keys, denoise_fn, own_step, schedule, x_T, ts=schedule.steps)
state = Weighted(*samplers.start(x_T), log_weight=jnp.zeros(3))
weights: jax.Array = samplers.sample(
    keys, measured, samplers.ddpm_step, schedule, state=state
).log_weight
takes: bool = samplers.as_sampler(own_step).takes_eta
editing.edit(keys, free, samplers.ddim_step, schedule, x_T, t=3)

# Losses and likelihoods.
terms = losses.training_loss(key, model_fn, schedule, Objective("v"), x_T, t)
loss: jax.Array = terms.loss.mean()
losses.training_loss(key, Net(), schedule, Objective(), x_T, t, eps=x_T)
bits: jax.Array = likelihood.bits_per_dim(key, clipped, schedule, x_T).total
likelihood.ode_bits_per_dim(keys, own, schedule, x_T, probes=2)
nats: jax.Array = likelihood.ode_log_prob(key, own, schedule, x_T, per_dim=True).total


def weighting(schedule: NoiseSchedule, t: jax.Array) -> jax.Array:
    return schedule.now.signal[t]


Objective("eps", weighting=weighting)
Objective(mean_type="v", var_type="learned_range", loss="hybrid", weighting="min_snr")
