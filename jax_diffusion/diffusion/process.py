"""The forward process, its posterior, conversions between x_0, eps, v, flow and mu."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_diffusion.schedules import NoiseSchedule, check_batch, check_chain, take


def q_sample(
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    t: Int[Array, "b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """Noises x_0 to level t: x_t = signal x_0 + noise eps (DDPM eq. 4).

    Args:
        schedule: where signal and noise of row t stand.
        x_0: data [b, ...].
        t: int32 [b].
        eps: standard normal noise, [b, ...].

    Returns:
        x_t [b, ...], a draw from q(x_t | x_0).

    Raises:
        ValueError: unless schedule, data and t fit each other.

    >>> from jax_diffusion.schedules import cosine_betas, make_schedule
    >>> schedule, x_0 = make_schedule(cosine_betas(10)), jnp.ones((2, 3))
    >>> q_sample(schedule, x_0, jnp.array([0, 9]), eps=jnp.zeros((2, 3))).shape
    (2, 3)
    """
    check_batch(schedule, t, x_0=x_0, eps=eps)
    level = take(schedule, t, x_0.ndim).now
    return level.signal * x_0 + level.noise * eps


def q_mean_log_var(
    schedule: NoiseSchedule, x_0: Float[Array, "b *d"], t: Int[Array, "b"]
) -> tuple[Float[Array, "b *d"], Float[Array, "b *_"]]:
    """Mean and log variance of q(x_t | x_0) (DDPM eq. 4).

    Args:
        schedule: where signal and noise of row t stand.
        x_0: data [b, ...].
        t: int32 [b].

    Returns:
        The mean [b, ...] and the log variance [b, 1, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_0=x_0)
    level = take(schedule, t, x_0.ndim).now
    return level.signal * x_0, 2 * jnp.log(level.noise)


def q_posterior(
    schedule: NoiseSchedule,
    x_0: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
) -> tuple[Float[Array, "b *d"], Float[Array, "b *_"]]:
    """Mean and log variance of the posterior q(x_{t-1} | x_t, x_0) (DDPM eq. 6, 7).

    At t = 0 the mean is x_0 and the true variance 0; the log variance returned is that
    of t = 1, as in the official code.

    Args:
        schedule: where the coefficients of row t stand.
        x_0, x_t: clean and noisy data [b, ...].
        t: int32 [b].

    Returns:
        The mean [b, ...] and the log variance [b, 1, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_chain(schedule)
    check_batch(schedule, t, x_0=x_0, x_t=x_t)
    c = take(schedule, t, x_t.ndim)
    return c.posterior_x_0 * x_0 + c.posterior_x_t * x_t, c.posterior_log_var


def x_0_from_eps(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x_0 = (x_t - noise eps) / signal (DDPM eq. 15).

    Not finite where the signal is zero.

    Args:
        schedule: where signal and noise of row t stand.
        x_t, eps: noisy data and its noise [b, ...].
        t: int32 [b].

    Returns:
        x_0 [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, eps=eps)
    level = take(schedule, t, x_t.ndim).now
    return (x_t - level.noise * eps) / level.signal


def x_0_from_v(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    v: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x_0 = signal x_t - noise v, where signal^2 + noise^2 = 1.

    v is that of Salimans & Ho 2022, app. D.

    Args:
        schedule: where signal and noise of row t stand.
        x_t, v: noisy data and its v [b, ...].
        t: int32 [b].

    Returns:
        x_0 [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, v=v)
    level = take(schedule, t, x_t.ndim).now
    return level.signal * x_t - level.noise * v


def x_0_from_flow(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    flow: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """x_0 = (x_t - noise flow) / (signal + noise).

    flow is eps - x_0, the velocity of a rectified flow (Liu et al. 2023).

    Args:
        schedule: where signal and noise of row t stand.
        x_t, flow: noisy data and its flow [b, ...].
        t: int32 [b].

    Returns:
        x_0 [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, flow=flow)
    level = take(schedule, t, x_t.ndim).now
    return (x_t - level.noise * flow) / (level.signal + level.noise)


def x_0_from_mu(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    mu: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """The x_0 for which q(x_{t-1} | x_t, x_0) has mean mu (DDPM eq. 7).

    Args:
        schedule: where the coefficients of row t stand.
        x_t, mu: noisy data and the mean [b, ...].
        t: int32 [b].

    Returns:
        x_0 [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, mu=mu)
    c = take(schedule, t, x_t.ndim)
    return (mu - c.posterior_x_t * x_t) / c.posterior_x_0


def eps_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """eps = (x_t - signal x_0) / noise: DDPM eq. 4, solved for eps.

    Args:
        schedule: where signal and noise of row t stand.
        x_t, x_0: noisy and clean data [b, ...].
        t: int32 [b].

    Returns:
        eps [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, x_0=x_0)
    level = take(schedule, t, x_t.ndim).now
    return (x_t - level.signal * x_0) / level.noise


def v_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """v = signal eps - noise x_0, where signal^2 + noise^2 = 1.

    eps is the one that x_t and x_0 imply (Salimans & Ho 2022, app. D).

    Args:
        schedule: where signal and noise of row t stand.
        x_t, x_0: noisy and clean data [b, ...].
        t: int32 [b].

    Returns:
        v [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, x_0=x_0)
    level = take(schedule, t, x_t.ndim).now
    return (level.signal * x_t - x_0) / level.noise


def flow_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """flow = eps - x_0, the velocity of a rectified flow (Liu et al. 2023).

    eps is the one that x_t and x_0 imply.

    Args:
        schedule: where signal and noise of row t stand.
        x_t, x_0: noisy and clean data [b, ...].
        t: int32 [b].

    Returns:
        flow [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, x_0=x_0)
    level = take(schedule, t, x_t.ndim).now
    return (x_t - (level.signal + level.noise) * x_0) / level.noise


def score_from_x_0(
    schedule: NoiseSchedule,
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    x_0: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """The score, grad log q(x_t | x_0) by x_t, which is -eps / noise (Vincent 2011).

    eps is the one that x_t and x_0 imply.

    Args:
        schedule: where signal and noise of row t stand.
        x_t, x_0: noisy and clean data [b, ...].
        t: int32 [b].

    Returns:
        The score [b, ...].

    Raises:
        ValueError: unless schedule, data and t fit each other.
    """
    check_batch(schedule, t, x_t=x_t, x_0=x_0)
    level = take(schedule, t, x_t.ndim).now
    return -eps_from_x_0(schedule, x_t, t, x_0) / level.noise
