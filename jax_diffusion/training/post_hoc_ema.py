"""Averages of any width, from snapshots of two widths (Karras et al. 2024, EDM2).

An average by a power function is the integral of the parameters, as a function of time,
with a profile p(t) in proportion to t^gamma up to the step at which it was taken. The
profile of another width is approached by a sum of those of all snapshots, with the
coefficients that make the squared distance of the two profiles least. Averages by
`averages.update` have exactly these profiles, as parameters stay constant between two
updates; so the error of the result is at most the distance of the profiles times the
root of the integral of |parameters - c|^2, with any constant c. (An update that is
skipped leaves averages as they are, which a few of many do not change much.)

Of the paper's widths, 0.05 and 0.1, 16 snapshots give widths from 0.03 to 0.2 with a
distance below a tenth of the profile's size, 32 from 0.02 to 0.25, and 64 from 0.015 to
0.27; what is further off is refused. Below 0.03, the sum enlarges rounding errors of
the snapshots by a factor of ten and more.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from jax_diffusion import checks
from jax_diffusion.runtime import checkpoint, snapshots
from jax_diffusion.training.averages import MAX_WIDTH, gamma_from_width, width_name

FLOATS = Float[np.ndarray, "..."]  # float64
MAX_RESIDUAL = 0.1  # of a reconstructed profile, as a share of its size


def profile_product(t_a: Any, width_a: Any, t_b: Any, width_b: Any) -> FLOATS:
    """Returns the integral of the product of two profiles, float64, arrays broadcast.

    Args:
        t_a, t_b: the steps at which the averages were taken, > 0.
        width_a, width_b: their widths.
    """
    gamma = np.vectorize(gamma_from_width, otypes=[np.float64])
    a, b = gamma(width_a), gamma(width_b)
    t_a, t_b = np.asarray(t_a, np.float64), np.asarray(t_b, np.float64)
    # (min / own)^(gamma + 1), without the powers of steps that would overflow
    least = np.minimum(t_a, t_b)
    shares = (least / t_a) ** (a + 1) * (least / t_b) ** (b + 1)
    return np.asarray((a + 1) * (b + 1) / (a + b + 1) * shares / least)


def fit_profile(
    steps: Any, widths: Any, width: float, at_step: int
) -> tuple[FLOATS, float]:
    """Finds the sum of profiles that comes closest to that of another average.

    As in the authors' code, the coefficients are divided by their sum.

    Args:
        steps, widths: of the snapshots, [n].
        width, at_step: of the average that is wanted.

    Returns:
        The coefficients [n], and the distance to the profile that is wanted as a share
        of its size.
    """
    t, w = np.asarray(steps, np.float64), np.asarray(widths, np.float64)
    products = profile_product(t[:, None], w[:, None], t, w)
    wanted = profile_product(t, w, at_step, width)
    size = profile_product(at_step, width, at_step, width)
    # Profiles of length 1 are better conditioned.
    scale = 1 / np.sqrt(np.diag(products))
    found = np.linalg.solve(products * scale[:, None] * scale, wanted * scale) * scale
    found = found / found.sum()
    square = size - 2 * found @ wanted + found @ products @ found
    return found, float(np.sqrt(np.maximum(square, 0) / size))


def average_of_width(
    places: Iterable[tuple[int, float]],
    read: Callable[[tuple[int, float]], PyTree],
    ema_width: float,
    at_step: int,
    *,
    max_residual: float = MAX_RESIDUAL,
) -> PyTree:
    """Reconstructs the average of another width, or at another step, from snapshots.

    Args:
        places: (step, width) of each average. Those after `at_step` are not used.
        read: returns the average of a place, a tree of NumPy arrays; it is called once
            for each, in order.
        ema_width: in (0, 0.28].
        at_step: the step at which the average is wanted.
        max_residual: how far the profile may be off, see `fit_profile`.

    Returns:
        A tree of arrays with the dtypes of the snapshots.

    Raises:
        ValueError: if the snapshots do not give this width.
    """
    checks.number("ema_width", ema_width, above=0, at_most=MAX_WIDTH)
    used = sorted(place for place in places if place[0] <= at_step)
    if not used:
        rule = (
            "ema_width must be of a run with snapshots of averages by power functions"
        )
        raise ValueError(f"{rule}, got {ema_width:g} and none until {at_step}.")
    steps, widths = zip(*used, strict=True)
    coefficients, residual = fit_profile(steps, widths, ema_width, at_step)
    if not residual <= max_residual:
        known = sorted({*widths})
        raise ValueError(
            "ema_width must be one that the snapshots give to within "
            f"{max_residual:.0%}, got {ema_width:g}, which is {residual:.0%} off "
            f"(snapshots {len({*steps})}, widths {known}, step {at_step}; they are "
            "taken where the run is saved, every config.save_every steps)."
        )
    total = None
    for place, coefficient in zip(used, coefficients, strict=True):
        part = jax.tree.map(lambda a, c=coefficient: a * a.dtype.type(c), read(place))
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def load_width(
    workdir: Path, ema_widths: Sequence[float], ema_width: float
) -> tuple[int, PyTree]:
    """Loads an average of any width, at the step of the newest whole checkpoint.

    One of the config's widths is read from that checkpoint, others are reconstructed
    from its averages and the snapshots before.

    Args:
        workdir: the folder of a run.
        ema_widths: of its config.
        ema_width: in (0, 0.28].

    Returns:
        The step, and a tree of NumPy arrays.

    Raises:
        ValueError: if the run has no such averages, if they do not give this width, or
            if a snapshot is damaged.
    """
    checks.number("ema_width", ema_width, above=0, at_most=MAX_WIDTH)
    if not ema_widths:
        raise ValueError(
            "ema_width must be left out for a run whose config.ema_widths is empty, "
            f"got {ema_width:g}."
        )
    names = [width_name(each) for each in ema_widths]
    stored = width_name(ema_width) in names
    first = width_name(ema_width) if stored else names[0]
    step, params = checkpoint.load_step_params(workdir, ema=first)
    if stored:
        return step, params
    del params  # it is read again when its turn comes
    folders = {at: workdir / snapshots.FOLDER for at in snapshots.steps(workdir)}
    folders[step] = workdir

    def read(place):
        at, each = place
        try:
            return checkpoint.load_params_at(folders[at], at, ema=width_name(each))
        except ValueError as error:
            if at == step:
                raise
            raise ValueError(
                f"{str(error).rstrip('.')}; without that folder, the other snapshots "
                "may give the width."
            ) from error

    places = [(at, each) for at in folders for each in ema_widths]
    return step, average_of_width(places, read, ema_width, step)
