"""Chains that are cut, or run by somebody else's loop; states of one's own; noise.

The noise of an image depends on its key and on the row of the schedule alone, so that a
chain is the same however it is run. Parametrized over SAMPLERS: a new one is tested.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support import oracles
from support.oracles import F32_SUM, normal
from support.sampler_rows import every_sampler

from jax_diffusion import diffusion, editing, samplers, schedules
from jax_diffusion.diffusion import Prediction
from jax_diffusion.samplers import SAMPLERS

KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(8))
LONG = schedules.make_schedule(schedules.linear_betas(200))
SCHEDULES = {"plain": LONG, "padded": schedules.pad(LONG, 211)}
SHORT = schedules.make_schedule(schedules.cosine_betas(10))
X_T = normal(0, 8, 6)
EVERY = 7  # steps between cuts

every_length = pytest.mark.parametrize("length", SCHEDULES)
PADDED = schedules.pad(SHORT, 12)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Padded schedules are the harder ones, and come in both speeds.
either_length = pytest.mark.parametrize("length", ["padded", slow("plain")])


def step_of(name):
    row = SAMPLERS[name]
    return functools.partial(row.step, **({"eta": 0.7} if row.takes_eta else {}))


def tanh_denoiser(schedule, gain=1.5):
    """Some denoiser that is not linear and sees the whole image."""

    def denoise(x_t, t):
        log_var = schedules.take(schedule, t, x_t.ndim).posterior_log_var
        return Prediction(jnp.tanh(gain * x_t + x_t.mean(axis=1)[:, None]), log_var)

    return denoise


def chain(name, keys, schedule, *, gain=1.5, **options):
    args = (keys, tanh_denoiser(schedule, gain), step_of(name), schedule)
    return samplers.sample(*args, **options)


def pieces_of(schedule, cuts):
    """ts [len(cuts) + 1, T] of the pieces of a chain: what is not of a piece is -1."""
    ts = np.arange(LONG.num_steps)[::-1]
    piece = np.searchsorted(cuts, np.arange(len(ts)), side="right")
    ts = np.where(piece == np.arange(len(cuts) + 1)[:, None], ts, -1)
    front = schedule.num_steps - ts.shape[1]
    return jnp.asarray(np.pad(ts, ((0, 0), (front, 0)), constant_values=-1), jnp.int32)


def assert_same_bits(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Cut chains


@either_length
@every_sampler
def test_a_chain_of_pieces_of_7_steps_is_the_whole_bit_for_bit(name, length):
    schedule = SCHEDULES[length]
    run = jax.jit(functools.partial(chain, name))
    whole = run(KEYS, schedule, state=samplers.start(X_T, step_of(name)))
    ts = np.pad(np.arange(200)[::-1], (0, 3), constant_values=-1)
    state = samplers.start(X_T, step_of(name))
    for piece in jnp.asarray(ts.reshape(-1, EVERY), jnp.int32):
        state = run(KEYS, schedule, state=state, ts=piece)
    assert_same_bits(state, whole)
    if length == "plain":  # another program: it does not return the state's other parts
        x = run(KEYS, schedule, x_T=X_T)
        np.testing.assert_allclose(x, whole.x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_length
@every_sampler
def test_a_chain_cut_at_any_multiple_of_7_is_the_whole_bit_for_bit(name, length):
    schedule = SCHEDULES[length]
    run = jax.jit(functools.partial(chain, name))
    start = samplers.start(X_T, step_of(name))
    whole = run(KEYS, schedule, state=start)
    for cut in range(EVERY, 200, EVERY):
        first, rest = pieces_of(schedule, [cut])
        state = run(KEYS, schedule, state=start, ts=first)
        assert_same_bits(run(KEYS, schedule, state=state, ts=rest), whole)


@pytest.mark.slow
@every_length
@every_sampler
def test_a_cut_chain_is_the_whole_bit_for_bit_within_vmap(name, length):
    schedule = SCHEDULES[length]

    @jax.jit
    def run(x, ts):
        def one(gain, x, ts):
            return chain(name, KEYS, schedule, gain=gain, state=x, ts=ts)

        return jax.vmap(one, in_axes=(0, 0, None))(jnp.array([0.5, 2.0]), x, ts)

    begin = functools.partial(samplers.start, step_fn=step_of(name))
    first = jax.vmap(begin)(jnp.stack([X_T, -X_T]))
    (ts,) = pieces_of(schedule, [])
    whole = run(first, ts)
    assert np.abs(whole.x[0] - whole.x[1]).max() > 1e-2
    state = first
    for piece in pieces_of(schedule, [*range(EVERY, 200, EVERY)]):
        state = run(state, piece)
    assert_same_bits(state, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "kind"), [("padded", AxisType.Explicit), ("plain", AxisType.Auto)]
)
@every_sampler
def test_a_cut_chain_is_the_whole_bit_for_bit_within_shard_map(name, length, kind):
    schedule = SCHEDULES[length]
    mesh = jax.make_mesh((8,), ("b",), axis_types=(kind,))
    images = PartitionSpec("b")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(images, images, PartitionSpec()),
        out_specs=images,
    )
    def run(keys, state, ts):
        return chain(name, keys, schedule, state=state, ts=ts)

    keys, start = jax.device_put(
        (KEYS, samplers.start(X_T, step_of(name))), NamedSharding(mesh, images)
    )
    (ts,) = pieces_of(schedule, [])
    state, whole = start, run(keys, start, ts)
    for piece in pieces_of(schedule, [*range(EVERY, 200, EVERY)]):
        state = run(keys, state, piece)
    assert_same_bits(state, whole)
    one_device = chain(name, KEYS, schedule, x_T=X_T)
    np.testing.assert_allclose(whole.x, one_device, rtol=0, atol=1e-4)


def own_scan(step_fn, keys, denoise_fn, schedule, x_T):
    """The loop of somebody who needs none of ours."""

    def body(state, t):
        ts = jnp.full(x_T.shape[:1], t)
        return step_fn(keys, denoise_fn, schedule, state, ts), None

    ts = jnp.arange(schedule.num_steps, dtype=jnp.int32)[::-1]
    return jax.lax.scan(body, samplers.start(x_T, step_fn), ts)[0]


@every_sampler
def test_a_scan_of_ones_own_with_the_same_keys_is_sample_bit_for_bit(name):
    args = (step_of(name), KEYS, tanh_denoiser(LONG), LONG)
    own = jax.jit(functools.partial(own_scan, *args))(X_T)
    ours = jax.jit(functools.partial(chain, name, KEYS, LONG))(
        state=samplers.start(X_T, step_of(name))
    )
    assert_same_bits(own, ours)


@pytest.mark.parametrize("name", ["ddpm", *map(slow, sorted({*SAMPLERS} - {"ddpm"}))])
def test_steps_that_are_made_by_hand_are_sample(name):
    denoise_fn = tanh_denoiser(SHORT)
    step_fn = jax.jit(functools.partial(step_of(name), KEYS, denoise_fn, SHORT))
    state = samplers.start(X_T, step_fn)
    for t in range(9, -1, -1):
        state = step_fn(state, jnp.full(8, t))
    ours = samplers.sample(KEYS, denoise_fn, step_of(name), SHORT, X_T)
    np.testing.assert_allclose(state.x, ours, **F32_SUM)


MODES, WEIGHTS, MODE_STD = (-0.6, 0.6), (0.3, 0.7), 0.064


def mmd(x, y):
    """Squared maximum mean discrepancy of two sets of numbers, without bias."""

    def mean_kernel(a, b):
        return np.mean(np.exp(-((a[:, None] - b) ** 2) / (2 * 0.2**2)))

    n, m = len(x), len(y)
    own = (n * mean_kernel(x, x) - 1) / (n - 1) + (m * mean_kernel(y, y) - 1) / (m - 1)
    return own - 2 * mean_kernel(x, y)


@functools.cache
def drawn_data(n):
    """n numbers of the mixture, and how far twenty other such sets are at most."""
    rng = np.random.default_rng(0)
    sets = rng.choice(MODES, (21, n), p=WEIGHTS) + MODE_STD * rng.normal(size=(21, n))
    return sets[0], max(mmd(sets[0], other) for other in sets[1:])


@pytest.mark.slow
@every_sampler
def test_a_scan_of_ones_own_with_fixed_keys_samples_the_data(name):
    """The noise of a step is neither that of another step nor missing."""
    n = 2000
    keys = samplers.image_keys(jax.random.key(3), jnp.arange(n))
    x_T = samplers.normal(samplers.fold_in(keys, 12_345), (1,))
    schedule = schedules.make_schedule(schedules.cosine_betas(200))
    denoise_fn = oracles.mixture_denoiser(schedule, MODES, WEIGHTS, MODE_STD)
    own_step = functools.partial(own_scan, step_of(name), keys, denoise_fn, schedule)
    own = np.ravel(jax.jit(own_step)(x_T).x)
    truth, among_truth = drawn_data(n)
    assert mmd(truth, own) < among_truth + 5e-4
    args = (keys, denoise_fn, step_of(name), schedule)
    ours = np.ravel(jax.jit(functools.partial(samplers.sample, *args))(x_T))
    np.testing.assert_allclose(mmd(truth, own), mmd(truth, ours), atol=1e-6)


# States of one's own


class Weighted(NamedTuple):
    x: jax.Array
    x_0: jax.Array
    log_snr: jax.Array
    log_weight: jax.Array
    history: jax.Array
    key: jax.Array
    earlier: tuple = ()  # of a step that reads more than one prediction


Remembering = jax.tree_util.register_dataclass(
    dataclasses.make_dataclass("Remembering", Weighted._fields)
)


def weighing(step_fn):
    """Wraps a step: keeps three predictions, and adds up a weight."""

    def step(keys, denoise_fn, schedule, state, t):
        state = step_fn(keys, denoise_fn, schedule, state, t)
        more = dict(
            log_weight=state.log_weight + t,
            history=jnp.concatenate([state.history[1:], state.x_0[None]]),
        )
        if isinstance(state, Weighted):
            return state._replace(**more)
        return dataclasses.replace(state, **more)

    return step


WRAPPERS = {
    "plain": lambda step_fn: step_fn,
    "inpaint": lambda step_fn: samplers.inpaint(step_fn, X_T, jnp.arange(6) < 2),
    "share_noise": lambda f: samplers.share_noise(f, jax.random.key(5), until=4),
    "on_step": lambda step_fn: samplers.on_step(step_fn, lambda t: None),
}


@pytest.mark.parametrize(
    ("schedule", "kind", "wrapper"),
    [
        (PADDED, Weighted, "plain"),
        slow(SHORT, Weighted, "plain"),
        slow(PADDED, Remembering, "plain"),
        *(slow(PADDED, Weighted, name) for name in WRAPPERS if name != "plain"),
    ],
)
@every_sampler
def test_a_state_of_ones_own_goes_through_sample_and_wrappers(
    name, schedule, kind, wrapper
):
    step_fn = WRAPPERS[wrapper](step_of(name))
    args = (KEYS, tanh_denoiser(schedule))
    more = (jnp.zeros(8), jnp.zeros((3, 8, 6)), jax.random.key(1))
    first = samplers.start(X_T, step_fn)
    state = kind(*first[:3], *more, getattr(first, "earlier", ()))

    @jax.jit
    def run(state):
        step = weighing(step_fn)
        return samplers.sample_frames(
            *args, step, schedule, num_frames=1, state=state
        ), samplers.sample(*args, step, schedule, state=state)

    frames, last = run(state)
    assert isinstance(last, kind)
    x_0 = samplers.sample(*args, step_fn, schedule, X_T)
    np.testing.assert_allclose(last.x, x_0, **F32_SUM)
    np.testing.assert_array_equal(last.log_weight, np.full(8, 45.0))
    np.testing.assert_array_equal(last.history[-1], last.x_0)
    assert np.all(np.any(last.history[0] != last.history[1], axis=1))
    keys = [jax.random.key_data(a.key) for a in (last, state)]
    np.testing.assert_array_equal(*keys)
    np.testing.assert_array_equal(frames.history[-1], last.history)


def test_a_step_that_loses_a_field_of_the_state_is_refused():
    state = Weighted(*samplers.start(X_T), X_T, X_T, X_T)
    args = (KEYS, tanh_denoiser(SHORT))

    def forgetting(keys, denoise_fn, schedule, state, t):
        return samplers.SampleState(state.x, state.x_0, state.log_snr)

    with pytest.raises(ValueError, match=r"^step_fn must return .* got a SampleState"):
        samplers.sample(*args, forgetting, SHORT, state=state)

    def growing(keys, denoise_fn, schedule, state, t):
        return state._replace(history=state.history[:4])

    said = r"^step_fn must .*, with history float32 \[8, 6\], got float32 \[4, 6\]\."
    with pytest.raises(ValueError, match=said):
        samplers.sample(*args, growing, SHORT, state=state)
    with pytest.raises(ValueError, match=r"^state must be given without x_T, got"):
        samplers.sample(*args, samplers.ddpm_step, SHORT, X_T, state=state)


# Which noise is drawn


def test_a_row_that_comes_twice_would_get_the_same_noise_and_is_refused():
    ts = jnp.array([-1, 4, 3, -1, 4, 2], jnp.int32)
    with pytest.raises(ValueError, match=r"^ts must be different rows, got 4 twice\.$"):
        samplers.sample(
            KEYS, tanh_denoiser(SHORT), samplers.ddpm_step, SHORT, X_T, ts=ts
        )


def test_a_step_that_draws_with_the_keys_of_the_chain_as_they_are_is_refused():
    """Every step would get the same noise: until 0.1, keys were new at every step."""

    def old_step(keys, denoise_fn, schedule, state, t):
        return state._replace(x=state.x + samplers.normal(keys, (6,)))

    args = (KEYS, tanh_denoiser(SHORT), old_step, SHORT, X_T)
    said = r"^keys of noise in a step must be those of its row, samplers\.fold_in"
    with pytest.raises(ValueError, match=said):
        samplers.sample(*args)
    shared = samplers.share_noise(old_step, KEYS[0], until=4)
    for step in (shared, samplers.on_step(shared, print)):
        with pytest.raises(ValueError, match=said):
            samplers.sample(KEYS, tanh_denoiser(SHORT), step, SHORT, X_T)
    samplers.normal(KEYS, (6,))  # as x_T may, also after that
    state = samplers.start(X_T)  # in a loop of somebody else keys may be new every time
    shared(KEYS, tanh_denoiser(SHORT), SHORT, state, jnp.full(8, 9))


@every_sampler
@pytest.mark.parametrize(("schedule", "jump"), [(PADDED, 3), slow(SHORT, 10)])
def test_repainting_once_is_inpainting_bit_for_bit(name, schedule, jump):
    run = functools.partial(repainting, step_of(name), schedule)
    repainted = jax.jit(functools.partial(run, jump=jump, resamples=1))()
    inpainted = jax.jit(functools.partial(inpainting, step_of(name), schedule))()
    np.testing.assert_array_equal(repainted, inpainted)


def recorded(monkeypatch, run):
    """The data of all keys with which noise is drawn: [draws, b, 2], in order."""
    drawn, original = [], samplers.normal

    def record(keys, shape):
        data = jax.random.key_data(keys)
        jax.debug.callback(lambda a: drawn.append(np.array(a)), data, ordered=True)
        return original(keys, shape)

    for module in (samplers, samplers.steps, samplers.wrappers, samplers.paths):
        monkeypatch.setattr(module, "normal", record)
    run()
    jax.effects_barrier()
    monkeypatch.undo()
    return np.array(drawn)


def repainting(step_fn, schedule, **options):
    args = (KEYS, tanh_denoiser(schedule), step_fn, schedule)
    return editing.repaint(*args, X_T, X_T, jnp.arange(6) < 2, **options)


def inpainting(step_fn, schedule):
    step_fn = samplers.inpaint(step_fn, X_T, jnp.arange(6) < 2)
    return samplers.sample(KEYS, tanh_denoiser(schedule), step_fn, schedule, X_T)


USES = {  # and how many draws there are
    "inpaint": (inpainting, 20),
    "repaint": (functools.partial(repainting, jump=3, resamples=4), 4 * (20 + 4)),
    "edit": (
        lambda step_fn, schedule: editing.edit(
            KEYS, tanh_denoiser(schedule), step_fn, schedule, X_T, t=9
        ),
        11,
    ),
    "interpolate": (
        lambda step_fn, schedule: samplers.interpolate(
            KEYS, tanh_denoiser(schedule), step_fn, schedule, X_T, X_T, jnp.ones(1), t=9
        ),
        12,
    ),
}


@pytest.mark.parametrize("use", USES)
def test_no_noise_is_drawn_twice(use, monkeypatch):
    """At no row, for no purpose, on no visit; nor that of x_T, drawn with the keys."""
    run, count = USES[use]
    drawn = recorded(monkeypatch, lambda: run(samplers.ddpm_step, PADDED))
    assert drawn.shape == (count, 8, 2)
    drawn = np.concatenate([drawn, jax.random.key_data(KEYS)[None]])
    assert len(np.unique(drawn.reshape(-1, 2), axis=0)) == 8 * (count + 1)


def test_the_first_visit_of_repainting_draws_what_inpainting_draws(monkeypatch):
    args = (samplers.ddpm_step, SHORT)
    once = recorded(monkeypatch, lambda: inpainting(*args))
    often = recorded(monkeypatch, lambda: repainting(*args, jump=10, resamples=2))
    np.testing.assert_array_equal(once, often[:20])


def test_a_step_draws_with_the_row_folded_into_the_keys(monkeypatch):
    args = (KEYS, tanh_denoiser(SHORT), samplers.ddpm_step, SHORT, X_T)
    drawn = recorded(monkeypatch, lambda: samplers.sample(*args))
    rows = jnp.arange(10)[::-1]
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    expected = jax.random.key_data(jax.vmap(fold, in_axes=(None, 0))(KEYS, rows))
    np.testing.assert_array_equal(drawn, expected)


@every_sampler
def test_gradients_go_through_a_cut_chain(name):
    objective = diffusion.Objective("x_0", "fixed_small")

    @jax.jit
    @jax.grad
    def slope(gain, cut):
        denoise_fn = diffusion.denoiser(
            lambda x, timesteps: jnp.tanh(gain * x), SHORT, objective
        )
        args = (KEYS, denoise_fn, step_of(name), SHORT)
        state = samplers.start(X_T, step_of(name))
        rows = SHORT.steps[::-1]
        for ts in (jnp.where(rows >= cut, rows, -1), jnp.where(rows < cut, rows, -1)):
            state = samplers.sample(*args, state=state, ts=ts)
        return jnp.sum(state.x**2)

    cut, whole = slope(1.5, 4), slope(1.5, 0)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    assert abs(whole) > 1e-2
