"""The optimiser, the averages and the train step."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32, alpha_bars, assert_mean, noise_vars

from jax_diffusion import schedules, timesteps, training
from jax_diffusion.diffusion import Objective
from jax_diffusion.runtime import sharding


class Toy(nn.Module):
    """A network of one convolution and a dropout, to be quick."""

    out_channels: int = 2
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        h = nn.Conv(8, (3, 3))(x) + nn.Dense(8)(timesteps[:, None])[:, None, None]
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        return nn.Conv(self.out_channels, (3, 3))(h)


SCHEDULE = schedules.make_schedule(schedules.cosine_betas(20))
OBJECTIVE = Objective(var_type="learned_range", loss="hybrid")
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8),
    "label": np.zeros(8, np.int32),
}


def build(sampler=None, objective=OBJECTIVE, ema_decays=(0.9, 0.5), **options):
    sampler = sampler or timesteps.uniform(20)
    model = Toy(out_channels=2 if objective.learns_variance else 1)
    tx, _ = training.make_optimizer(lr=1e-2, total_steps=100)
    key = jax.random.key(0)
    state = training.init_state(key, model, tx, sampler, (4, 4, 1), ema_decays)
    step = training.make_train_step(
        model, tx, SCHEDULE, objective, sampler, ema_decays=ema_decays, **options
    )
    return step, state


@functools.cache
def jitted(objective=OBJECTIVE, history=0):
    """A compiled step and a state, which tests share; the sampler may know losses."""
    sampler = timesteps.loss_second_moment(20, history=history) if history else None
    step, state = build(sampler, objective, ema_warmup=False)
    return compiled(step), state


def compiled(step):
    """Compiling is most of these tests' time: quickly is better than well."""
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": "0"})


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_averages_forget_the_start_faster_while_they_warm_up():
    steps = jnp.arange(4)
    np.testing.assert_allclose(
        training.ema_decay_at(0.9, steps), [1 / 10, 2 / 11, 3 / 12, 4 / 13], **F32
    )
    assert training.ema_decay_at(0.9, jnp.asarray(10**6)) == np.float32(0.9)
    assert training.ema_decay_at(0.9, jnp.asarray(0), warmup=False) == 0.9


def test_each_average_follows_its_own_decay():
    step, state = jitted()
    after, _ = step(jax.random.key(1), state, BATCH)
    for name, decay in (("0.9", 0.9), ("0.5", 0.5)):
        for new, old, ema in zip(
            *map(jax.tree.leaves, (after.params, state.params, after.ema_params[name])),
            strict=True,
        ):
            np.testing.assert_allclose(ema, decay * old + (1 - decay) * new, **F32)


def test_the_loss_falls():
    step, state = build(objective=Objective())
    step, losses = compiled(step), []
    for _ in range(60):
        state, metrics = step(jax.random.key(1), state, BATCH)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_state_is_shown_without_its_arrays():  # notebooks show what a cell returns
    _, state = build()
    assert repr(state).startswith("TrainState(step=") and len(repr(state)) < 100


def test_a_step_depends_on_key_state_and_batch_alone():
    step, state = jitted(history=1)
    once = step(jax.random.key(1), state, BATCH)
    assert same(once, step(jax.random.key(1), state, BATCH))
    assert not same(once[0].params, step(jax.random.key(2), state, BATCH)[0].params)


def test_every_step_draws_other_numbers_and_a_resumed_one_the_same():  # B8
    (step, state), key = jitted(), jax.random.key(1)
    state_1, metrics_0 = step(key, state, BATCH)
    again = dataclasses.replace(state_1, params=state.params, opt_state=state.opt_state)
    _, metrics_1 = step(key, again, BATCH)  # the same parameters, one step later
    assert metrics_0["loss"] != metrics_1["loss"]
    restored = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), state_1)
    assert same(step(key, restored, BATCH), step(key, state_1, BATCH))


def test_two_batches_compile_once():
    step, state = build()
    traces = []

    def counted(*args):
        traces.append(1)
        return step(*args)

    jitted = compiled(counted)
    state, _ = jitted(jax.random.key(1), state, BATCH)
    jitted(jax.random.key(1), state, dict(BATCH, image=255 - BATCH["image"]))
    assert len(traces) == 1


def test_quartiles_add_up_to_the_batch():
    step, state = jitted()
    _, metrics = step(jax.random.key(1), state, BATCH)
    quartiles = metrics["quartiles"]
    assert quartiles["count"].sum() == 8
    np.testing.assert_allclose(quartiles["mse"].sum() / 8, metrics["mse"], **F32)


def test_the_loss_aware_sampler_learns_from_unweighted_losses():
    step, state = jitted(history=1)
    after, _ = step(jax.random.key(1), state, BATCH)
    assert after.timestep_state.counts.sum() == 8
    assert np.all(after.timestep_state.losses[after.timestep_state.counts > 0, 0] > 0)


@functools.cache
def quiet_toy(microbatches):
    """Without dropout, whose masks microbatches draw one by one."""
    model = Toy(out_channels=1, dropout=0.0)
    sampler = timesteps.loss_second_moment(20, history=1)
    tx, _ = training.make_optimizer(lr=1e-2, total_steps=100, grad_clip=1.0)
    key = jax.random.key(0)
    averages = (0.9,), (0.1,)
    state = training.init_state(key, model, tx, sampler, (4, 4, 1), *averages)
    step = training.make_train_step(
        model,
        tx,
        SCHEDULE,
        Objective(),
        sampler,
        ema_decays=averages[0],
        ema_widths=averages[1],
        microbatches=microbatches,
    )
    return compiled(step), state


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_give_the_gradient_of_the_whole_batch(microbatches):
    (whole, state), (parts, _) = quiet_toy(1), quiet_toy(microbatches)
    (state_1, one), (state_2, many) = (
        f(jax.random.key(1), state, BATCH) for f in (whole, parts)
    )
    for name in ("loss", "mse", "grad_norm"):
        np.testing.assert_allclose(one[name], many[name], rtol=1e-6)
    # The first moment of Adam is a tenth of the gradient.
    moments = [s.opt_state[1][0].mu for s in (state_1, state_2)]
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max())
    # Losses of examples go back to their places.
    histories = [s.timestep_state for s in (state_1, state_2)]
    for a, b in zip(*map(jax.tree.leaves, histories), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("microbatches", [3, 16])
def test_microbatches_must_divide_the_batch(microbatches):
    step, state = quiet_toy(microbatches)
    with pytest.raises(ValueError, match=f"of 8 images, got {microbatches}"):
        step(jax.random.key(1), state, BATCH)


def test_an_update_that_is_not_finite_changes_the_counts_alone():
    step, state = quiet_toy(1)
    broken = dataclasses.replace(
        state, params=jax.tree.map(lambda a: a.at[0].set(jnp.nan), state.params)
    )
    after, metrics = step(jax.random.key(1), broken, BATCH)
    assert metrics["skipped_in_a_row"] == after.skipped == after.step == 1
    counts = dict(step=broken.step, skipped=broken.skipped)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: np.array_equal(a, b, equal_nan=True),
            dataclasses.replace(after, **counts),
            broken,
        )
    )
    again, metrics = step(jax.random.key(1), after, BATCH)
    assert metrics["skipped_in_a_row"] == again.skipped == 2
    healed = dataclasses.replace(again, params=state.params)
    last, metrics = step(jax.random.key(1), healed, BATCH)
    assert metrics["skipped_in_a_row"] == last.skipped == 0 and last.step == 3
    assert not same(last.params, healed.params)
    assert not same(last.ema_params["width=0.1"], healed.ema_params["width=0.1"])


def test_a_gradient_that_overflows_is_skipped_though_the_loss_is_finite():
    class Cusp(nn.Module):
        """Finite, and its gradient infinite at zero."""

        @nn.compact
        def __call__(self, x, timesteps, *, train=False):
            w = self.param("w", nn.initializers.zeros, ())
            return x * jnp.sqrt(w)

    model, sampler = Cusp(), timesteps.uniform(20)
    tx, _ = training.make_optimizer(lr=1e-2, total_steps=100)
    key = jax.random.key(0)
    state = training.init_state(key, model, tx, sampler, (4, 4, 1), (0.9,))
    step = training.make_train_step(
        model, tx, SCHEDULE, Objective(), sampler, ema_decays=(0.9,)
    )
    after, metrics = compiled(step)(key, state, BATCH)
    assert np.isfinite(metrics["loss"]) and metrics["skipped_in_a_row"] == 1
    assert after.params["w"] == 0


class Labelled(nn.Module):
    """A number for each label, x_t times which it answers: those that a step has moved
    are of labels that it was told.
    """

    num_classes: int = 9

    @nn.compact
    def __call__(self, x, timesteps, label, *, train=False):
        return nn.Embed(self.num_classes, 1)(label)[:, None, None] * x


class Enlarger(nn.Module):
    """Answers the small image, in blocks, times a number that begins at 2."""

    low_res: bool = True

    @nn.compact
    def __call__(self, x, timesteps, *, low_res, train=False):
        scale = self.param("scale", nn.initializers.constant(2.0), ())
        size = x.shape[1] // low_res.shape[1]
        assert size == (2 if train else 1)
        return scale * low_res.repeat(size, axis=1).repeat(size, axis=2)


NUMBERED = dict(BATCH, label=np.arange(8, dtype=np.int32))
SCALED = BATCH["image"] / 127.5 - 1


def build_for(model, **options):
    """A step for this network, of the plainest kind."""
    tx, _ = training.make_optimizer(lr=1e-2, total_steps=100)
    sampler, key = timesteps.uniform(20), jax.random.key(0)
    state = training.init_state(key, model, tx, sampler, (4, 4, 1), (0.9,))
    step = training.make_train_step(
        model, tx, SCHEDULE, Objective(), sampler, ema_decays=(0.9,), **options
    )
    return step, state


def numbers_of(state):
    return np.ravel(state.params["Embed_0"]["embedding"])


@functools.cache
def told(share, *, steps=400, **options):
    """Which numbers of `Labelled` move at each step from one state, [steps, 9]; and the
    losses."""
    step, state = build_for(Labelled(), label_dropout=share, **options)
    batch = jax.tree.map(jnp.asarray, NUMBERED)

    @compiled
    @jax.vmap
    def at(n):
        after, metrics = step(
            jax.random.key(1), dataclasses.replace(state, step=n), batch
        )
        return after.params["Embed_0"]["embedding"][:, 0], metrics["loss"]

    numbers, losses = at(jnp.arange(steps, dtype=jnp.int32))
    return np.asarray(numbers) != numbers_of(state), losses


@functools.cache
def drawn():
    """t and eps of 400 steps. Other keys would change what old runs do."""
    sampler = timesteps.uniform(20)

    @compiled
    @jax.vmap
    def at(n):
        key = jax.random.fold_in(jax.random.key(1), n)
        key_t, key_eps, _ = jax.random.split(key, 3)
        t, weight = sampler.sample(key_t, sampler.init(), 8)
        return t, weight, jax.random.normal(key_eps, (8, 4, 4, 1))

    t, weight, eps = map(np.asarray, at(jnp.arange(400)))
    assert np.all(weight == 1)
    return t, eps


def noised(t, eps):
    signal, noise = (
        np.sqrt(square(SCHEDULE)[t])[:, None, None, None]
        for square in (alpha_bars, noise_vars)
    )
    return signal * SCALED + noise * eps


def test_labels_are_hidden_in_their_share_each_by_itself():
    moved, _ = told(0.3)
    hidden = ~moved[:, :8]
    assert_mean(hidden, 0.3)  # in every row, and, more sharply, in all together
    assert_mean(hidden.ravel(), 0.3)
    rest = hidden - 0.3
    assert_mean(rest[:, :, None] * rest[:, None], 0.21 * np.eye(8))
    assert_mean(rest[1:] * rest[:-1], 0.0)  # new at every step
    # What the network is told instead is its last class.
    np.testing.assert_array_equal(moved[:, 8], hidden.any(axis=1))


def test_which_labels_are_hidden_cannot_be_told_from_timesteps_or_noise():
    hidden = ~told(0.3)[0][:, :8]
    t, eps = drawn()
    assert_mean(t[hidden], 9.5)
    # One key for both would draw both from the same bits, in order of place.
    assert_mean(eps.reshape(400, -1)[:, :8][hidden], 0.0)
    assert_mean(eps[hidden], 0.0)


def test_without_label_dropout_the_loss_is_that_of_all_labels_as_they_are():
    moved, losses = told(0.0, steps=3)
    assert np.all(moved == (np.arange(9) < 8))
    numbers = numbers_of(build_for(Labelled())[1])
    for loss, t, eps in zip(losses, *drawn(), strict=False):
        answer = numbers[:8, None, None, None] * noised(t, eps)
        np.testing.assert_allclose(loss, np.mean((answer - eps) ** 2), **F32)


def test_where_labels_are_hidden_nothing_else_changes():
    numbers = numbers_of(build_for(Labelled())[1])
    for moved, loss, t, eps in zip(*told(0.3), *drawn(), strict=True):
        label = np.where(moved[:8], np.arange(8), 8)
        answer = numbers[label][:, None, None, None] * noised(t, eps)
        np.testing.assert_allclose(loss, np.mean((answer - eps) ** 2), **F32)


def test_microbatches_are_told_the_labels_of_the_whole_batch():
    whole, parts = told(0.3), told(0.3, steps=20, microbatches=4)
    np.testing.assert_array_equal(parts[0], whole[0][:20])
    np.testing.assert_allclose(parts[1], whole[1][:20], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 8])
def test_any_number_of_devices_hides_the_same_labels(count):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    step, state = build_for(Labelled(), label_dropout=0.3)
    before = numbers_of(state)
    step, shardings = sharding.jit_step(mesh, step, state)
    after, metrics = step(
        jax.device_put(jax.random.key(1), sharding.replicated(mesh)),
        jax.device_put(state, shardings),
        sharding.global_batch(mesh, NUMBERED, 8),
    )
    moved, losses = told(0.3)
    assert 0 < moved[0, :8].sum() < 8
    np.testing.assert_array_equal(numbers_of(after) != before, moved[0])
    np.testing.assert_allclose(metrics["loss"], losses[0], rtol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_small_image_is_of_block_means(microbatches):
    step, state = build_for(Enlarger(), low_res_size=2, microbatches=microbatches)
    _, metrics = compiled(step)(jax.random.key(1), state, BATCH)
    means = SCALED.reshape(8, 2, 2, 2, 2, 1).mean(axis=(2, 4))
    eps = drawn()[1][0]
    answer = 2 * np.kron(means, np.ones((1, 2, 2, 1)))
    np.testing.assert_allclose(metrics["loss"], np.mean((answer - eps) ** 2), **F32)
