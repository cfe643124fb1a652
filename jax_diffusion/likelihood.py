"""How many bits a diffusion needs for an image: the discrete bound and its parts.

    bits/dim = prior + sum_t vlb[t],  vlb[0] the decoder, vlb[t > 0] the KL terms

This is the negative log likelihood bound of DDPM eq. 5 for 8-bit data, summed over all
timesteps, none skipped or sampled. Terms are in ascending order of t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jax_diffusion import diffusion, losses, samplers
from jax_diffusion.diffusion import DenoiseFn
from jax_diffusion.schedules import NoiseSchedule


class BitsPerDim(NamedTuple):
    """The bound of each example and what it is made of."""

    total: Array  # [b] bits/dim: prior plus all of vlb
    prior: Array  # [b] bits/dim: KL(q(x_T | x_0) || N(0, I))
    vlb: Array  # [b, T] bits/dim; column 0 is the decoder's
    x_0_mse: Array  # [b, T] mean squared error of the predicted x_0
    eps_mse: Array  # [b, T] mean squared error of the eps that this x_0 implies


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
