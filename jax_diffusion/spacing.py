"""Rules that choose steps of a diffusion, for `schedules.make_schedule(keep=...)`.

Each returns increasing int [n], exactly as many distinct steps as it is asked for;
`quadratic_steps` alone may return fewer. `SPACINGS` lists them by name, all with one
signature: "sections" is `spaced_steps`, "uniform" is `uniform_steps`, and so on.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jax_diffusion import checks


def spaced_steps(num_steps: int, spec: int | str | Sequence[int]) -> np.ndarray:
    """Chooses evenly spaced steps, by the section rule of improved-diffusion.

    Args:
        num_steps: T.
        spec: one of
            250 or "250": so many steps, the first and the last among them;
            [10, 15, 20] or "10,15,20": the T steps are cut into equal sections, and so
            many are taken in each;
            "ddim50": every k-th step from 0 on, for the k that gives exactly 50.

    Returns:
        Increasing int [n].

    Raises:
        ValueError: if spec is none of these, if it takes no step or more than a
            section has, or if no stride gives the number.

    >>> spaced_steps(1000, 5)
    array([  0, 250, 500, 749, 999])
    >>> spaced_steps(100, "3,2")
    array([ 0, 24, 49, 50, 99])
    """
    checks.integer("num_steps", num_steps, at_least=1)
    if isinstance(spec, str):
        try:
            numbers = [int(part) for part in spec.removeprefix("ddim").split(",")]
        except ValueError:
            rule = "steps must be like 50, '50', '10,15,20' or 'ddim50'"
            raise ValueError(f"{rule}, got {spec!r}.") from None
        if spec.startswith("ddim"):
            # The smallest stride that visits exactly so many steps.
            strides = {
                len(range(0, num_steps, k)): k for k in range(num_steps - 1, 0, -1)
            }
            if len(numbers) > 1 or numbers[0] not in strides:
                near = min(strides or [num_steps], key=lambda m: abs(m - numbers[0]))
                told = ",".join(map(str, numbers))
                raise ValueError(
                    f"no integer stride visits exactly {told} of {num_steps} steps; "
                    f"the nearest count is {near}."
                )
            return np.arange(0, num_steps, strides[numbers[0]])
        spec = numbers
    counts = list(spec) if isinstance(spec, Sequence | np.ndarray) else [spec]
    for count in counts:
        checks.integer("steps", count)
    if not counts or sum(counts) < 1:
        raise ValueError(f"the sections must keep at least one step, got {spec!r}.")

    size, extra = divmod(num_steps, len(counts))
    steps, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 0 <= count <= length:
            rule = f"a section of {length} steps cannot keep {count}"
            raise ValueError(f"{rule}, got {spec!r}.")
        stride = 1.0 if count <= 1 else (length - 1) / (count - 1)
        position = 0.0  # accumulated and rounded half to even, as the original does
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return np.array(steps)


def uniform_steps(num_steps: int, n: int) -> np.ndarray:
    """Chooses floor(i T / n) for i = 0 .. n - 1 (Song et al. 2021, app. D.2, linear).

    The DDIM repository's "uniform" where n divides T; elsewhere that takes more steps.

    Args:
        num_steps: T.
        n: how many steps, in [1, T].

    Returns:
        Increasing int [n], from 0 on.

    Raises:
        ValueError: if n is out of range.

    >>> uniform_steps(1000, 4)
    array([  0, 250, 500, 750])
    """
    return np.arange(_count(num_steps, n)) * num_steps // n


def quadratic_steps(num_steps: int, n: int) -> np.ndarray:
    """Chooses floor(c i^2) up to 0.8 T ("quad" of the DDIM repository).

    Steps are dense where there is little noise. The original visits some small steps
    twice, to no effect; here they occur once, so that there may be fewer than n (49 for
    n = 50 and T = 1000).

    Args:
        num_steps: T.
        n: how many steps, in [1, T].

    Returns:
        Increasing int [n], or fewer, from 0 on.

    Raises:
        ValueError: if n is out of range.

    >>> quadratic_steps(1000, 4)
    array([  0,  88, 355, 800])
    """
    n = _count(num_steps, n)
    roots = np.linspace(0, np.sqrt(num_steps * 0.8), n)
    return np.unique((roots**2).astype(int))


def trailing_steps(num_steps: int, n: int) -> np.ndarray:
    """Chooses floor(i T / n) - 1 for i = 1 .. n (Lin et al. 2023; lucidrains).

    Sampling then starts at T - 1, the noise level of x_T.

    Args:
        num_steps: T.
        n: how many steps, in [1, T].

    Returns:
        Increasing int [n], up to T - 1.

    Raises:
        ValueError: if n is out of range.

    >>> trailing_steps(1000, 4)
    array([249, 499, 749, 999])
    """
    return np.arange(1, _count(num_steps, n) + 1) * num_steps // n - 1


def karras_steps(betas: np.ndarray, n: int, *, rho: float = 7.0) -> np.ndarray:
    """Chooses steps evenly spaced in (noise / signal)^(1 / rho) (Karras et al. 2022).

    As there are only T steps to choose from, these are the ones nearest to an even
    spacing, or, where two would fall on one step, the next ones. Steps 0 and T - 1 are
    among them.

    Args:
        betas: float64 [T].
        n: how many steps, in [1, T].
        rho: > 0; a larger one takes more steps where there is little noise.

    Returns:
        Increasing int [n].

    Raises:
        ValueError: if n, rho or a variance is out of range.
    """
    checks.number("rho", rho, above=0)
    betas = _variances(betas)
    return _nearest(np.exp(_log_ratio(betas) / rho), len(betas), n)


def log_snr_steps(betas: np.ndarray, n: int) -> np.ndarray:
    """Chooses steps evenly spaced in log-SNR, log(signal^2 / noise^2) (Lu et al. 2022).

    Rounded to the nearest of the T steps as in `karras_steps`.

    Args:
        betas: float64 [T].
        n: how many steps, in [1, T].

    Returns:
        Increasing int [n], step 0 and T - 1 among them.

    Raises:
        ValueError: if n or a variance is out of range.
    """
    betas = _variances(betas)
    return _nearest(_log_ratio(betas), len(betas), n)


def angle_steps(betas: np.ndarray, n: int) -> np.ndarray:
    """Chooses steps evenly spaced in log(noise / (1 + signal)), to integrate the flow.

    With phi = atan(noise / signal), that is log tan(phi / 2). Where there is little
    noise it changes like log-SNR, where there is much like phi itself, the variable in
    which `likelihood.ode_bits_per_dim` integrates. Rounded to the nearest of the T
    steps as in `karras_steps`.

    Args:
        betas: float64 [T].
        n: how many steps, in [1, T].

    Returns:
        Increasing int [n], step 0 and T - 1 among them.

    Raises:
        ValueError: if n or a variance is out of range.
    """
    betas = _variances(betas)
    with np.errstate(divide="ignore"):  # a last step may have no signal
        alpha_bar = np.exp(np.cumsum(np.log1p(-betas)))
    scale = np.log(np.sqrt(1 - alpha_bar) / (1 + np.sqrt(alpha_bar)))
    return _nearest(scale, len(betas), n)


def _of_betas(rule: Callable[[int, int], np.ndarray]) -> Callable[..., np.ndarray]:
    """Gives a rule that counts steps the signature of the others: (betas, n)."""
    return lambda betas, n: rule(len(betas), n)


SPACINGS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "sections": _of_betas(spaced_steps),
    "uniform": _of_betas(uniform_steps),
    "quadratic": _of_betas(quadratic_steps),
    "trailing": _of_betas(trailing_steps),
    "karras": karras_steps,
    "log_snr": log_snr_steps,
    "angle": angle_steps,
}
"""Rules by name: f(betas, n) -> increasing steps, int [n], for betas float64 [T]."""


def _variances(betas: np.ndarray) -> np.ndarray:
    """Returns betas as float64 [T], once they are known to be in (0, 1]."""
    betas = checks.vector("betas", betas, above=0, at_most=1)
    if not len(betas):
        raise ValueError("betas must be at least 1 value, got 0.")
    return betas


def _log_ratio(betas: np.ndarray) -> np.ndarray:
    """log(noise / signal) of every step, without a last one that has no signal."""
    log_alpha_bar = np.cumsum(np.log1p(-betas[betas < 1]))
    return (np.log(-np.expm1(log_alpha_bar)) - log_alpha_bar) / 2


def _nearest(scale: np.ndarray, num_steps: int, n: int) -> np.ndarray:
    """The n distinct steps nearest to an even spacing of an increasing scale [T]."""
    wanted = np.linspace(scale[0], scale[-1], _count(num_steps, n))
    steps = np.abs(scale[None, :] - wanted[:, None]).argmin(axis=1)
    steps[-1] = num_steps - 1
    rows = np.arange(n)
    steps = np.maximum.accumulate(steps - rows) + rows  # distinct, from below
    return np.minimum(steps, num_steps - n + rows)  # and none beyond the end


def _count(num_steps: int, n: int) -> int:
    """Returns n, once it is known to be an integer in [1, T]."""
    checks.integer("num_steps", num_steps, at_least=1)
    checks.integer("steps", n, at_least=1, at_most=num_steps)
    return n
