"""Bits/dim of images: the variational bound, and the exact density by an ODE.

`bits_per_dim` computes the bound of DDPM eq. 5 for 8-bit data. It sums the terms of all
timesteps; none is skipped or sampled. Terms are in ascending order of t.

    bits/dim = prior + sum_t vlb[t],  vlb[0] the decoder, vlb[t > 0] the KL terms

`ode_bits_per_dim` integrates the probability flow (Song et al. 2021, eq. 39), which
maps images to noise one to one and so gives each image a density. The variable of
integration is the angle phi of a noise level, in which v is finite everywhere, also
where no signal is left:

    dx / dphi = v(x, phi)   d log p(x) / dphi = -tr(dv / dx)   tan phi = noise / signal

That is the flow where signal^2 + noise^2 = 1; elsewhere it is the flow of x divided by
the root of that sum. `ode_log_prob` does this for continuous data of any kind.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import checks, diffusion, losses, samplers
from jax_diffusion.checks import placement
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.samplers.loop import like_batch
from jax_diffusion.schedules import NoiseSchedule, check_chain

LOG_2 = np.log(2.0).item()  # plain numbers leave float32 as it is
BINS = 127.5  # how many values of 8-bit data fall into an interval of length 1


class BitsPerDim(NamedTuple):
    """The variational bound of each example, and its terms.

    Attributes:
        total: [b] bits/dim, the prior plus all of vlb.
        prior: [b] bits/dim, KL(q(x_T | x_0) || p(x_T)), see `prior_bpd`.
        vlb: [b, T] bits/dim: in column 0 the decoder, -log2 p(x_0 | x_1), in column t
            the KL term of step t.
        x_0_mse: [b, T] mean squared error of the predicted x_0.
        eps_mse: [b, T] mean squared error of the eps that the predicted x_0 implies.
    """

    total: Array
    prior: Array
    vlb: Array
    x_0_mse: Array
    eps_mse: Array


class OdeBits(NamedTuple):
    """The density of each example by the probability flow, and estimates of its error.

    That is bits/dim of `ode_bits_per_dim`, nats of `ode_log_prob`.

    Attributes:
        total: [b] -log2 p(x), or log p(x): the mean over probes.
        prior: [b] the part of the total that is of p(x_T).
        step_error: [b] how much the total changes with steps twice as long, about three
            times its own error; NaN if there is one step only.
        probe_error: [b] the standard error of the mean over probes; NaN if there is one
            probe only, 0 without probes.
    """

    total: Array
    prior: Array
    step_error: Array
    probe_error: Array


def prior_bpd(schedule: NoiseSchedule, x_0: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """KL(q(x_T | x_0) || p(x_T)), bits/dim [b]: the information on x_0 left in x_T.

    L_T of DDPM eq. 5. p(x_T) is what sampling starts from, see `samplers.pure_noise`.

    Args:
        schedule: its last row is x_T; rows added by `schedules.pad` do not count.
        x_0: data [b, ...].

    Raises:
        ValueError: unless schedule and x_0 are such.

    >>> from jax_diffusion import schedules
    >>> schedule = schedules.make_schedule(schedules.cosine_betas(10))
    >>> bool(prior_bpd(schedule, jnp.ones((1, 3)))[0] < 0.01)
    True
    """
    check_chain(schedule)
    checks.data("x_0", x_0, ("b", ...))
    last = jnp.sum(schedule.visited, dtype=jnp.int32) - 1
    last = jnp.broadcast_to(last, x_0.shape[:1])
    mean, log_var = diffusion.q_mean_log_var(schedule, x_0, last)
    start = jnp.full_like(mean, 2 * jnp.log(schedule.next.noise[-1]))
    kl = losses.normal_kl(mean, log_var, jnp.zeros_like(mean), start)
    return losses.mean_flat(kl) / LOG_2


def bits_per_dim(
    key: Key[Array, "*_"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
) -> BitsPerDim:
    """The variational bound on -log2 p(x_0) per dimension, with all of its T terms.

    DDPM eq. 5. Calls the denoiser T times in one scan, with new noise at each t, as
    `calc_bpd_loop` of improved-diffusion does.

    Args:
        key: one for the batch, or typed keys [b], one for each image
            (`samplers.image_keys`), which make a result independent of its batch.
        denoise_fn: the network as a denoiser; improved-diffusion clips it
            (`diffusion.clip_x_0`).
        schedule: the noise levels; terms of rows added by `schedules.pad` are zero.
        x_0: data [b, ...], uint8 / 127.5 - 1.

    Returns:
        BitsPerDim with arrays [b] and [b, T].

    Raises:
        ValueError: unless arguments fit each other, and x_0, where its values are
            known, is in [-1, 1]: the bins at both ends would count what lies beyond.
    """
    keys = _keys_of(key, denoise_fn, schedule, x_0)
    if checks.known(x_0) and x_0.size:
        largest = float(np.max(np.abs(np.asarray(jax.device_get(x_0), np.float64))))
        if not largest <= 1 + 1e-6:
            raise ValueError(f"x_0 must be in [-1, 1], got a value of {largest:.4g}.")
    dtype = jnp.result_type(x_0, jnp.float32)
    zeros = placement.beside(losses.mean_flat(jnp.zeros_like(x_0, dtype)), x_0)

    def terms_at(step):
        t = like_batch(step, x_0)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        eps = samplers.normal(step_keys, x_0.shape[1:])
        x_t = diffusion.q_sample(schedule, x_0, t, eps)
        prediction = denoise_fn(x_t, t)
        diffusion.check_prediction(prediction, x_t)
        vlb = losses.vlb_terms(schedule, prediction, x_0, x_t, t)
        eps_hat = diffusion.eps_from_x_0(schedule, x_t, t, prediction.x_0)
        x_0_mse = losses.mean_flat((prediction.x_0 - x_0) ** 2)
        terms = vlb, x_0_mse, losses.mean_flat((eps_hat - eps) ** 2)
        return tuple(term.astype(dtype) for term in terms)

    def term(_, step: Int[Array, ""]):  # zero in rows added by `schedules.pad`
        none = (zeros,) * 3
        visited = schedule.visited[step]
        return None, jax.lax.cond(visited, terms_at, lambda _: none, step)

    _, terms = jax.lax.scan(term, None, jnp.arange(schedule.num_steps))
    vlb, x_0_mse, eps_mse = (a.T for a in terms)
    prior = prior_bpd(schedule, x_0)
    return BitsPerDim(prior + vlb.sum(axis=1), prior, vlb, x_0_mse, eps_mse)


def progressive_coding(
    bpd: BitsPerDim,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Rate and distortion of progressive coding, step by step (DDPM sec. 4.3).

    A receiver of x_t has been sent the prior and the terms of all steps above t, and
    can show the x_0 predicted from x_t.

    Args:
        bpd: from `bits_per_dim`.

    Returns:
        rate [b, T] in bits/dim and distortion [b, T], the root mean squared error on
        the scale of 0 to 255. t ascends: column T - 1 has the lowest rate, column 0
        the lowest distortion.

    Raises:
        ValueError: unless bpd has such arrays.
    """
    if not isinstance(bpd, BitsPerDim):
        raise ValueError(f"bpd must be a BitsPerDim, got {checks.shown(bpd)}.")
    checks.array("bpd.vlb", bpd.vlb, "float", ("b", "T"))
    checks.array("bpd.prior", bpd.prior, "float", bpd.vlb.shape[:1])
    checks.array("bpd.x_0_mse", bpd.x_0_mse, "float", bpd.vlb.shape)
    above = jnp.cumsum(bpd.vlb[:, ::-1], axis=1)[:, ::-1] - bpd.vlb
    return bpd.prior[:, None] + above, 127.5 * jnp.sqrt(bpd.x_0_mse)


def dequantize(
    keys: Key[Array, "b"], x_0: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """Makes 8-bit data continuous: adds noise that is uniform in the bin of each value.

    On average over that noise, -log2 of the density (times the width of a bin) is an
    upper bound of -log2 of the bin's probability (Theis et al. 2016, sec. 3.1).

    Args:
        keys: typed keys [b], one for each image.
        x_0: data [b, ...], uint8 / 127.5 - 1.

    Returns:
        [b, ...], within half a bin, 1 / 255, of x_0.

    Raises:
        ValueError: unless x_0 is a float array with one key for each image.
    """
    checks.data("x_0", x_0, ("b", ...))
    checks.keys("keys", keys, x_0.shape[0])
    draw = functools.partial(jax.random.uniform, minval=-0.5, maxval=0.5)
    shape, dtype = x_0.shape[1:], jnp.float32
    return x_0 + jax.vmap(lambda key: draw(key, shape, dtype))(keys) / BINS


dequantise = dequantize  # its old name


def ode_bits_per_dim(
    key: Key[Array, "*_"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    *,
    probes: int = 1,
) -> OdeBits:
    """-log2 p(x) per dimension by the probability flow (Song et al. 2021, sec. 4.3).

    x is the dequantized x_0. Its density p is that of samples of the flow, which takes
    `samplers.pure_noise` from the noise level of the last row back to that of the first
    and then divides by the first row's signal.

    Heun's method integrates from row to row, with two evaluations of the network a
    step, so that the network sees its own timesteps only. Take rows that are dense
    where there is little noise (`spacing.angle_steps`). A second integration, over
    every second row, gives `OdeBits.step_error`: by Richardson's rule the difference is
    three times the error of the first one, if steps are short.

    Hutchinson's estimate of the trace is unbiased; its random signs are the same at all
    steps. Derivatives are in forward mode, which stores nothing, but the network must
    not have a `custom_vjp`.

    Args:
        key: one for the batch, or keys [b], see `bits_per_dim`.
        denoise_fn: not clipped: clipping is not smooth, and Heun's method would lose
            its second order.
        schedule: the noise levels; rows added by `schedules.pad` are skipped.
        x_0: data [b, ...], uint8 / 127.5 - 1.
        probes: how many vectors of signs to estimate the trace with, >= 1. Each costs
            as much as a forward pass.

    Raises:
        ValueError: if probes is no integer >= 1, or arguments do not fit each other.
    """
    checks.integer("probes", probes, at_least=1)
    keys = _keys_of(key, denoise_fn, schedule, x_0)
    x = dequantize(keys, x_0)  # with these keys, and probes with others
    return _integrate(denoise_fn, schedule, x, _signs(keys, x, probes), BINS)


def ode_log_prob(
    key: Key[Array, "*_"],
    denoise_fn: DenoiseFn,
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    *,
    probes: int | None = None,
    per_dim: bool = False,
) -> OdeBits:
    """log p(x_0) of any continuous data by the probability flow, without dequantizing.

    The density p (Song et al. 2021, score SDE, eq. 39) is that of samples, as in
    `ode_bits_per_dim`. Of an exact denoiser it is that of the data plus the Gaussian
    noise of the first row, of standard deviation noise / signal, which must be small
    beside the finest detail of the data. It treats x_T as `samplers.pure_noise`: signal
    that the last row still has makes it approximate.

    Args:
        key: one, or keys [b], as for `ode_bits_per_dim`; for the probes.
        denoise_fn, schedule: as there.
        x_0: float data [b, ...], of any scale.
        probes: how many vectors of signs to estimate the divergence with, >= 1; None
            for the exact one, at the cost of a forward pass for each dimension.
        per_dim: whether to divide by the number of dimensions.

    Raises:
        ValueError: if arguments do not fit each other, or known x_0 are not finite.
    """
    checks.integer("probes", 1 if probes is None else probes, at_least=1)
    checks.boolean("per_dim", per_dim)
    keys = _keys_of(key, denoise_fn, schedule, x_0)
    if checks.known(x_0) and not np.isfinite(np.asarray(jax.device_get(x_0))).all():
        raise ValueError("x_0 must be finite, got NaN or infinity.")
    x = jnp.asarray(x_0, jnp.result_type(x_0, jnp.float32))
    bits = _integrate(denoise_fn, schedule, x, _signs(keys, x, probes), 1.0)
    nats = LOG_2 * (1 if per_dim else math.prod(x.shape[1:]))
    total, prior, steps, error = (nats * a for a in bits)
    none = placement.beside(jnp.zeros_like(error), error)
    return OdeBits(-total, -prior, steps, error if probes else none)


def _signs(keys, x, probes):
    """Random signs for Hutchinson's estimate of a trace, [probes, b, ...]."""
    if probes is None:  # with all unit vectors, root(d) long, it is exact
        d = math.prod(x.shape[1:])
        units = np.sqrt(d).item() * jnp.eye(d, dtype=x.dtype)
        return units.reshape(d, 1, *x.shape[1:]) * jnp.ones_like(x)[None]
    half, shape = jnp.float32(0.5), x.shape[1:]
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, half, shape))
    heads = [draw(samplers.fold_in(keys, 1 + i)) for i in range(probes)]
    heads = jnp.stack([placement.beside(head, x) for head in heads])
    return 2 * heads.astype(x.dtype) - 1


def _integrate(denoise_fn, schedule, x, signs, bins):
    """OdeBits of continuous x, of which `bins` make an interval of length 1."""
    flow = functools.partial(_flow, denoise_fn, schedule, x, signs)

    def bits(stride):
        x_T, volume = flow(stride)
        start, log_2_pi = schedule.next.noise[-1], np.log(2 * np.pi).item()
        squares = losses.mean_flat((x_T / start) ** 2)
        prior = (squares + log_2_pi) / (2 * LOG_2) + jnp.log2(start)
        growth = volume / LOG_2 - np.log2(bins).item()
        return prior, prior[None] - growth

    # A map, so that the network is compiled once for both lengths of step.
    prior, total = jax.lax.map(bits, jnp.arange(1, 3, dtype=jnp.int32))
    fine, coarse = jnp.mean(total, axis=1)
    two_steps = jnp.sum(schedule.visited, dtype=jnp.int32) > 2
    step_error = jnp.where(two_steps, jnp.abs(fine - coarse), jnp.nan)
    probe_error = jnp.std(total[0], axis=0, ddof=1) / np.sqrt(len(signs)).item()
    return OdeBits(fine, prior[0], step_error, probe_error)


def _keys_of(key, denoise_fn, schedule, x_0):
    """One key for each image, once the arguments of a likelihood fit each other."""
    diffusion.check_denoise_fn(denoise_fn)
    check_chain(schedule)
    diffusion.check_schedule_of(denoise_fn, schedule)
    checks.data("x_0", x_0, ("b", ...))
    if np.ndim(key):
        checks.keys("key", key, x_0.shape[0])
        return key
    return samplers.image_keys(key, jnp.arange(x_0.shape[0]))


def _flow(denoise_fn, schedule, x, signs, stride):
    """Integrates the flow from the first row to the last, over every `stride`-th row.

    Clean x gets the signal of the first row. Returns x at the last one, [b, ...], and
    by how much volume has grown from x to there, the log of it for each probe, in
    nats/dim: [probes, b].
    """
    signal, noise, _ = schedule.now
    scale = jnp.hypot(signal, noise)
    angle = jnp.arctan2(noise, signal)
    last = jnp.sum(schedule.visited, dtype=jnp.int32) - 1

    def velocity(x, row):
        t = like_batch(row, x)

        def v(x):
            x_t = (scale[row] * x).astype(x.dtype)
            prediction = denoise_fn(x_t, t)
            diffusion.check_prediction(prediction, x_t)
            x_0 = diffusion.guided_x_0(schedule, prediction, t)
            slope = (signal[row] * x - scale[row] * x_0) / noise[row]
            return slope.astype(x.dtype)

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

    first = signal[0] / scale[0]
    start = jnp.full(x.shape[0], jnp.log(first), x.dtype)
    volume = jax.vmap(lambda _: placement.beside(start, x))(signs)
    state = (first * x).astype(x.dtype), volume
    (x, volume), _ = jax.lax.scan(one, state, jnp.arange(schedule.num_steps - 1))
    return scale[last] * x, volume + jnp.log(scale[last])
