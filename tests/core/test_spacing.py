"""Spacings even in log-SNR, Karras' measure, the angle: how many steps, and which."""

import numpy as np
import pytest
from support import oracles

from jax_diffusion import schedules, spacing

BETAS = {
    "linear": schedules.linear_betas(100),
    "cosine": schedules.cosine_betas(100),
    "no_signal": schedules.zero_terminal_snr(schedules.linear_betas(100)),
    "linear_1000": schedules.linear_betas(1000),
    "cosine_1000": schedules.cosine_betas(1000),
    "no_signal_1000": schedules.zero_terminal_snr(schedules.cosine_betas(1000)),
}
RULES = {
    "karras": spacing.karras_steps,
    "log_snr": spacing.log_snr_steps,
    "angle": spacing.angle_steps,
}

every_rule = pytest.mark.parametrize("rule", RULES)
every_schedule = pytest.mark.parametrize("name", BETAS)


def counts(num_steps):
    """All of 1 .. 100; of 1 .. 1000 some."""
    if num_steps == 100:
        return range(1, 101)
    return [1, 2, 3, 10, 50, 250, 500, 777, 998, 999, 1000]


@every_schedule
@every_rule
def test_there_are_exactly_n_increasing_steps_from_0_to_the_last(rule, name):
    num_steps = len(BETAS[name])
    for n in counts(num_steps):
        steps = RULES[rule](BETAS[name], n)
        assert steps.shape == (n,) and np.issubdtype(steps.dtype, np.integer)
        assert np.all(np.diff(steps) > 0)
        assert steps[-1] == num_steps - 1
        assert steps[0] == 0 or n == 1
        schedules.make_schedule(BETAS[name], keep=steps)  # takes them


def measure(rule, betas):
    """What is evenly spaced, of every step; endless where there is no signal."""
    with np.errstate(divide="ignore"):
        signal = np.cumprod(np.sqrt(1 - betas))
        ratio = np.sqrt(-np.expm1(np.cumsum(np.log1p(-betas)))) / signal
    if rule == "angle":
        return np.log(np.tan(np.arctan(ratio) / 2))
    return ratio ** (1 / 7) if rule == "karras" else np.log(ratio)


@every_schedule
@every_rule
def test_no_other_step_is_nearer_to_an_even_spacing(rule, name):
    """Each ideal level lies nearer to its step than halfway to either neighbor."""
    level, tested = measure(rule, BETAS[name]), 0
    last = level[np.isfinite(level)][-1]
    for n in range(3, 60):
        ideal = level[0] + (last - level[0]) / (n - 1) * np.arange(n)
        middles = (level[1:] + level[:-1]) / 2
        below = np.append(-np.inf, middles)  # of every step, where its own part begins
        if np.unique(np.sum(ideal[:, None] > below[None], axis=1)).size < n:
            continue  # two would fall on one
        steps = RULES[rule](BETAS[name], n)[1:-1]
        assert np.all(below[steps] <= ideal[1:-1] + 1e-9)
        assert np.all(ideal[1:-1] <= middles[steps] + 1e-9)
        tested += 1
    assert tested >= 2


@pytest.mark.parametrize(
    "levels, n, steps",
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], 5, [0, 2, 4, 6, 8]),
        ([0, 4, 5, 6, 12], 3, [0, 3, 4]),  # the nearest to 6 is 6
        ([0, 10, 11, 12], 4, [0, 1, 2, 3]),  # 0 and 4 fall on 0: the next ones
        ([0, 10, 11, 12, 13, 14], 4, [0, 1, 2, 5]),  # 4.7 falls on 0, 9.3 on 1
        ([0, 1, 2, 3, 20], 4, [0, 2, 3, 4]),  # 13.3 and 20 on the last: those before
        ([0, 2, 4, 6, np.inf], 4, [0, 1, 2, 4]),  # without signal, for what was before
    ],
)
def test_log_snr_steps_on_levels_that_can_be_counted_by_hand(levels, n, steps):
    betas = oracles.betas_of_ratios(np.exp(np.array(levels) / 4 - 2))
    np.testing.assert_array_equal(spacing.log_snr_steps(betas, n), steps)


def test_karras_steps_with_rho_1_are_even_in_the_ratio_itself():
    betas = oracles.betas_of_ratios(np.arange(1, 10) / 4)
    steps = spacing.karras_steps(betas, 5, rho=1.0)
    np.testing.assert_array_equal(steps, [0, 2, 4, 6, 8])


def test_karras_steps_are_even_in_the_seventh_root_of_the_ratio():
    betas = oracles.betas_of_ratios(np.linspace(0.4, 1.8, 9) ** 7)
    np.testing.assert_array_equal(spacing.karras_steps(betas, 5), [0, 2, 4, 6, 8])
    assert list(spacing.log_snr_steps(betas, 5)) != [0, 2, 4, 6, 8]


@pytest.mark.parametrize("n", [-1, 0, 101])
@every_rule
def test_more_steps_than_there_are_or_none_is_an_error(rule, n):
    words = rf"^steps must be an integer in \[1, 100\], got {n}\.$"
    with pytest.raises(ValueError, match=words):
        RULES[rule](BETAS["linear"], n)
