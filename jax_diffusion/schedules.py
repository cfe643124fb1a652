"""Noise schedules: variances in float64 on the host, tabulated once as float32.

A function of `BETAS` makes the variances, a function of `spacing` may choose some of
the steps, and `make_schedule` turns both into the table that the rest of the package
reads.

Timesteps count from 0: t = 0 is one step of noise, "t = 1" in the DDPM paper.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from jax_diffusion.spacing import (  # noqa: F401, so that they can be found here
    angle_steps,
    karras_steps,
    log_snr_steps,
    quadratic_steps,
    spaced_steps,
    trailing_steps,
    uniform_steps,
)

Table = Any  # jax.Array; np.ndarray in float64 before the cast


class Level(NamedTuple):
    """A noise level: x = signal * x_0 + noise * eps."""

    signal: Table  # sqrt(alpha_bar)
    noise: Table  # sqrt(1 - alpha_bar)
    log_snr: Table  # log(alpha_bar / (1 - alpha_bar)), +-inf at the ends


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Coefficients of a discrete Gaussian diffusion, one row per timestep.

    Every leaf is float32 of shape [T], or [b, 1, ...] after `take`. `make_schedule`
    computes them in float64 on the host: formed in float32, `1 - alpha_bar[0]` is wrong
    in the fourth digit already.
    """

    betas: Table  # variance of q(x_t | x_{t-1})
    now: Level  # of x_t
    prev: Level  # of x_{t-1}; at t = 0 the clean image: signal 1, noise 0
    next: Level  # of x_{t+1}; at t = T - 1 pure noise: signal 0, noise 1
    posterior_x_0: Table  # q(x_{t-1} | x_t, x_0) has mean
    posterior_x_t: Table  #   posterior_x_0 * x_0 + posterior_x_t * x_t  (DDPM eq. 7)
    posterior_log_var: Table  # and this variance; row 0 repeats row 1, being -inf
    timesteps: Table  # what the network is told; -1 in rows added by `pad`

    @property
    def num_steps(self) -> int:
        """T, the number of rows."""
        return self.betas.shape[0]

    @property
    def visited(self) -> Table:
        """Which rows are steps of the diffusion, and not added by `pad`: bool [T]."""
        return self.timesteps >= 0

    @property
    def steps(self) -> Array:
        """Numbers of the rows, int32 [T]; -1 of those added by `pad`."""
        rows = jnp.arange(self.num_steps, dtype=jnp.int32)
        return jnp.where(self.visited, rows, -1)


def linear_betas(
    num_steps: int, *, start: float = 1e-4, end: float = 0.02, rescale: bool = True
) -> np.ndarray:
    """Variances that grow linearly (Ho et al. 2020, sec. 4).

    Args:
        start, end: first and last variance, meant for T = 1000.
        rescale: multiply both by 1000 / T, so that the last image is noise whatever T
            (improved-diffusion). Off: the numbers as they stand (Ho et al., DDIM).

    Raises:
        ValueError: if rescaling takes a variance above 1, which happens below T = 20.
    """
    _check_length(num_steps)
    scale = 1000 / num_steps if rescale else 1.0
    if scale * max(start, end) > 1:
        raise ValueError(
            f"linear betas times 1000 / {num_steps} must not exceed 1, got "
            f"{scale * max(start, end):.4g}; take more steps or rescale=False."
        )
    return np.linspace(scale * start, scale * end, num_steps, dtype=np.float64)


def quadratic_betas(
    num_steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
    """Variances whose square roots grow linearly ("quad" of Ho et al. and DDIM)."""
    return np.linspace(start**0.5, end**0.5, num_steps, dtype=np.float64) ** 2


def cosine_betas(
    num_steps: int,
    *,
    offset: float = 0.008,
    min_beta: float = 0.0,
    max_beta: float = 0.999,
) -> np.ndarray:
    """Variances whose alpha_bar is a squared cosine (Nichol & Dhariwal 2021, eq. 17).

        alpha_bar(u) = cos((u + offset) / (1 + offset) * pi / 2)^2,   u = t / T

    Args:
        offset: keeps the first betas from vanishing.
        min_beta: floor; the annotated DDPM has 1e-4, the paper none.
        max_beta: cap, reached only near u = 1 where alpha_bar goes to zero.

    >>> cosine_betas(4).round(3)
    array([0.153, 0.417, 0.708, 0.999])
    """

    def alpha_bar(u):
        return np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2

    betas = betas_from_alpha_bar(alpha_bar, num_steps, max_beta=max_beta)
    return np.maximum(betas, min_beta)


def sigmoid_betas(
    num_steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
    """Variances that are a sigmoid of u in [-6, 6] (DDIM code, annotated DDPM)."""
    return start + (end - start) * _sigmoid(np.linspace(-6, 6, num_steps))


def sigmoid_alpha_bar_betas(
    num_steps: int,
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> np.ndarray:
    """Variances whose alpha_bar is a piece of a sigmoid of temperature tau, from
    `start` to `end`, made to fall from 1 to 0 (Jabri et al. 2022; lucidrains).
    """
    first, last = _sigmoid(start / tau), _sigmoid(end / tau)

    def alpha_bar(u):
        return (last - _sigmoid((u * (end - start) + start) / tau)) / (last - first)

    return betas_from_alpha_bar(alpha_bar, num_steps, max_beta=max_beta)


def constant_betas(num_steps: int, *, value: float = 0.02) -> np.ndarray:
    """The same variance at every step ("const" of Ho et al.)."""
    return np.full(num_steps, value, np.float64)


def warmup_betas(
    num_steps: int, *, fraction: float = 0.1, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
    """Linear over a fraction of the steps, then constant (Ho et al., 0.1 and 0.5)."""
    betas = np.full(num_steps, end, np.float64)
    num_warmup = int(num_steps * fraction)
    betas[:num_warmup] = np.linspace(start, end, num_warmup, dtype=np.float64)
    return betas


def jsd_betas(num_steps: int) -> np.ndarray:
    """1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015): predict v or x_0, not eps."""
    return 1.0 / np.linspace(num_steps, 1, num_steps, dtype=np.float64)


def given_betas(num_steps: int, *, betas: Any) -> np.ndarray:
    """Variances as they stand, as somebody else's checkpoint has them."""
    if len(betas) != num_steps:
        raise ValueError(f"there must be {num_steps} betas, got {len(betas)}.")
    return np.asarray(betas, np.float64)


def betas_from_alpha_bar(
    alpha_bar_fn: Callable[[np.ndarray], np.ndarray],
    num_steps: int,
    *,
    max_beta: float = 0.999,
) -> np.ndarray:
    """Variances of alpha_bar(u), u in [0, 1], which need not be 1 at u = 0."""
    _check_length(num_steps)
    alpha_bar = alpha_bar_fn(np.arange(num_steps + 1) / num_steps)
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(alpha_bar) to end in 0 exactly (Lin et al. 2023, alg. 1).

    The last beta becomes 1, where a network must predict v or x_0, not eps.
    """
    _check_length(len(betas))
    signal = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alpha_bar = signal**2
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


BETAS: dict[str, Callable[..., np.ndarray]] = {
    "linear": linear_betas,
    "quadratic": quadratic_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "sigmoid_alpha_bar": sigmoid_alpha_bar_betas,
    "constant": constant_betas,
    "warmup": warmup_betas,
    "jsd": jsd_betas,
    "given": given_betas,
}


def make_schedule(
    betas: np.ndarray,
    *,
    keep: Sequence[int] | np.ndarray | None = None,
    rescale_timesteps: bool = False,
) -> NoiseSchedule:
    """Tabulates a diffusion from its variances, optionally on a subset of its steps.

    With `keep`, the result is the shorter diffusion whose marginals q(x_t | x_0) are
    those of the kept steps (Nichol & Dhariwal 2021, sec. 4); its `timesteps` still name
    the original ones. Its posterior and variances are those of the shorter chain.

    Args:
        betas: float64 [T], T >= 2, each in (0, 1), the last one perhaps 1.
        keep: increasing indices into [0, T); default all of them.
        rescale_timesteps: tell the network t * 1000 / T instead of t.

    Raises:
        ValueError: if a beta or an index is out of range.
    """
    table = tabulate(betas, keep=keep, rescale_timesteps=rescale_timesteps)
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), table)


def tabulate(
    betas: np.ndarray,
    *,
    keep: Sequence[int] | np.ndarray | None = None,
    rescale_timesteps: bool = False,
) -> NoiseSchedule:
    """`make_schedule` before the cast: NumPy arrays of float64."""
    betas = np.asarray(betas, np.float64)
    wrong = betas[~((betas > 0) & (betas <= 1))]
    if betas.ndim != 1 or wrong.size:
        got = f"shape {betas.shape}" if betas.ndim != 1 else f"{wrong[0]}"
        raise ValueError(f"betas must be a vector of values in (0, 1], got {got}.")
    _check_length(len(betas))
    if np.any(betas[:-1] == 1):
        first = np.argmax(betas)
        raise ValueError(f"no beta but the last may be 1, got it at t = {first}.")
    scale = 1000 / len(betas) if rescale_timesteps else 1.0
    timesteps = _checked_steps(len(betas), keep)
    if keep is not None:
        alpha_bar = np.cumprod(1 - betas)[timesteps]
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])

    now = np.cumprod(1 - betas)  # alpha_bar of x_t
    prev, next_ = np.append(1.0, now[:-1]), np.append(now[1:], 0.0)

    def level(alpha_bar):
        log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
        return Level(np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), log_snr)

    posterior_var = betas * (1 - prev) / (1 - now)
    # Row 0 is zero, its log -inf; a chain of one step has only beta to put there.
    posterior_var[0] = posterior_var[1] if len(betas) > 1 else betas[0]
    with np.errstate(divide="ignore"):  # the infinities at both ends are meant
        return NoiseSchedule(
            betas=betas,
            now=level(now),
            prev=level(prev),
            next=level(next_),
            posterior_x_0=betas * np.sqrt(prev) / (1 - now),
            posterior_x_t=(1 - prev) * np.sqrt(1 - betas) / (1 - now),
            posterior_log_var=np.log(posterior_var),
            timesteps=timesteps * scale,
        )


def _check_length(num_steps: int) -> None:
    if num_steps < 2:
        raise ValueError(f"a diffusion needs at least 2 steps, got {num_steps}.")


def _checked_steps(num_steps: int, keep: Any) -> np.ndarray:
    every = np.arange(num_steps)
    kept = every if keep is None else np.asarray(keep)
    if kept.ndim != 1 or not len(kept) or not np.isin(kept, every).all():
        raise ValueError(f"keep must be steps within [0, {num_steps}), got {keep}.")
    if not np.all(np.diff(kept) > 0):
        raise ValueError(f"keep must increase, got {keep}.")
    return kept.astype(int)


def pad(schedule: NoiseSchedule, length: int) -> NoiseSchedule:
    """Adds rows that no step visits, so that every schedule has the same shape.

    Samplers and `likelihood` skip the added rows, whose `timesteps` are -1. One
    compiled sampler then serves every number of steps up to `length`, at least T.
    """
    extra = length - schedule.num_steps
    if extra < 0:
        raise ValueError(f"length must be >= {schedule.num_steps} steps, got {length}.")
    padded = jax.tree.map(lambda a: jnp.pad(a, (0, extra), mode="edge"), schedule)
    unvisited = jnp.arange(length) >= schedule.num_steps
    return dataclasses.replace(
        padded, timesteps=jnp.where(unvisited, -1.0, padded.timesteps)
    )


def take(schedule: NoiseSchedule, t: Int[Array, "b"], ndim: int) -> NoiseSchedule:
    """Rows `t` of every coefficient, as [b, 1, ..., 1] to act on rank-`ndim` data."""
    shape = t.shape + (1,) * (ndim - 1)
    take_rows = functools.partial(jnp.take, indices=t, axis=0, mode="clip")
    return jax.tree.map(lambda a: take_rows(a).reshape(shape), schedule)


def check_step(schedule: NoiseSchedule, t: int | Int[Array, ""]) -> None:
    """Raises ValueError if t, where it has a value, is no step of the schedule."""
    if isinstance(t, Tracer):
        return
    num_steps = schedule.num_steps
    if not isinstance(schedule.timesteps, Tracer):  # else nothing tells added rows
        num_steps = int(np.sum(np.asarray(schedule.visited)))
    if not 0 <= t < num_steps:
        raise ValueError(f"t must be in [0, {num_steps}), got {t}.")


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
