"""Draws of x_0 given a measurement of it: DPS, and a particle sampler."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jax_diffusion import checks, diffusion, guidance, samplers
from jax_diffusion.checks import placement
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.guidance.gradients import check_log_likelihood, with_rows
from jax_diffusion.guidance.scales import Scale
from jax_diffusion.samplers import StepFn
from jax_diffusion.samplers.state import advance
from jax_diffusion.schedules import NoiseSchedule, check_schedule, take


def dps(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    step_fn: StepFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    log_likelihood_fn: Callable[..., Float[Array, "b"]],
    *,
    scale: Scale = 1.0,
) -> Float[Array, "b *d"]:
    """Diffusion posterior sampling: draws x_0 given a measurement (Chung et al. 2023).

    The score gets the gradient of the likelihood at the predicted x_0. Of a linear
    measurement of Gaussian data that is exact if the likelihood counts the variance of
    x_0 given x_t as noise of the measurement, see `guidance.posterior`.

    Args:
        keys: typed keys [b], one for each image.
        denoise_fn: the network as a denoiser, not clipped.
        step_fn: the sampler's step.
        schedule: the steps to take.
        x_T: noise [b, ...].
        log_likelihood_fn: log_likelihood_fn(x_0) -> log p(y | x_0) [b] in nats, each
            image by itself; an argument `t` is given the rows of the schedule [b].
        scale: of the gradient: one number, one for each image [b], or a function of t,
            see `guidance.within`.

    Returns:
        Data [b, ...].

    Raises:
        ValueError: if arguments do not fit each other, or log_likelihood_fn returns
            something else.
    """
    guided = guidance.posterior(denoise_fn, log_likelihood_fn, scale)
    return samplers.sample(keys, guided, step_fn, schedule, x_T)


class Particles(NamedTuple):
    """The state of `twisted_smc`: that of a sampler, and what particles weigh.

    Attributes:
        x, x_0, log_snr: see `samplers.SampleState`.
        log_twist: [b] log p(y | x_t) as it is guessed from the predicted x_0.
        log_evidence: log p(y) [], so far.
    """

    x: Array
    x_0: Array
    log_snr: Array
    log_twist: Array
    log_evidence: Array


def twisted_smc(
    keys: Key[Array, "b"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_T: Float[Array, "b *d"],
    log_likelihood_fn: Callable[..., Float[Array, "b"]],
) -> tuple[Float[Array, "b *d"], Float[Array, ""]]:
    """Twisted diffusion sampler: exact as particles grow many (Wu et al. 2023).

    Ancestral steps go towards the measurement as in `dps`. Particles then weigh what
    that has changed, and are resampled (systematically, after every step).

    Args:
        keys: typed keys [b], one for each particle; the first also says which are kept.
        denoise_fn: the network as a denoiser, called twice a step.
        schedule: the steps to take.
        x_T: noise of b particles [b, ...]. They share one measurement: for several,
            there is `jax.vmap`.
        log_likelihood_fn: as `dps` takes it. Any guess of p(y | x_t) is right that ends
            in p(y | x_0): one with an argument `t` should be that at row 0.

    Returns:
        Particles [b, ...] of equal weight, and an estimate of log p(y) in nats.

    Raises:
        ValueError: if arguments do not fit each other, or log_likelihood_fn returns
            something else.
    """
    check_schedule(schedule)
    checks.data("x_T", x_T, ("b", ...))
    check_log_likelihood(log_likelihood_fn)
    b = x_T.shape[0]

    def step(keys, denoise_fn, schedule, state, t):
        guided = guidance.posterior(denoise_fn, log_likelihood_fn)(state.x, t)
        alone = guided._replace(grad=None)
        mean = diffusion.guided_mean(schedule, alone, state.x, t)
        level = take(schedule, t, state.x.ndim).now
        last = t.reshape(level.noise.shape) == 0
        std = jnp.where(last, 0.0, jnp.exp(0.5 * guided.log_var))
        keys = samplers.fold_in(keys, t)
        drawn = std * samplers.normal(keys, state.x.shape[1:])
        shift = std**2 * guided.grad
        x = mean + shift + drawn
        axes = tuple(range(1, x.ndim))
        towards = jnp.sum(guided.grad * (shift / 2 + drawn), axis=axes)

        below = jnp.maximum(t - 1, 0)
        x_0 = jnp.where(last, x, denoise_fn(x, below).x_0)
        log_twist = with_rows(log_likelihood_fn, 1, below)(x_0)
        checks.array("log_likelihood_fn's output", log_twist, "float", (b,))
        # The past of an impossible particle, which was kept as all were, is forgotten.
        past = jnp.where(state.log_twist == -jnp.inf, 0.0, state.log_twist)
        log_weight = log_twist - past - towards
        log_weight, whole = placement.everywhere((log_weight, keys))
        # Systematic resampling: one random number spaces those that are kept evenly.
        places = jax.random.uniform(jax.random.fold_in(whole[0], 1)) + jnp.arange(b)
        # Where none is possible all are kept alike, and the evidence is -inf.
        possible = jnp.max(log_weight) > -jnp.inf
        share = jax.nn.softmax(jnp.where(possible, log_weight, 0.0))
        ends = jnp.cumsum(share)
        kept = jnp.minimum(jnp.searchsorted(ends, places / b), b - 1)
        rows = dict(x=x, x_0=guided.x_0, log_snr=level.log_snr, log_twist=log_twist)
        rows = {
            name: placement.beside(placement.everywhere(a)[kept], x)
            for name, a in rows.items()
        }
        mean_weight = jax.nn.logsumexp(log_weight) - jnp.log(b)
        return advance(state, **rows, log_evidence=state.log_evidence + mean_weight)

    none = placement.beside(jnp.zeros(b), x_T)
    start = Particles(*samplers.start(x_T), none, jnp.zeros(()))
    alone = guidance.shift_x_0(denoise_fn, schedule)  # for posterior's gradient only
    done = samplers.sample(keys, alone, step, schedule, state=start)
    return done.x, done.log_evidence
