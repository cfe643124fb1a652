"""EDM's preconditioning: a network that sees and returns values of unit variance."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_diffusion import checks
from jax_diffusion.diffusion.same_schedule import check_raw
from jax_diffusion.schedules import NoiseSchedule, check_schedule, take


def precondition(
    model_fn: Callable[..., Array], schedule: NoiseSchedule, sigma_data: float = 0.5
) -> Callable[..., Array]:
    """Wraps a raw network F: the result predicts x_0 (Karras et al. 2022, table 1).

        x_0 = c_skip x_t + c_out F(c_in x_t, timesteps)

    For data of standard deviation sigma_data, the network's input and its best output
    have variance 1 at every level; c_skip is the best x_0 linear in x_t. On EDM's
    levels, signal 1, these are the paper's factors. Use it with mean_type "x_0" and the
    weighting "edm", which makes the loss of F a plain mean squared error.

    Args:
        model_fn: model_fn(x, timesteps, **conditioning) -> [b, ..., c], or 2 c channels
            if it learns its variance; the second half is returned as it is.
        schedule: whose levels x_t are at. A level is known by what the network is told
            of it, so that `timesteps` must differ from level to level.
        sigma_data: standard deviation of the data, > 0.

    Returns:
        A network of the same signature that predicts x_0.

    Raises:
        ValueError: if two levels of the schedule have one timestep, if sigma_data is
            not > 0, or as `check_end` says.

    >>> from jax_diffusion.schedules import edm_levels, from_levels
    >>> schedule = from_levels(*edm_levels(10))
    >>> model_fn = precondition(lambda x, t: 0 * x, schedule)
    >>> model_fn(jnp.ones((2, 3)), schedule.timesteps[jnp.array([0, 9])]).round(3)[:, 0]
    Array([1., 0.], dtype=float32)
    """
    check_raw(model_fn)
    check_schedule(schedule)
    checks.number("sigma_data", sigma_data, above=0)
    if all(map(checks.known, (*schedule.now, schedule.timesteps, schedule.mask))):
        visited = np.asarray(schedule.mask) > 0  # NumPy: jnp would be traced in jit
        columns = schedule.timesteps, *schedule.now[:2]
        rows = np.stack([np.asarray(a)[visited] for a in columns])
        if len(np.unique(rows[0])) < np.unique(rows, axis=1).shape[1]:
            raise ValueError(
                "schedule must tell a network other timesteps at every level."
            )
        check_end(schedule, sigma_data)

    def preconditioned(x_t, timesteps, **conditioning):
        checks.data("x_t", x_t, ("b", ...))
        axes = x_t.shape[:1] if jnp.ndim(timesteps) else ()  # none within jax.vmap
        checks.array("timesteps", timesteps, "float", axes)
        told = jnp.where(schedule.visited, schedule.timesteps, jnp.inf)
        told = jnp.expand_dims(told, tuple(range(jnp.ndim(timesteps))))
        rows = jnp.argmin(jnp.abs(told - timesteps[..., None]), axis=-1)
        level = take(schedule, rows.astype(jnp.int32), x_t.ndim).now
        var = (level.signal * sigma_data) ** 2 + level.noise**2  # of x_t
        output = model_fn(x_t / jnp.sqrt(var), timesteps, **conditioning)
        checks.array("model_fn's output", output, "float", (*x_t.shape[:-1], "c"))
        raw, rest = output[..., : x_t.shape[-1]], output[..., x_t.shape[-1] :]
        x_0 = level.signal * sigma_data**2 / var * x_t
        x_0 = x_0 + level.noise * sigma_data / jnp.sqrt(var) * raw
        return jnp.concatenate([x_0, rest], axis=-1) if rest.shape[-1] else x_0

    return preconditioned


def check_end(schedule: NoiseSchedule, sigma_data: float) -> None:
    """Raises ValueError unless sampling starts from more noise than data.

    Args:
        schedule: of known numbers.
        sigma_data: standard deviation of the data.
    """
    last = np.flatnonzero(np.asarray(schedule.mask) > 0)[-1]
    signal, noise = (np.asarray(a)[last].item() for a in schedule.now[:2])
    if not sigma_data * signal < noise:
        raise ValueError(
            "schedule must end in more noise than data, noise / signal above sigma_data"
            f" = {sigma_data}, got {noise / signal:.4g}."
        )
