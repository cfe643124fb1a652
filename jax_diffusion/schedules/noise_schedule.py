"""The table of a diffusion's coefficients: NoiseSchedule, make_schedule, pad, take."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_diffusion import checks
from jax_diffusion.checks import placement
from jax_diffusion.schedules.betas import check_betas

if TYPE_CHECKING:
    Table = Array
else:  # jax fills pytrees with other things at times, which no type names
    Table = Any
"""One coefficient of every row: a jax.Array; from `tabulate` an np.ndarray."""


class Level(NamedTuple):
    """A noise level: x = signal * x_0 + noise * eps.

    Attributes:
        signal: the factor of clean data, >= 0: sqrt(alpha_bar) of a chain of betas, 1
            in EDM, 1 - s in a flow.
        noise: the factor of standard normal noise, >= 0: sqrt(1 - alpha_bar) of a chain
            of betas, sigma in EDM, s in a flow.
        log_snr: log(signal^2 / noise^2), the natural logarithm; inf for clean data and
            -inf for pure noise.
    """

    signal: Table
    noise: Table
    log_snr: Table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Coefficients of a Gaussian process at discrete levels, one row per timestep.

    Every coefficient is float32 of shape [T], or [b, 1, ...] after `take`. They are
    computed in float64 on the host: computed in float32, `1 - alpha_bar[0]` is wrong in
    the fourth digit already. `make_schedule` computes them from the variances of a
    chain, `from_levels` from any levels: EDM's, or those of a flow.

    Attributes:
        betas: variance of q(x_t | x_{t-1}), > 0; at most 1 in a chain of betas.
        now: the noise level of x_t.
        prev: the noise level of x_{t-1}; in row 0 that of clean data, signal 1 and
            noise 0.
        next: the noise level of x_{t+1}; in row T - 1 pure noise, from which sampling
            starts: signal 0, and noise 1 if that row preserves variance, else its own.
        posterior_x_0: factor of x_0 in the mean of q(x_{t-1} | x_t, x_0), which is
            posterior_x_0 * x_0 + posterior_x_t * x_t (DDPM eq. 7).
        posterior_x_t: factor of x_t in that mean.
        posterior_log_var: log variance of q(x_{t-1} | x_t, x_0), in nats; row 0, where
            it would be -inf, repeats row 1.
        timesteps: what the network is told: the step's number in the full diffusion,
            perhaps rescaled, or any function of the level; -1 in rows that `pad` adds.
        mask: 1 in steps of the diffusion, 0 in rows that `pad` has added; None after
            `take`.
    """

    betas: Table
    now: Level
    prev: Level
    next: Level
    posterior_x_0: Table
    posterior_x_t: Table
    posterior_log_var: Table
    timesteps: Table
    mask: Table

    @property
    def num_steps(self) -> int:
        """T, the number of rows, including those that `pad` has added."""
        return self.betas.shape[0]

    @property
    def visited(self) -> Table:
        """Bool [T]: True in steps of the diffusion, False in rows added by `pad`."""
        return self.mask > 0

    @property
    def steps(self) -> Array:
        """Int32 [T]: the number of each row, -1 in rows added by `pad`."""
        rows = jnp.arange(self.num_steps, dtype=jnp.int32)
        return jnp.where(self.visited, rows, -1)


P = ParamSpec("P")


def in_float32(tabulate: Callable[P, NoiseSchedule]):
    """Casts the table that a function makes in float64, on the host, for JAX.

    The attribute `__wrapped__` of the result, `tabulate`, is the exact function.
    """

    @functools.wraps(tabulate)
    def make(*args: P.args, **options: P.kwargs) -> NoiseSchedule:
        table = tabulate(*args, **options)
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), table)

    return make


@in_float32
def make_schedule(
    betas: np.ndarray,
    *,
    keep: Sequence[int] | np.ndarray | None = None,
    rescale_timesteps: bool = False,
) -> NoiseSchedule:
    """Tabulates a diffusion from its variances, optionally on a subset of its steps.

    With `keep`, the result is the shorter diffusion whose marginals q(x_t | x_0) are
    those of the kept steps (Nichol & Dhariwal 2021, sec. 4). Its posterior and its
    variances are those of the shorter chain; its `timesteps` are the original ones.

    Args:
        betas: float64 [T], T >= 2, each in (0, 1); the last one may be 1.
        keep: increasing int [n] in [0, T), such as `spaced_steps` makes; default all.
        rescale_timesteps: whether to tell the network t * 1000 / T instead of t.

    Returns:
        NoiseSchedule of float32 arrays, [T] or [len(keep)].

    Raises:
        ValueError: if a beta or an index is out of range, or a coefficient is not
            finite in float32.

    >>> from jax_diffusion.schedules import linear_betas
    >>> schedule = make_schedule(linear_betas(1000), keep=[0, 500, 999])
    >>> schedule.num_steps, schedule.timesteps.tolist()
    (3, [0.0, 500.0, 999.0])
    """
    betas = check_betas(betas)
    if np.any(betas[:-1] == 1):
        first = np.argmax(betas)
        raise ValueError(f"no beta but the last may be 1, got it at t = {first}.")
    checks.boolean("rescale_timesteps", rescale_timesteps)
    scale = 1000 / len(betas) if rescale_timesteps else 1.0
    timesteps = np.arange(len(betas))
    if keep is not None:
        timesteps = steps_to_keep(keep, len(betas))
        alpha_bar = np.cumprod(1 - betas)[timesteps]
        betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])

    alpha_bar = np.cumprod(1 - betas)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
    ratio, told = np.sqrt(1 - betas), timesteps * scale
    table = table_of_squares(alpha_bar, 1 - alpha_bar, log_snr, ratio, betas, told)
    check_finite(table, "betas", betas)
    return table


tabulate = make_schedule.__wrapped__
"""`make_schedule` without the cast: a NoiseSchedule of NumPy arrays, float64 [T]."""


def table_of_squares(
    signal_sq: np.ndarray,
    noise_sq: np.ndarray,
    log_snr: np.ndarray,
    ratio: np.ndarray,
    betas: np.ndarray,
    timesteps: np.ndarray,
) -> NoiseSchedule:
    """Tabulates the coefficients of any Gaussian process, float64 [T] on the host.

    q(x_t | x_{t-1}) = N(ratio x_{t-1}, betas); its posterior is that of two Gaussians.
    The last row of `next`, and `prev` in row 0, are what `NoiseSchedule` says.

    Args:
        signal_sq, noise_sq: [T], squares of the levels' signal and noise.
        log_snr: [T], log(signal_sq / noise_sq).
        ratio: [T], signal of x_t over that of x_{t-1}.
        betas: [T], noise_sq of x_t, less ratio^2 times that of x_{t-1}.
        timesteps: [T], what the network is told.
    """
    # Made to hold arrays of JAX, by their types.
    make, level = cast(Any, NoiseSchedule), cast(Any, Level)
    now = np.sqrt(signal_sq), np.sqrt(noise_sq), log_snr
    start = 1.0 if np.isclose(np.hypot(*now[:2])[-1], 1, 0, 1e-6) else now[1][-1]
    clean, pure = (1.0, 0.0, np.inf), (0.0, start, -np.inf)
    prev = level(*(np.append(c, a[:-1]) for a, c in zip(now, clean, strict=True)))
    prev_noise_sq = np.append(0.0, noise_sq[:-1])

    # The infinities at both ends are meant; others are told by `check_finite`.
    with np.errstate(divide="ignore", invalid="ignore"):
        posterior_var = betas * prev_noise_sq / noise_sq
        # Row 0 is zero, its log -inf; a chain of one step has only beta to put there.
        posterior_var[0] = posterior_var[1] if len(betas) > 1 else betas[0]
        return make(
            betas=betas,
            now=level(*now),
            prev=prev,
            next=level(*(np.append(a[1:], c) for a, c in zip(now, pure, strict=True))),
            posterior_x_0=betas * prev.signal / noise_sq,
            posterior_x_t=prev_noise_sq * ratio / noise_sq,
            posterior_log_var=np.log(posterior_var),
            timesteps=timesteps,
            mask=np.ones(len(betas)),
        )


def steps_to_keep(keep: Any, num_steps: int) -> np.ndarray:
    """Returns `keep` as increasing int [n].

    Raises:
        ValueError: unless these are some of the steps 0 to `num_steps` - 1, in order.
    """
    found, got = np.zeros((0, 0)), checks.shown(keep)
    if checks.known(keep) and not isinstance(keep, str):
        with contextlib.suppress(TypeError, ValueError):  # if ragged
            found = np.asarray(keep)
            got = checks.shown(found.tolist() if found.ndim == 1 else keep)
    within = found.ndim == 1 and len(found) and found.dtype.kind in "iuf"
    if not within or not np.isin(found, np.arange(num_steps)).all():
        raise ValueError(f"keep must be steps within [0, {num_steps}), got {got}.")
    if not np.all(np.diff(found) > 0):
        raise ValueError(f"keep must increase, got {got}.")
    return found.astype(int)


def check_finite(table: NoiseSchedule, name: str, *given: Any) -> None:
    """Raises ValueError unless float32 holds every coefficient of a `table`.

    `name` is what the error calls the source, whose columns are `given`. Infinite
    log-SNRs are meant of clean data, before row 0, and of pure noise, after the last
    row or in it.
    """
    meant = {"prev": ([0], np.inf), "now": ([-1], -np.inf), "next": ([-2, -1], -np.inf)}
    for field in dataclasses.fields(table):
        columns = getattr(table, field.name)
        for column in columns if isinstance(columns, Level) else [columns]:
            with np.errstate(over="ignore"):
                finite = np.isfinite(column.astype(np.float32))
            if isinstance(columns, Level) and column is columns.log_snr:
                rows, infinity = meant[field.name]
                rows = rows[-len(column) :]  # a chain of one step has one row
                finite[rows] |= column[rows] == infinity
            if not finite.all():
                row = int(np.argmin(finite))
                got = " and ".join(f"{column[row]:.4g}" for column in given)
                rule = f"{name} must give finite coefficients in every row"
                raise ValueError(f"{rule}, got {got} in row {row}.")


def pad(schedule: NoiseSchedule, length: int) -> NoiseSchedule:
    """Adds rows that no step visits, so that schedules of all lengths have one shape.

    Samplers and `likelihood` skip the added rows, where `visited` is False. One
    compiled sampler then serves every number of steps up to `length`.

    Args:
        schedule: of T rows.
        length: how many rows the result has, at least T.

    Returns:
        NoiseSchedule with arrays [length].

    Raises:
        ValueError: if length < T.

    >>> from jax_diffusion.schedules import cosine_betas
    >>> pad(make_schedule(cosine_betas(2)), 4).visited.tolist()
    [True, True, False, False]
    """
    check_schedule(schedule)
    checks.integer("length", length, at_least=schedule.num_steps)
    extra = length - schedule.num_steps
    padded = jax.tree.map(lambda a: jnp.pad(a, (0, extra), mode="edge"), schedule)
    added = jnp.arange(length) >= schedule.num_steps
    return dataclasses.replace(
        padded,
        timesteps=jnp.where(added, -1.0, padded.timesteps),
        mask=jnp.where(added, 0.0, padded.mask),
    )


def take(schedule: NoiseSchedule, t: Int[Array, "*b"], ndim: int) -> NoiseSchedule:
    """Takes rows `t` of all columns, shaped as data (`_extract` of Ho et al. 2020).

    Args:
        schedule: with arrays [T].
        t: int32 [b], within [0, T).
        ndim: rank of the data, batch axis included.

    Returns:
        NoiseSchedule with arrays [b, 1, ..., 1] of rank `ndim`, and no mask.

    Raises:
        ValueError: if the schedule or t is none, or t is known to be out of range.

    >>> from jax_diffusion.schedules import cosine_betas
    >>> schedule = make_schedule(cosine_betas(10))
    >>> take(schedule, jnp.array([3, 7]), 4).now.signal.shape
    (2, 1, 1, 1)
    """
    check_rows(schedule, t)
    checks.integer("ndim", ndim, at_least=0)
    shape = t.shape + (1,) * (ndim - 1)
    rows = dataclasses.replace(schedule, mask=None)
    return jax.tree.map(lambda a: placement.rows(a, t).reshape(shape), rows)


def check_schedule(schedule: Any) -> None:
    """Raises ValueError unless `schedule` is a NoiseSchedule with arrays [T]."""
    if not isinstance(schedule, NoiseSchedule):
        rule = "schedule must be a NoiseSchedule, as make_schedule returns one"
        raise ValueError(f"{rule}, got {checks.shown(schedule)}.")
    if np.ndim(schedule.betas) != 1:
        got = checks.shown(schedule.betas)
        raise ValueError(f"schedule must have arrays [T], got {got}.")


def check_chain(schedule: NoiseSchedule, *, may_rise: bool = False) -> None:
    """Raises ValueError if a `schedule` is one of `schedule_at`, without steps, or,
    unless levels `may_rise` on the way down, one of `churned`.
    """
    check_schedule(schedule)
    rule = "schedule must be a chain, as make_schedule and from_levels make it"
    if schedule.prev.signal is None:
        got = "levels of schedule_at, between which there are no steps"
        raise ValueError(f"{rule}, got {got}.")
    if schedule.posterior_x_0 is None and not may_rise:
        got = "levels of churned, which rise between steps and are for edm_heun_step"
        raise ValueError(f"{rule}, got {got}.")


def check_rows(schedule: NoiseSchedule, t: Any, name: str = "t") -> None:
    """Raises ValueError unless `t` are numbers of rows of the `schedule`.

    That is an int array [b], or of no axis within `jax.vmap`, whose values, where they
    are known, are steps of the diffusion. In the sentence t is called `name`.
    """
    check_schedule(schedule)
    axes = getattr(t, "ndim", 1)
    checks.array(name, t, "int", ("b",) if axes else ())
    checks.rows(name, t, num_visited(schedule))


def check_batch(
    schedule: NoiseSchedule, t: Any, *, per_image: bool = False, **data: Any
) -> None:
    """Checks that a schedule, data and timesteps fit each other, before they are used.

    Args:
        schedule: a NoiseSchedule with arrays [T].
        t: int32 [b], within [0, T) where known. A t without an axis, for all images, is
            what a function sees within `jax.vmap`, and passes where values are traced.
        per_image: whether results have an axis [b], so that no such t passes.
        data: float arrays [b, ...] by name, all of the shape of the first one.

    Raises:
        ValueError: if they do not, by the name of the one that does not.
    """
    check_schedule(schedule)
    (first, x), *others = data.items()
    checks.data(first, x, ("b", ...) if per_image else (...,))
    for name, other in others:
        checks.data(name, other, np.shape(x))
    one_image = getattr(t, "shape", None) == () and not per_image
    one_image = one_image and not all(map(checks.known, (t, *data.values())))
    checks.array("t", t, "int", () if one_image else np.shape(x)[:1])
    checks.rows("t", t, num_visited(schedule))


def check_step(schedule: NoiseSchedule, t: int | Int[Array, ""]) -> None:
    """Raises ValueError unless `t` is a step of the `schedule`, added rows not counted.

    A traced t has no value to check, and passes if it is one integer.
    """
    check_schedule(schedule)
    if isinstance(t, jax.Array | np.ndarray):
        checks.array("t", t, "int", ())
    else:
        checks.integer("t", t)
    checks.rows("t", t, num_visited(schedule))


def num_visited(schedule: NoiseSchedule) -> int:
    """Returns how many rows of a `schedule` were not added by `pad`; if unknown, all.

    >>> from jax_diffusion.schedules import cosine_betas
    >>> num_visited(pad(make_schedule(cosine_betas(10)), 40))
    10
    """
    if not checks.known(schedule.mask):
        return schedule.num_steps
    return int(np.sum(np.asarray(jax.device_get(schedule.mask)) > 0))
