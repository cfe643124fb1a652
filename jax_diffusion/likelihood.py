"""How many bits a diffusion needs for an image: the discrete bound, and by an ODE.

    bits/dim = prior + sum_t vlb[t],  vlb[0] the decoder, vlb[t > 0] the KL terms

This is the negative log likelihood bound of DDPM eq. 5 for 8-bit data, summed over all
timesteps, none skipped or sampled. Terms are in ascending order of t.

    dx / dphi = v(x, phi)   d log p(x) / dphi = -tr(dv / dx)   tan phi = noise / signal

This is the probability flow (Song et al. 2021, eq. 39), in the angle of a noise level:
nothing is infinite, not even where no signal is left. It takes images to noise one to
one, and so gives them a density.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import diffusion, losses, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.schedules import NoiseSchedule

BINS = 127.5  # of 8-bit data, per unit of x_0 in [-1, 1]


class BitsPerDim(NamedTuple):
    """The bound of each example and what it is made of."""

    total: Array  # [b] bits/dim: prior plus all of vlb
    prior: Array  # [b] bits/dim: KL(q(x_T | x_0) || N(0, I))
    vlb: Array  # [b, T] bits/dim; column 0 is the decoder's
    x_0_mse: Array  # [b, T] mean squared error of the predicted x_0
    eps_mse: Array  # [b, T] mean squared error of the eps that this x_0 implies


class OdeBits(NamedTuple):
    """Bits of each example by the flow, and how far its parts can be trusted."""

    total: Array  # [b] bits/dim, averaged over the probes
    prior: Array  # [b] bits/dim: -log N(x_T; 0, I), a part of the total
    step_error: Array  # [b] bits/dim: from steps twice as long; NaN for a single step
    probe_error: Array  # [b] bits/dim: standard error over probes; NaN for one probe


def prior_bpd(schedule: NoiseSchedule, x_0: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """KL(q(x_T | x_0) || N(0, I)) in bits/dim: what x_T still tells of x_0."""
    last = jnp.sum(schedule.visited, dtype=jnp.int32) - 1
    last = jnp.broadcast_to(last, x_0.shape[:1])
    mean, log_var = diffusion.q_mean_log_var(schedule, x_0, last)
    zero = jnp.zeros_like(mean)
    return losses.mean_flat(losses.normal_kl(mean, log_var, zero, zero)) / np.log(2.0)


def bits_per_dim(
    key: Key[Array, "*_"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
) -> BitsPerDim:
    """The variational bound on -log2 p(x_0) per dimension, all T terms of it.

    Calls the denoiser T times in one scan. Noise is drawn afresh at each t, as in the
    official code, whose denoiser is clipped (`diffusion.clip_x_0`).

    Args:
        key: one for the batch, or one for each image (`samplers.image_keys`), which
            makes an image's result independent of its batch.
        x_0: uint8 / 127.5 - 1.
    """
    num_images = x_0.shape[0]
    keys = key if key.ndim else samplers.image_keys(key, jnp.arange(num_images))

    def terms_at(step):
        t = jnp.full((num_images,), step, jnp.int32)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        eps = samplers.normal(step_keys, x_0.shape[1:])
        x_t = diffusion.q_sample(schedule, x_0, t, eps)
        prediction = denoise_fn(x_t, t)
        vlb = losses.vlb_terms(schedule, prediction, x_0, x_t, t)
        eps_hat = diffusion.eps_from_x_0(schedule, x_t, t, prediction.x_0)
        x_0_mse = losses.mean_flat((prediction.x_0 - x_0) ** 2)
        return vlb, x_0_mse, losses.mean_flat((eps_hat - eps) ** 2)

    def term(_, step: Int[Array, ""]):  # zero in rows added by `schedules.pad`
        none = (jnp.zeros(num_images),) * 3
        visited = schedule.visited[step]
        return None, jax.lax.cond(visited, terms_at, lambda _: none, step)

    _, terms = jax.lax.scan(term, None, jnp.arange(schedule.num_steps))
    vlb, x_0_mse, eps_mse = (a.T for a in terms)
    prior = prior_bpd(schedule, x_0)
    return BitsPerDim(prior + vlb.sum(axis=1), prior, vlb, x_0_mse, eps_mse)


def progressive_coding(
    bpd: BitsPerDim,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Rate and distortion of sending an image step by step (DDPM sec. 4.3).

    Who has received x_t has paid the prior and all terms above t, and can show the x_0
    predicted there.

    Returns:
        rate in bits/dim and distortion as root mean squared error on the scale of 0 to
        255, both [b, T] with t ascending: from lossy at T - 1 to nearly exact at 0.
    """
    above = jnp.cumsum(bpd.vlb[:, ::-1], axis=1)[:, ::-1] - bpd.vlb
    return bpd.prior[:, None] + above, 127.5 * jnp.sqrt(bpd.x_0_mse)


def dequantise(
    keys: Key[Array, "b"], x_0: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """8-bit data as continuous: noise is added, uniform in the bin around a value.

    The mean of -log2 p over a bin, p per bin, is no less than -log2 of the bin's mass
    (Theis et al. 2016, sec. 3.1).
    """
    draw = functools.partial(jax.random.uniform, minval=-0.5, maxval=0.5)
    return x_0 + jax.vmap(lambda key: draw(key, x_0.shape[1:]))(keys) / BINS


def ode_bits_per_dim(
    key: Key[Array, "*_"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    *,
    probes: int = 1,
) -> OdeBits:
    """-log2 p(x) per dimension by the probability flow (Song et al. 2021, sec. 4.3).

    x is the dequantised x_0, and p the density of what the flow makes of N(0, I) from
    the last row back to the first, divided by the signal there. Heun's method goes from
    row to row, with two evaluations a step, so that the network sees its own timesteps
    only. Rows should be dense where noise is little (`schedules.angle_steps`). The
    same again over every second row changes the result by three times its error, if
    steps are short enough for a method of second order.

    The trace is Hutchinson's unbiased estimate with random signs, the same at all
    steps. Derivatives are taken forwards: nothing is stored for them, remat costs
    nothing, and the network cannot have a `custom_vjp`. Do not clip the denoiser, as
    the order is lost at a kink.

    Args:
        key: one for the batch, or one for each image, see `bits_per_dim`.
        x_0: uint8 / 127.5 - 1.
        probes: vectors to estimate the trace with, each at the price of a forward pass.

    Raises:
        ValueError: if probes is less than 1.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}.")
    keys = key if key.ndim else samplers.image_keys(key, jnp.arange(x_0.shape[0]))
    signal = schedule.now.signal[0]
    x = signal * dequantise(keys, x_0)  # with these keys, and probes with others
    signs = [
        _signs(samplers.fold_in(keys, 1 + i), x_0.shape[1:]) for i in range(probes)
    ]
    flow = functools.partial(_flow, denoise_fn, schedule, x, jnp.stack(signs))

    def bits(stride):
        x_T, volume = flow(stride)
        prior = (losses.mean_flat(x_T**2) + np.log(2 * np.pi)) / (2 * np.log(2.0))
        growth = (volume + jnp.log(signal)) / np.log(2.0) - np.log2(BINS)
        return prior, prior[None] - growth

    # One program for both: networks take long to compile.
    prior, total = jax.lax.map(bits, jnp.arange(1, 3, dtype=jnp.int32))
    fine, coarse = jnp.mean(total, axis=1)
    two_steps = jnp.sum(schedule.visited, dtype=jnp.int32) > 2
    step_error = jnp.where(two_steps, jnp.abs(fine - coarse), jnp.nan)
    probe_error = jnp.std(total[0], axis=0, ddof=1) / np.sqrt(probes)
    return OdeBits(fine, prior[0], step_error, probe_error)


def _flow(denoise_fn, schedule, x, signs, stride):
    """x at the last row, and the log of how volume grows to there, by every `stride`-th
    row: [b, ...] and, for each probe, nats/dim [probes, b].
    """
    angle = jnp.arctan2(schedule.now.noise, schedule.now.signal)
    last = jnp.sum(schedule.visited, dtype=jnp.int32) - 1

    def velocity(x, row):
        t = jnp.full(x.shape[:1], row, jnp.int32)

        def v(x):
            x_0 = diffusion.guided_x_0(schedule, denoise_fn(x, t), t)
            return diffusion.v_from_x_0(schedule, x, t, x_0)

        # The value is the same for all probes, and computed once.
        values, slopes = jax.vmap(lambda sign: jax.jvp(v, (x,), (sign,)))(signs)
        return values[0], jax.vmap(losses.mean_flat)(signs * slopes)

    def heun(state, start):
        x, volume = state
        end = jnp.minimum(start + stride, last)
        step = angle[end] - angle[start]
        v, trace = velocity(x, start)
        end_v, end_trace = velocity(x + step * v, end)
        return x + step * (v + end_v) / 2, volume + step * (trace + end_trace) / 2

    def one(state, i):
        start = i * stride
        return jax.lax.cond(start < last, heun, lambda s, _: s, state, start), None

    state = x, jnp.zeros(signs.shape[:2])
    state, _ = jax.lax.scan(one, state, jnp.arange(schedule.num_steps - 1))
    return state


def _signs(keys, shape):
    draw = functools.partial(jax.random.rademacher, shape=shape, dtype=jnp.float32)
    return jax.vmap(draw)(keys)
