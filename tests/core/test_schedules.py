"""Noise schedules against published constants, identities and their own errors."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32, F32_SUM, alpha_bars, noise_vars

from jax_diffusion import schedules

linear_raw = functools.partial(schedules.linear_betas, rescale=False)
floored = functools.partial(schedules.cosine_betas, min_beta=1e-4, max_beta=0.9999)
warmup50 = functools.partial(schedules.warmup_betas, fraction=0.5)


def given(num_steps):
    return schedules.given_betas(num_steps, betas=np.full(num_steps, 0.02))


ALL_BETAS = {**schedules.BETAS, "linear_raw": linear_raw, "floored": floored}
ALL_BETAS |= {"given": given}
SPACINGS = {
    "sections": schedules.spaced_steps,
    "uniform": schedules.uniform_steps,
    "trailing": schedules.trailing_steps,
}

betas_fns = pytest.mark.parametrize("betas_fn", ALL_BETAS.values(), ids=ALL_BETAS)
spacings = pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)


# Computed in float64 from the official codes, to the six digits given.
@pytest.mark.parametrize(
    ("betas_fn", "num_steps", "first", "last", "signal_T", "posterior_var_1"),
    [
        (schedules.linear_betas, 1000, 1e-4, 0.02, 0.00635282, 5.45319e-5),
        (schedules.linear_betas, 4000, 2.5e-5, 0.005, 0.00651663, 1.28036e-5),
        (schedules.linear_betas, 200, 5e-4, 0.1, 0.00550621, 3.33444e-4),
        (linear_raw, 200, 1e-4, 0.02, 0.363569, 6.66711e-5),
        (schedules.cosine_betas, 1000, 4.12842e-5, 0.999, 4.92825e-5, 2.17895e-5),
        (schedules.cosine_betas, 4000, 9.86582e-6, 0.999, 1.23206e-5, 5.00768e-6),
        (floored, 1000, 1e-4, 0.9999, 1.55815e-5, 5.00025e-5),
        (schedules.sigmoid_betas, 1000, 1.49205e-4, 0.0199508, 0.00629935, 7.47562e-5),
        (
            schedules.sigmoid_alpha_bar_betas,
            1000,
            3.00279e-4,
            0.999,
            5.47977e-4,
            1.50592e-4,
        ),
        (schedules.quadratic_betas, 1000, 1e-4, 0.02, 0.0270816, 5.0656e-5),
        (schedules.warmup_betas, 1000, 1e-4, 0.02, 4.61369e-9**0.5, None),
        (warmup50, 1000, 1e-4, 0.02, 2.60614e-7**0.5, None),
        (schedules.constant_betas, 1000, 0.02, 0.02, 1.68297e-9**0.5, None),
        (schedules.jsd_betas, 1000, 1e-3, 1.0, 0.0, None),
    ],
)
def test_schedule_has_the_published_constants(
    betas_fn, num_steps, first, last, signal_T, posterior_var_1
):
    schedule = schedules.make_schedule(betas_fn(num_steps))
    got = [schedule.betas[0], schedule.betas[-1], schedule.now.signal[-1]]
    np.testing.assert_allclose(got, [first, last, signal_T], rtol=1e-5)
    if posterior_var_1 is not None:
        got = np.exp(schedule.posterior_log_var[1], dtype=np.float64)
        np.testing.assert_allclose(got, posterior_var_1, rtol=1e-5)


def test_every_named_schedule_is_float64_in_the_unit_interval_for_any_length():
    for name, betas_fn in ALL_BETAS.items():
        for num_steps in (20, 50, 1000):
            betas = betas_fn(num_steps)
            assert betas.dtype == np.float64 and betas.shape == (num_steps,), name
            assert np.all((betas > 0) & (betas <= 1)), name


@betas_fns
def test_tables_are_accurate_where_float32_would_cancel(betas_fn):  # B14
    betas = betas_fn(1000)
    exact = np.exp(np.cumsum(np.log1p(-betas[:-1])))  # other than a product; T-1 may
    exact_var = -np.expm1(np.cumsum(np.log1p(-betas[:-1])))  # be pure noise
    now = schedules.make_schedule(betas).now
    np.testing.assert_allclose(now.noise[:-1], np.sqrt(exact_var), rtol=1e-7)
    np.testing.assert_allclose(now.signal[:-1], np.sqrt(exact), rtol=1e-7)
    log_snr = np.log(exact) - np.log(exact_var)
    np.testing.assert_allclose(now.log_snr[:-1], log_snr, rtol=1e-6, atol=1e-7)


@betas_fns
def test_levels_hold_unit_variance_and_join_into_a_chain(betas_fn):
    schedule = schedules.make_schedule(betas_fn(50))
    assert {a.dtype for a in jax.tree.leaves(schedule)} == {jnp.dtype("float32")}
    assert {a.shape for a in jax.tree.leaves(schedule)} == {(50,)}
    for level in (schedule.now, schedule.prev, schedule.next):
        np.testing.assert_allclose(level.signal**2 + level.noise**2, 1.0, **F32)
    for before, after in zip(schedule.prev, schedule.now, strict=True):
        np.testing.assert_array_equal(before[1:], after[:-1])
    for before, after in zip(schedule.now, schedule.next, strict=True):
        np.testing.assert_array_equal(before[1:], after[:-1])
    assert [level[0] for level in schedule.prev] == [1, 0, np.inf]  # the clean image
    assert [level[-1] for level in schedule.next] == [0, 1, -np.inf]  # pure noise


@betas_fns
def test_posterior_is_that_of_two_gaussian_observations(betas_fn):
    """q(x_{t-1} | x_t, x_0): precisions of the prior and of the observed x_t add up."""
    c = schedules.make_schedule(betas_fn(50))
    betas, prev_var = np.asarray(c.betas, np.float64)[1:], noise_vars(c)[:-1]
    precision = 1 / prev_var + (1 - betas) / betas
    of_x_0 = np.sqrt(alpha_bars(c)[:-1]) / prev_var / precision
    of_x_t = np.sqrt(1 - betas) / betas / precision
    np.testing.assert_allclose(np.exp(c.posterior_log_var[1:]), 1 / precision, **F32)
    np.testing.assert_allclose(c.posterior_x_0[1:], of_x_0, **F32_SUM)
    np.testing.assert_allclose(c.posterior_x_t[1:], of_x_t, **F32_SUM)


@betas_fns
def test_posterior_of_the_first_step_is_x_0_and_its_variance_repeats_the_next(betas_fn):
    c = schedules.make_schedule(betas_fn(50))
    assert (c.posterior_x_0[0], c.posterior_x_t[0]) == (1, 0)
    assert c.posterior_log_var[0] == c.posterior_log_var[1]


def test_linear_betas_rescale_to_the_same_end_of_noise():
    for num_steps in (100, 400, 4000):
        signal = schedules.make_schedule(schedules.linear_betas(num_steps)).now.signal
        assert 0.004 < signal[-1] < 0.007  # T = 1000: 0.00635


def test_quadratic_is_linear_in_the_standard_deviation():
    np.testing.assert_allclose(
        np.diff(schedules.quadratic_betas(9) ** 0.5, n=2), 0, atol=1e-15
    )


def test_cosine_without_offset_is_the_squared_cosine():
    betas = schedules.cosine_betas(4, offset=0.0)[:2]
    half = np.sqrt(0.5)  # cos(pi / 8)^2 = (1 + half) / 2, cos(pi / 4)^2 = 1 / 2
    np.testing.assert_allclose(np.cumprod(1 - betas), [(1 + half) / 2, 0.5], rtol=1e-12)


def test_betas_from_alpha_bar_is_inverted_by_the_product():
    betas = schedules.betas_from_alpha_bar(lambda u: np.exp(-3 * u), 30)
    alpha_bar = np.exp(-np.arange(1, 31) / 10)
    np.testing.assert_allclose(np.cumprod(1 - betas), alpha_bar, rtol=1e-12)


@pytest.mark.parametrize("first", [0.25, 0.9, 1.0, 3.0])
def test_betas_from_alpha_bar_are_ratios_so_that_a_chain_begins_with_clean_data(first):
    betas = schedules.betas_from_alpha_bar(lambda u: first * np.exp(-3 * u), 30)
    alpha_bar = np.exp(-np.arange(1, 31) / 10)
    np.testing.assert_allclose(np.cumprod(1 - betas), alpha_bar, rtol=1e-12)
    said = schedules.betas_from_alpha_bar.__doc__
    assert "alpha_bar_fn(u) / alpha_bar_fn(0)" in said


def test_warmup_reaches_its_end_at_the_fraction_and_stays():
    betas = schedules.warmup_betas(10, fraction=0.4, start=0.1, end=0.4)
    np.testing.assert_allclose(betas, [0.1, 0.2, 0.3] + 7 * [0.4])


@betas_fns
def test_zero_terminal_snr_ends_in_no_signal_and_keeps_the_first_level(betas_fn):
    betas = betas_fn(50)
    before = schedules.tabulate(betas).now.signal
    after = schedules.tabulate(schedules.zero_terminal_snr(betas)).now.signal
    assert after[-1] == 0
    np.testing.assert_allclose(after[0], before[0], rtol=1e-12)
    scale = after[0] / (before[0] - before[-1])  # one shift and one scale, as in a line
    np.testing.assert_allclose(after, scale * (before - before[-1]), atol=1e-7)


@spacings
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 100, 301])
def test_every_spacing_gives_exactly_n_increasing_steps(spacing, num_steps):  # B20
    for n in range(1, num_steps + 1):
        steps = spacing(num_steps, n)
        assert len(steps) == n and steps.dtype.kind == "i"
        assert steps[0] >= 0 and steps[-1] < num_steps and np.all(np.diff(steps) > 0)


def test_every_spacing_keeps_the_end_that_it_promises():
    for n in range(2, 101):
        assert schedules.uniform_steps(100, n)[0] == 0
        assert schedules.trailing_steps(100, n)[-1] == 99
        steps = schedules.spaced_steps(100, n)
        assert (steps[0], steps[-1]) == (0, 99)


def test_uniform_and_trailing_strides_differ_by_one_at_most():
    for n in range(2, 101):
        for steps in (
            schedules.uniform_steps(100, n),
            schedules.trailing_steps(100, n),
        ):
            assert np.ptp(np.diff(steps)) <= 1


def test_quadratic_steps_grow_by_growing_strides_up_to_four_fifths():
    for n in (2, 10, 50, 100):
        steps = schedules.quadratic_steps(1000, n)
        assert len(steps) <= n and (steps[0], steps[-1]) == (0, 800)
        assert np.all(np.diff(steps) > 0)
        # the squares' strides grow by the same amount, before rounding down
        assert np.all(np.diff(steps, n=2) >= -1)


def test_quadratic_steps_of_a_square_count_are_squares():
    steps = schedules.quadratic_steps(125, 11)  # sqrt(0.8 * 125) = 10
    np.testing.assert_array_equal(steps, np.arange(11) ** 2)


def test_sections_share_the_steps_equally():  # the example of improved-diffusion
    steps = schedules.spaced_steps(300, "10,15,20")
    np.testing.assert_array_equal(np.bincount(steps // 100), [10, 15, 20])
    np.testing.assert_array_equal(steps, schedules.spaced_steps(300, [10, 15, 20]))
    for start, end in ((0, 9), (10, 24), (25, 44)):  # each from end to end
        assert (steps[start] % 100, steps[end] % 100) == (0, 99)


def test_unequal_sections_give_the_extra_steps_to_the_first():
    np.testing.assert_array_equal(schedules.spaced_steps(5, [3, 2]), np.arange(5))
    with pytest.raises(ValueError, match="section of 2 steps cannot keep 3"):
        schedules.spaced_steps(5, [2, 3])


def test_ddim_spec_is_a_constant_stride_from_zero():
    for n in (50, 100, 250, 1000):
        np.testing.assert_array_equal(
            schedules.spaced_steps(1000, f"ddim{n}"), np.arange(n) * (1000 // n)
        )


@spacings
def test_respaced_schedule_keeps_the_marginals_of_its_steps(spacing):  # B2, B19
    betas, keep = schedules.cosine_betas(100), spacing(100, 7)
    full, short = (
        schedules.make_schedule(betas),
        schedules.make_schedule(betas, keep=keep),
    )
    for kept, all_of_them in zip(short.now, full.now, strict=True):
        np.testing.assert_array_equal(kept, all_of_them[keep])
    np.testing.assert_array_equal(short.timesteps, keep)
    assert short.prev.signal[0] == 1 and short.num_steps == 7


@spacings
def test_respaced_schedule_equals_the_chain_of_its_own_betas(spacing):  # B2, B19
    betas, keep = schedules.linear_betas(100), spacing(100, 7)
    pieces = np.split(1 - betas[: keep[-1] + 1], keep[:-1] + 1)
    own = schedules.make_schedule(np.array([1 - piece.prod() for piece in pieces]))
    short = schedules.make_schedule(betas, keep=keep)
    short = dataclasses.replace(short, timesteps=own.timesteps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **F32), short, own)


def test_keeping_every_step_changes_nothing():
    betas = schedules.cosine_betas(20)
    a, b = (
        schedules.make_schedule(betas),
        schedules.make_schedule(betas, keep=range(20)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **F32_SUM), a, b)


def test_timesteps_are_float_and_scaled_to_a_thousand_on_request():  # B12
    schedule = schedules.make_schedule(schedules.cosine_betas(40_000), keep=[0, 39_999])
    np.testing.assert_array_equal(schedule.timesteps, [0, 39_999])  # int16 wraps
    schedule = schedules.make_schedule(
        schedules.cosine_betas(4000), keep=[0, 1, 3998], rescale_timesteps=True
    )
    np.testing.assert_array_equal(schedule.timesteps, [0, 0.25, 999.5])


def test_one_step_schedule_has_finite_rows_but_for_the_ends():
    schedule = schedules.make_schedule(schedules.cosine_betas(10), keep=[9])
    assert schedule.num_steps == 1
    np.testing.assert_allclose(
        jnp.exp(schedule.posterior_log_var), schedule.betas, **F32
    )
    assert schedule.prev.signal == 1 and np.isfinite(schedule.now.log_snr)


def test_tabulate_is_the_schedule_before_rounding():
    table = schedules.tabulate(schedules.cosine_betas(20), keep=[3, 9])
    assert {a.dtype for a in jax.tree.leaves(table)} == {np.dtype("float64")}
    rounded = schedules.make_schedule(schedules.cosine_betas(20), keep=[3, 9])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7), table, rounded
    )


def test_pad_keeps_the_rows_and_marks_the_rest():
    schedule = schedules.make_schedule(schedules.cosine_betas(6))
    padded = schedules.pad(schedule, 10)
    assert padded.num_steps == 10
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:6], b), padded, schedule)
    np.testing.assert_array_equal(padded.timesteps[6:], -1)
    assert all(np.all(np.isfinite(a[6:])) for a in jax.tree.leaves(padded.now))


def test_pad_to_its_own_length_changes_nothing():
    schedule = schedules.make_schedule(schedules.cosine_betas(6))
    same = schedules.pad(schedule, 6)
    jax.tree.map(np.testing.assert_array_equal, same, schedule)


def test_take_gathers_rows_that_broadcast_against_the_data():
    schedule = schedules.make_schedule(schedules.cosine_betas(6))
    rows = schedules.take(schedule, jnp.array([4, 0], jnp.int32), 4)
    assert {a.shape for a in jax.tree.leaves(rows)} == {(2, 1, 1, 1)}
    np.testing.assert_array_equal(rows.betas.ravel(), schedule.betas[np.array([4, 0])])
    np.testing.assert_array_equal(
        rows.next.noise.ravel(), schedule.now.noise[np.array([5, 1])]
    )


def test_schedule_is_a_pytree_that_jit_vmap_and_stacking_carry():
    both = [schedules.make_schedule(f(8)) for f in (schedules.cosine_betas, linear_raw)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *both)
    signal = jax.jit(jax.vmap(lambda schedule: schedule.now.signal))(stacked)
    np.testing.assert_array_equal(signal[1], both[1].now.signal)


BETAS_999 = schedules.linear_betas(1000)
BAD_CALLS = {
    "beta of zero": (lambda: schedules.make_schedule(np.array([0.0, 0.1])), "0.0"),
    "negative beta": (lambda: schedules.make_schedule(np.array([0.1, -0.1])), "-0.1"),
    "beta above one": (lambda: schedules.make_schedule(np.array([0.1, 1.5])), "1.5"),
    "beta nan": (lambda: schedules.make_schedule(np.array([0.1, np.nan])), "nan"),
    "one bad beta in a thousand": (
        lambda: schedules.make_schedule(np.append(BETAS_999, 1.25)),
        "1.25",
    ),
    "betas in a matrix": (lambda: schedules.make_schedule(np.eye(2)), "[2, 2]"),
    "a single step": (lambda: schedules.make_schedule(np.array([0.1])), "1"),
    "no steps": (lambda: schedules.make_schedule(np.array([])), "0"),
    "keep decreasing": (
        lambda: schedules.make_schedule(BETAS_999, keep=[5, 3]),
        r"[5, 3]",
    ),
    "keep repeating": (
        lambda: schedules.make_schedule(BETAS_999, keep=[5, 5]),
        "[5, 5]",
    ),
    "keep T": (lambda: schedules.make_schedule(BETAS_999, keep=[1, 1000]), "[1, 1000]"),
    "keep -1": (lambda: schedules.make_schedule(BETAS_999, keep=[-1, 3]), "[-1, 3]"),
    "keep between": (
        lambda: schedules.make_schedule(BETAS_999, keep=np.array([0.5])),
        "[0.5]",
    ),
    "keep nothing": (lambda: schedules.make_schedule(BETAS_999, keep=[]), "[]"),
    "linear below 20": (lambda: schedules.linear_betas(19), "19"),
    "pad too short": (
        lambda: schedules.pad(schedules.make_schedule(BETAS_999), 999),
        "999",
    ),
    "uniform none": (lambda: schedules.uniform_steps(10, 0), "0"),
    "uniform too many": (lambda: schedules.uniform_steps(10, 11), "11"),
    "trailing none": (lambda: schedules.trailing_steps(10, 0), "0"),
    "trailing too many": (lambda: schedules.trailing_steps(10, 11), "11"),
    "quadratic too many": (lambda: schedules.quadratic_steps(10, 11), "11"),
    "sections too many": (lambda: schedules.spaced_steps(10, 11), "11"),
    "sections none": (lambda: schedules.spaced_steps(10, 0), "0"),
    "sections negative": (lambda: schedules.spaced_steps(10, "5,-2"), "-2"),
    "sections empty": (lambda: schedules.spaced_steps(10, ()), "()"),
    "sections of words": (lambda: schedules.spaced_steps(10, "5,many"), "5,many"),
    "ddim of no stride": (lambda: schedules.spaced_steps(1000, "ddim37"), "37"),
    "ddim of words": (lambda: schedules.spaced_steps(1000, "ddimx"), "ddimx"),
}


@pytest.mark.parametrize(("call", "value"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_are_one_sentence_that_names_the_value(call, value):
    with pytest.raises(ValueError, match=re.escape(value)) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 200 and message.endswith(".")


def test_the_ddim_error_offers_a_count_that_works():
    with pytest.raises(ValueError) as error:
        schedules.spaced_steps(1000, "ddim37")
    nearest = int(re.search(r"nearest count is (\d+)", str(error.value))[1])
    assert len(schedules.spaced_steps(1000, f"ddim{nearest}")) == nearest


def test_linear_betas_accept_the_shortest_length_and_any_without_rescaling():
    assert schedules.linear_betas(20)[-1] == 1.0
    assert schedules.linear_betas(2, rescale=False)[-1] == 0.02


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedules.linear_betas(0),
        lambda: schedules.cosine_betas(1),
        lambda: schedules.zero_terminal_snr(np.array([0.5])),
    ],
    ids=["linear", "cosine", "zero terminal snr"],
)
def test_fewer_than_two_steps_are_refused_by_name(call):
    words = r"^(num_steps must be an integer in \[2|betas must be at least 2 values), "
    with pytest.raises(ValueError, match=words):
        call()


def test_a_beta_of_1_before_the_last_is_refused():  # its respaced betas would be 0 / 0
    with pytest.raises(ValueError, match=r"the last may be 1, got it at t = 1\."):
        schedules.make_schedule(np.array([0.1, 1.0, 0.5]), keep=[1, 2])
