"""Variances (beta schedules): linear, cosine, sigmoid, ...; `BETAS` lists them.

Each function returns float64 [T], the variance of q(x_t | x_{t-1}) at every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_diffusion import checks

MAX_STEPS = 1_000_000  # T; tables of so many steps take 100 MB


def linear_betas(
    num_steps: int, *, start: float = 1e-4, end: float = 0.02, rescale: bool = True
) -> np.ndarray:
    """Variances that grow linearly (Ho et al. 2020, sec. 4): float64 [T].

    Args:
        num_steps: T, at least 2.
        start, end: first and last variance, meant for T = 1000.
        rescale: whether to multiply both by 1000 / T, so that x_T is noise whatever T
            is (improved-diffusion). Ho et al. and DDIM do not.

    Raises:
        ValueError: if num_steps < 2, or a variance is not in (0, 1], which rescaling
            leads to below T = 20.

    >>> linear_betas(4, start=0.1, end=0.4, rescale=False)
    array([0.1, 0.2, 0.3, 0.4])
    """
    _check(num_steps, start=start, end=end)
    checks.boolean("rescale", rescale)
    scale = 1000 / num_steps if rescale else 1.0
    if scale * max(start, end) > 1:
        largest = "end" if end > start else "start"
        raise ValueError(
            f"num_steps must be at least 1000 * {largest} = {1000 * max(start, end):g} "
            f"unless rescale is False, got {num_steps}."
        )
    return np.linspace(scale * start, scale * end, num_steps, dtype=np.float64)


def quadratic_betas(
    num_steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
    """Variances whose square roots grow linearly ("quad" of Ho et al. 2020, DDIM).

    Args:
        num_steps: T, at least 2.
        start, end: first and last variance, in (0, 1].

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, or an argument is out of range.
    """
    _check(num_steps, start=start, end=end)
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
        num_steps: T, at least 2.
        offset: keeps the first betas from vanishing; >= 0.
        min_beta: lower bound, in [0, 1]; 1e-4 in the annotated DDPM, none in the paper.
        max_beta: upper bound, in (0, 1], reached only near u = 1, where alpha_bar goes
            to zero.

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, or an argument is out of range.

    >>> cosine_betas(4).round(3)
    array([0.153, 0.417, 0.708, 0.999])
    """
    checks.number("offset", offset, at_least=0)
    checks.number("min_beta", min_beta, at_least=0, at_most=1)
    checks.number("max_beta", max_beta, above=0, at_most=1)
    if min_beta > max_beta:
        raise ValueError(
            f"min_beta must be at most max_beta = {max_beta}, got {min_beta}."
        )

    def alpha_bar(u):
        return np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2

    betas = betas_from_alpha_bar(alpha_bar, num_steps, max_beta=max_beta)
    return np.maximum(betas, min_beta)


def sigmoid_betas(
    num_steps: int, *, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
    """Variances that follow a sigmoid over [-6, 6] (DDIM code, annotated DDPM).

    Args:
        num_steps: T.
        start, end: the variances at minus and plus infinity, in (0, 1]; the first and
            last of the T are close to them.

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, or an argument is out of range.
    """
    _check(num_steps, start=start, end=end)
    return start + (end - start) * _sigmoid(np.linspace(-6, 6, num_steps))


def sigmoid_alpha_bar_betas(
    num_steps: int,
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
    max_beta: float = 0.999,
) -> np.ndarray:
    """Variances whose alpha_bar follows a sigmoid (Jabri et al. 2022; lucidrains).

    alpha_bar is sigmoid(-x / tau) over x in [start, end], shifted and scaled so that it
    falls from 1 to 0.

    Args:
        num_steps: T, at least 2.
        start, end: the part of the sigmoid to use; not the same.
        tau: temperature, > 0; large values make alpha_bar a straight line.
        max_beta: upper bound of a variance, in (0, 1].

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, or an argument is out of range.
    """
    checks.number("start", start)
    checks.number("end", end)
    checks.number("tau", tau, above=0)
    if start == end:
        raise ValueError(f"end must differ from start = {start}, got {end}.")
    first, last = _sigmoid(start / tau), _sigmoid(end / tau)

    def alpha_bar(u):
        return (last - _sigmoid((u * (end - start) + start) / tau)) / (last - first)

    with np.errstate(all="ignore"):  # extremes make no schedule, which is told then
        return betas_from_alpha_bar(alpha_bar, num_steps, max_beta=max_beta)


def constant_betas(num_steps: int, *, value: float = 0.02) -> np.ndarray:
    """The same variance at all steps ("const" of Ho et al. 2020).

    Args:
        num_steps: T, at least 2.
        value: that variance, in (0, 1).

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, or value is out of range.
    """
    _check(num_steps)
    checks.number("value", value, above=0, below=1)
    return np.full(num_steps, value, np.float64)


def warmup_betas(
    num_steps: int, *, fraction: float = 0.1, start: float = 1e-4, end: float = 0.02
) -> np.ndarray:
    """Variances that grow linearly and then stay constant (Ho et al. 2020).

    Args:
        num_steps: T.
        fraction: the part of the steps over which variances grow, in [0, 1]; 0.1 and
            0.5 are "warmup10" and "warmup50" of Ho et al.
        start, end: first and last variance, in (0, 1].

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, or an argument is out of range.
    """
    _check(num_steps, start=start, end=end)
    checks.number("fraction", fraction, at_least=0, at_most=1)
    betas = np.full(num_steps, end, np.float64)
    num_warmup = int(num_steps * fraction)
    betas[:num_warmup] = np.linspace(start, end, num_warmup, dtype=np.float64)
    return betas


def jsd_betas(num_steps: int) -> np.ndarray:
    """Variances 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015).

    The last one leaves no signal, so the network must predict v or x_0.

    Args:
        num_steps: T, at least 2.

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2.
    """
    _check(num_steps)
    return 1.0 / np.linspace(num_steps, 1, num_steps, dtype=np.float64)


def given_betas(num_steps: int, *, betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the variances that it is given, as `trained_betas` of diffusers.

    Args:
        num_steps: T.
        betas: [T], in (0, 1].

    Returns:
        float64 [T].

    Raises:
        ValueError: unless there are num_steps of them, in that range.
    """
    _check(num_steps)
    betas = checks.vector("betas", betas, above=0, at_most=1)
    if len(betas) != num_steps:
        raise ValueError(f"betas must be {num_steps} values, got {len(betas)}.")
    return betas


def betas_from_alpha_bar(
    alpha_bar_fn: Callable[[np.ndarray], np.ndarray],
    num_steps: int,
    *,
    max_beta: float = 0.999,
) -> np.ndarray:
    """Variances of a diffusion whose alpha_bar falls as a given function does.

    As in improved-diffusion, a variance is 1 minus the ratio of neighboring values, so
    that the diffusion's own alpha_bar is alpha_bar_fn(u) / alpha_bar_fn(0): it begins
    with clean data whatever alpha_bar_fn(0) is.

    Args:
        alpha_bar_fn: takes u = t / T, float64 [T + 1] from 0 to 1, and returns
            alpha_bar there, up to a factor.
        num_steps: T, at least 2.
        max_beta: upper bound of a variance, in (0, 1].

    Returns:
        float64 [T].

    Raises:
        ValueError: if num_steps < 2, max_beta is out of range, or alpha_bar does not
            fall from one positive number to the next, the last of which may be 0.

    >>> betas_from_alpha_bar(lambda u: 1 - u / 2, 2).round(3)
    array([0.25 , 0.333])
    """
    _check(num_steps)
    checks.number("max_beta", max_beta, above=0, at_most=1)
    checks.function("alpha_bar_fn", alpha_bar_fn, "(u,)")
    alpha_bar = np.asarray(alpha_bar_fn(np.arange(num_steps + 1) / num_steps))
    is_real = alpha_bar.dtype.kind == "f" and alpha_bar.shape == (num_steps + 1,)
    if not is_real or not (alpha_bar[:-1] > 0).all() or not np.isfinite(alpha_bar[-1]):
        raise ValueError(
            f"alpha_bar_fn must return {num_steps + 1} finite positive numbers, the "
            f"last of which may be 0, got {checks.shown(alpha_bar)}."
        )
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(alpha_bar) to end in 0 exactly (Lin et al. 2023, alg. 1).

    The last variance becomes 1. As x_T then has no signal, the network must predict v
    or x_0, not eps.

    Args:
        betas: float64 [T], T >= 2, in (0, 1].

    Returns:
        float64 [T].

    Raises:
        ValueError: if there are fewer than two variances, or one is out of range.

    >>> zero_terminal_snr(np.array([0.1, 0.2, 0.3])).round(3)
    array([0.1  , 0.663, 1.   ])
    """
    betas = check_betas(betas)
    signal = np.sqrt(np.cumprod(1 - betas))
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
"""Variances by name: f(num_steps, **arguments) -> float64 [T]."""


def check_betas(betas: Any) -> np.ndarray:
    """Checks variances, and returns them as float64 [T].

    Args:
        betas: [T] in (0, 1], T >= 2.

    Raises:
        ValueError: if there are fewer than two, or one is not in (0, 1].
    """
    found = checks.vector("betas", betas, above=0, at_most=1)
    if len(found) < 2:
        raise ValueError(f"betas must be at least 2 values, got {len(found)}.")
    return found


def _check(num_steps: int, **variances: float) -> None:
    """Raises ValueError unless T is at least 2 and variances are in (0, 1]."""
    checks.integer("num_steps", num_steps, at_least=2, at_most=MAX_STEPS)
    for name, value in variances.items():
        checks.number(name, value, above=0, at_most=1)


def _sigmoid(x):
    with np.errstate(over="ignore"):  # 1 / infinity is what is meant
        return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
