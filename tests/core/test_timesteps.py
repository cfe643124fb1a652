"""Samplers of training timesteps: what they draw, and that their weights are fair."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32, F32_SUM, assert_mean

from jax_diffusion import diffusion, losses, schedules, timesteps

NUM_STEPS = 10

every_sampler = pytest.mark.parametrize("name", timesteps.SAMPLERS)


def draw(sampler, state, *, batch_size=4):
    """t and weight of many batches, [2000, batch_size]."""
    keys = jax.random.split(jax.random.key(0), 2000)
    return jax.lax.map(lambda key: sampler.sample(key, state, batch_size), keys)


def with_history(sampler, losses):
    """A full state whose every entry at t is losses[t]."""
    state = sampler.init()
    t = jnp.tile(jnp.arange(len(losses), dtype=jnp.int32), 20)
    return sampler.update(state, t, jnp.tile(jnp.asarray(losses, jnp.float32), 20))


@every_sampler
def test_first_draws_are_uniform_int32_in_range_and_weigh_one(name):  # B12, B13
    sampler = timesteps.SAMPLERS[name](NUM_STEPS)
    t, weight = draw(sampler, sampler.init())
    assert t.dtype == jnp.int32 and t.shape == (2000, 4) == weight.shape
    assert (np.min(t), np.max(t)) == (0, NUM_STEPS - 1)
    np.testing.assert_allclose(weight, 1.0, **F32)
    # at every place of the batch
    assert_mean(np.asarray(t)[..., None] == np.arange(NUM_STEPS), 1 / NUM_STEPS)


@every_sampler
def test_the_state_is_a_pytree_that_jit_carries_with_its_dtypes(name):
    sampler = timesteps.SAMPLERS[name](NUM_STEPS)

    @jax.jit
    def step(key, state):
        t, weight = sampler.sample(key, state, 4)
        return sampler.update(state, t, weight)

    state = sampler.init()
    after = step(jax.random.key(0), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_uniform_draws_are_independent_within_a_batch():
    sampler = timesteps.uniform(NUM_STEPS)
    t, _ = draw(sampler, sampler.init(), batch_size=2)
    centered = np.asarray(t) - (NUM_STEPS - 1) / 2
    assert_mean(centered[:, 0] * centered[:, 1], 0.0)


@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_antithetic_draws_are_pairs_that_sum_to_the_last_step(batch_size):
    sampler = timesteps.antithetic(NUM_STEPS)
    t, _ = draw(sampler, sampler.init(), batch_size=batch_size)
    t = np.asarray(t)
    assert t.shape == (2000, batch_size)
    first = batch_size // 2 + 1  # as many independent draws as the official code makes
    np.testing.assert_array_equal(t[:, first:] + t[:, : batch_size - first], 9)


@pytest.mark.parametrize("num_steps", [10, 100])
def test_a_stratified_batch_of_T_is_every_step_once(num_steps):
    sampler = timesteps.stratified(num_steps)
    t, _ = draw(sampler, sampler.init(), batch_size=num_steps)
    np.testing.assert_array_equal(
        np.sort(t, axis=1), np.tile(np.arange(num_steps), (2000, 1))
    )


def test_a_stratified_batch_has_one_step_in_each_part():
    sampler = timesteps.stratified(1000)
    t, _ = draw(sampler, sampler.init(), batch_size=8)
    gaps = np.diff(np.sort(t, axis=1))
    assert np.all(np.abs(gaps - 125) <= 1)


def test_loss_second_moment_draws_by_root_mean_square_loss():
    sampler = timesteps.loss_second_moment(3, history=2, uniform_prob=0.0)
    t = jnp.array([0, 0, 1, 1, 2, 2], jnp.int32)
    state = sampler.update(sampler.init(), t, jnp.array([1.0, 1, 1, 7, 4, 4]))
    drawn, weight = draw(sampler, state)
    # root mean squares 1, 5, 4: chances 0.1, 0.5, 0.4 and weights 1 / (3 p)
    drawn = np.asarray(drawn).ravel()
    assert_mean(drawn[:, None] == np.arange(3), np.array([0.1, 0.5, 0.4]))
    weight_of = np.array([10 / 3, 2 / 3, 5 / 6])
    np.testing.assert_allclose(np.ravel(weight), weight_of[drawn], **F32_SUM)


def test_uniform_prob_keeps_every_step_possible():
    sampler = timesteps.loss_second_moment(4, uniform_prob=0.2)
    state = with_history(sampler, [0.0, 0.0, 0.0, 1.0])
    t, _ = draw(sampler, state)
    chances = np.array([0.05, 0.05, 0.05, 0.85])
    assert_mean(np.ravel(t)[:, None] == np.arange(4), chances)


def test_losses_that_are_all_zero_do_not_break_the_sampler():
    sampler = timesteps.loss_second_moment(4)
    state = with_history(sampler, [0.0, 0.0, 0.0, 0.0])
    t, weight = draw(sampler, state)
    assert np.all(np.isfinite(weight)) and set(np.unique(t)) <= set(range(4))


@every_sampler
def test_the_weighted_loss_is_an_unbiased_mean_over_uniform_steps(name):
    sampler = timesteps.SAMPLERS[name](NUM_STEPS)
    state = with_history(sampler, 1.0 + np.arange(NUM_STEPS))
    t, weight = draw(sampler, state)
    loss = np.asarray(t, np.float64) ** 2  # any function of t; its mean is 28.5
    assert_mean((weight * loss).mean(axis=1), 28.5)


def test_loss_second_moment_is_uniform_until_every_step_has_its_history():
    sampler = timesteps.loss_second_moment(3, history=2)
    t = jnp.array([0, 0, 0, 1, 1, 2], jnp.int32)  # t = 2 once only
    state = sampler.update(sampler.init(), t, 9.0 ** jnp.arange(6))
    _, weight = draw(sampler, state)
    np.testing.assert_allclose(weight, 1.0, **F32)
    state = sampler.update(state, jnp.array([2], jnp.int32), jnp.array([1.0]))
    _, weight = draw(sampler, state)
    assert np.ptp(weight) > 0.5


def test_history_keeps_the_last_losses_also_of_a_step_repeated_in_a_batch():
    sampler = timesteps.loss_second_moment(2, history=3)
    t = jnp.array([1, 0, 1, 1, 1, 1], jnp.int32)
    state = sampler.update(sampler.init(), t, jnp.arange(6.0))
    np.testing.assert_array_equal(state.losses, [[1, 0, 0], [3, 4, 5]])
    np.testing.assert_array_equal(state.counts, [1, 3])


def test_one_update_equals_as_many_updates_of_one():
    sampler = timesteps.loss_second_moment(4, history=3)
    rng = np.random.default_rng(0)
    t, loss = jnp.asarray(rng.integers(4, size=40)), jnp.asarray(rng.random(40))
    update = jax.jit(sampler.update)
    at_once = one_by_one = sampler.init()
    at_once = update(at_once, t, loss)
    for i in range(40):
        one_by_one = update(one_by_one, t[i : i + 1], loss[i : i + 1])
    jax.tree.map(np.testing.assert_array_equal, at_once, one_by_one)


@pytest.mark.parametrize("num_steps", [1000, 4000])
def test_large_stratified_batches_visit_every_step_once(num_steps):
    sampler = timesteps.stratified(num_steps)
    draw = jax.jit(lambda key: sampler.sample(key, (), num_steps)[0])
    for seed in range(50):
        t = np.sort(draw(jax.random.key(seed)))
        np.testing.assert_array_equal(t, np.arange(num_steps))


# Continuous time

FLOW = schedules.from_levels(*schedules.flow_levels(50))
EDM = schedules.from_levels(*schedules.edm_levels(50))
VDM = schedules.from_levels(*schedules.vdm_levels(50))


@pytest.mark.parametrize(
    ("sampler", "measure", "inverse"),
    [
        (
            timesteps.logit_normal_times(FLOW, mean=0.3, std=0.8),
            lambda levels: np.log(levels.noise / levels.signal),
            NormalDist(0.3, 0.8).cdf,
        ),
        (
            timesteps.log_normal_sigmas(EDM, mean=-0.4, std=1.0),
            lambda levels: np.log(levels.noise),
            NormalDist(-0.4, 1.0).cdf,
        ),
        (
            timesteps.low_discrepancy_times(FLOW),
            lambda levels: np.asarray(levels.noise),
            lambda s: (s - 0.02) / 0.98,
        ),
        (
            timesteps.low_discrepancy_times(VDM),
            lambda levels: np.asarray(levels.timesteps),
            lambda log_snr: (13.3 - log_snr) / 18.3,
        ),
    ],
    ids=["logit_normal", "log_normal", "uniform_s", "uniform_log_snr"],
)
def test_drawn_levels_have_one_quantile_in_each_part(sampler, measure, inverse):
    levels, weight = sampler.sample(jax.random.key(0), (), 16)
    shares = np.sort([inverse(float(x)) for x in measure(levels)])
    np.testing.assert_allclose(np.diff(shares), 1 / 16, atol=2e-4)
    np.testing.assert_array_equal(weight, 1.0)


@pytest.mark.parametrize("schedule", [FLOW, EDM, VDM], ids=["flow", "edm", "vdm"])
def test_levels_at_rows_train_as_the_rows_do(schedule):
    t = jnp.array([3, 40, 17, 48], jnp.int32)
    levels = schedules.Levels(*(a[t] for a in schedule.now[:2]), schedule.timesteps[t])
    np.testing.assert_array_equal(timesteps.rows_of(schedule, levels), t)
    objective = diffusion.Objective("x_0", weighting="edm", precondition=True)
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 4, 3))

    def loss(table, rows):
        args = jax.random.key(0), lambda x, t: x * t[:, None], table, objective
        return losses.training_loss(*args, x_0, rows, eps=eps).loss

    own = jax.jit(lambda levels: loss(*timesteps.table_of(schedule, levels)))(levels)
    np.testing.assert_allclose(own, loss(schedule, t), rtol=1e-4)


def test_rows_of_levels_between_rows_and_beyond_them():
    s = jnp.array([1e-6, 0.025, 0.35, 0.615, 0.99999])
    assert timesteps.rows_of(FLOW, schedules.time_levels(s)).tolist() == [
        0,
        0,
        17,
        30,
        48,
    ]
    sigma = schedules.sigma_levels(jnp.array([1e-4, 1e4]))
    for schedule in (EDM, schedules.pad(EDM, 60)):
        assert timesteps.rows_of(schedule, sigma).tolist() == [0, 49]


@pytest.mark.parametrize("make", timesteps.LEVEL_SAMPLERS.values())
def test_chains_of_betas_are_not_in_continuous_time(make):
    chain = schedules.make_schedule(schedules.cosine_betas(10))
    with pytest.raises(ValueError, match=r"^schedule must be in continuous time"):
        make(chain)


# Importance


def with_losses(sampler, schedule, loss_fn):
    """A state that knows, at even u, the losses loss_fn(u)."""
    rows = np.linspace(0, 1, schedule.num_steps)
    u = np.tile((np.arange(400) + 0.5) / 400, 10).astype(np.float32)
    number = jnp.interp(u, rows, schedule.now.noise)
    process = schedules.time_levels if schedule is FLOW else schedules.sigma_levels
    update = jax.jit(sampler.update)
    return update(sampler.init(), process(number), jnp.float32(loss_fn(u)))


def test_importance_draws_parts_by_root_mean_square_loss_and_is_uniform_within():
    sampler = timesteps.importance_sampled(FLOW, bins=4, history=3, uniform_prob=0.0)
    chances = np.array([0.1, 0.2, 0.3, 0.4])
    state = with_losses(sampler, FLOW, lambda u: 1 + np.floor(4 * u))
    np.testing.assert_array_equal(state.losses, np.tile([[1], [2], [3], [4]], 3))
    levels, weight = draw(sampler, state)
    places = (np.ravel(levels.noise) - 0.02) / 0.98 * 4
    part = np.floor(places).astype(int)
    assert_mean(part[:, None] == np.arange(4), chances)
    assert_mean(places - part, 0.5)
    np.testing.assert_allclose(np.ravel(weight), 1 / (4 * chances[part]), rtol=1e-5)


@pytest.mark.parametrize("knows", [False, True])
def test_the_weighted_loss_of_importance_is_an_unbiased_mean_over_uniform_u(knows):
    sampler = timesteps.importance_sampled(FLOW, bins=8)
    state = with_losses(sampler, FLOW, lambda u: 0.1 + u**2)
    levels, weight = draw(sampler, state if knows else sampler.init())
    assert np.ptp(weight) > 1 if knows else np.all(np.abs(weight - 1) < 1e-5)
    loss = np.asarray(levels.noise, np.float64) ** 2  # of uniform s in [0.02, 1]
    assert_mean((weight * loss).mean(axis=1), (1 - 0.02**3) / 3 / 0.98)


@pytest.mark.parametrize("schedule", [FLOW, EDM], ids=["flow", "edm"])
def test_importance_remembers_a_loss_in_the_part_that_it_is_drawn_from(schedule):
    sampler = timesteps.importance_sampled(schedule, bins=7, history=2)
    state = with_losses(sampler, schedule, lambda u: np.floor(7 * u))
    np.testing.assert_array_equal(state.losses, np.tile(np.arange(7)[:, None], 2))
    levels, _ = sampler.sample(jax.random.key(0), state, 5)
    with pytest.raises(ValueError, match=r"^t must be the drawn Levels, got "):
        sampler.update(state, jnp.arange(5, dtype=jnp.int32), levels.noise)


def test_importance_of_no_parts_is_refused():
    with pytest.raises(ValueError, match=r"^bins must be an integer >= 1, got 0"):
        timesteps.importance_sampled(FLOW, bins=0)
