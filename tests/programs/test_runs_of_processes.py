"""Any process of LEVELS in a config: what it builds, and runs of it from end to end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import F32
from support.tiny_runs import random_params, tiny_config, write_images

import jax_diffusion as jd
from jax_diffusion import config as configs
from jax_diffusion import data, export, pipeline, samplers, schedules, training
from jax_diffusion.diffusion import Objective
from jax_diffusion.interop import exporting
from jax_diffusion.runtime import logs
from jax_diffusion.schedules import LEVELS, take
from jax_diffusion.spacing import SPACINGS

every_family = pytest.mark.parametrize("name", LEVELS)
FLOW = Objective("flow", var_type="fixed_small")


def table(name, num_steps=60, *, steps=None, spacing="sections", **fields):
    group = dict(name=name, num_steps=num_steps, **fields)
    return configs.make_schedule(group, steps=steps, spacing=spacing)


def assert_same(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **F32)


# Schedules


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 12, 60])
def test_trailing_steps_of_a_flow_are_the_flow_of_so_many_steps(steps, shift):
    found = table("flow", steps=steps, spacing="trailing", shift=shift)
    assert_same(found, schedules.from_levels(*LEVELS["flow"](steps, shift=shift)))


@pytest.mark.parametrize("name", ["edm", "vdm", "cosine_log_snr"])
def test_sections_of_a_process_with_both_ends_are_the_process_of_so_many_steps(name):
    found = table(name, 61, steps=13)
    assert_same(found, schedules.from_levels(*LEVELS[name](13)))


@every_family
def test_every_spacing_takes_levels_of_every_process(name):
    full = np.asarray(table(name).timesteps)
    for spacing in SPACINGS:
        kept = table(name, steps=7, spacing=spacing)
        assert 5 <= kept.num_steps <= 7
        assert np.isin(np.asarray(kept.timesteps), full).all()


@every_family
def test_spacing_sees_the_chain_with_the_same_ratios_of_noise_to_signal(name):
    levels = LEVELS[name](30)
    chain = schedules.tabulate(schedules.levels.betas_of_levels(levels))
    np.testing.assert_allclose(
        levels.noise * chain.now.signal, levels.signal * chain.now.noise, rtol=1e-6
    )


def test_a_function_from_outside_may_return_levels():
    group = dict(name="support.processes:half_flow", num_steps=4)
    schedule = configs.make_schedule(group)
    np.testing.assert_allclose(schedule.now.noise, [0.125, 0.25, 0.375, 0.5])
    times = dict(name="logit_normal")
    configs.make_timestep_sampler(times, schedule, FLOW)
    for scale in (-1.0, 3.0):
        with pytest.raises(ValueError, match=r"config\.schedule"):
            configs.make_schedule(group | dict(scale=scale))


class Still:
    """A network whose output is 0, whatever it learns."""

    def init(self, key, *_, **options):
        return {"w": jnp.zeros(())}

    def apply(self, params, x, timesteps, **options):
        return 0 * x * params["params"]["w"]


def test_importance_from_a_config_learns_the_losses_of_a_train_step():
    schedule = configs.make_schedule(dict(name="flow", num_steps=10))
    objective = Objective("flow", weighting=lambda c, t: take(c, t, 1).now.noise ** 2)
    times = dict(name="importance", bins=3, history=4)
    sampler = configs.make_timestep_sampler(times, schedule, objective)
    tx = optax.sgd(0.1)
    args = Still(), tx, schedule, objective, sampler
    step = jax.jit(training.make_train_step(*args, ema_decays=()))
    state = training.step.start_state(Still().init(None), tx, sampler, ())
    images = {"image": jnp.zeros((8, 32, 32, 1))}  # so that loss is s^2 of eps 1
    for _ in range(8):
        state, metrics = step(jax.random.key(0), state, images)
    assert np.all(np.asarray(state.timestep_state.counts) == 4)
    found, ends = np.asarray(state.timestep_state.losses), np.linspace(0.1, 1, 4)
    assert np.all(found > 0.8 * ends[:-1, None] ** 2)
    assert np.all(found < 1.2 * ends[1:, None] ** 2)
    _, weight = sampler.sample(jax.random.key(0), state.timestep_state, 64)
    assert np.isfinite(metrics["loss"]) and np.min(weight) < 0.8


# Refusals

LEARNED = dict(mean_type="flow", var_type="learned_range", loss="hybrid")
EDM = dict(mean_type="x_0", precondition=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule.rescale_timesteps": True}, "config.schedule has no field 'rescale"),
        ({"schedule.zero_terminal_snr": True}, "config.schedule has no field 'zero_te"),
        ({"schedule.shift": 0.0}, "config.schedule.shift must be a number > 0, got 0"),
        ({"schedule.sigma_max": 3.0}, "config.schedule has no field 'sigma_max'"),
        (
            {"schedule": dict(name="cosine", num_steps=50, shift=2.0)},
            "config.schedule has no field 'shift'",
        ),
        (
            {"schedule": dict(name="edm", num_steps=50, sigma_max=0.4)},
            "config.schedule must end in more noise than data, noise / signal above "
            "sigma_data = 0.5, got 0.4",
        ),
        (
            {"timesteps": dict(name="log_normal")},
            "config.timesteps.name must fit config.schedule, got 'log_normal', where "
            "schedule must be of the levels of sigma_levels, got those of time_levels",
        ),
        (
            {"schedule": dict(name="cosine", num_steps=50)},
            "config.timesteps.name must fit config.schedule, got 'logit_normal', where "
            "schedule must be in continuous time",
        ),
        ({"timesteps.std": 0.0}, "config.timesteps.std must be a number > 0, got 0"),
        (
            {"timesteps": dict(name="importance", bins=0)},
            "config.timesteps.bins must be an integer >= 1, got 0",
        ),
        ({"timesteps.num_steps": 5}, "config.timesteps has no field 'num_steps'"),
        ({"timesteps.schedule": 5}, "config.timesteps.schedule must be left out"),
        ({"objective": LEARNED}, "config.timesteps.name must be one of"),
        ({"objective.mean_type": "mu"}, "config.timesteps.name must be one of"),
        ({"objective.weighting": "vdm"}, "config.timesteps.name must be one of"),
        ({"objective.mean_type": "eps"}, "config.objective.mean_type must be 'v', 'fl"),
        ({"objective.mean_type": "v"}, "config.objective.mean_type must be 'flow'"),
        (
            {"objective.precondition": True},
            "config.objective.precondition must be False unless mean_type is 'x_0', "
            "got True and 'flow'",
        ),
        ({"objective.sigma_data": 0.0}, "config.objective.sigma_data must be a number"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_process_is_refused_in_one_sentence(changes, words):
    config = configs.load_config("configs/digits_flow.py")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        for field, value in changes.items():
            group, _, name = field.partition(".")
            config[group] = {**config[group], name: value} if name else value
        configs.check_config(config)
        built = configs.build(config, 1)
        configs.make_timestep_sampler(config.timesteps, *built[:2])
    assert str(error.value).startswith(words)


def test_an_error_of_ones_own_timesteps_comes_as_it_is(monkeypatch):
    def picky(schedule):
        raise ValueError("schedule of mine must be another one.")

    monkeypatch.setattr("support.networks.picky", picky, raising=False)
    schedule = configs.make_schedule(dict(name="cosine", num_steps=5))
    with pytest.raises(ValueError, match=r"schedule of mine must be") as error:
        configs.make_timestep_sampler(dict(name="support.networks:picky"), schedule)
    assert "must fit config.schedule" not in str(error.value)


def test_a_learned_variance_is_refused_where_the_loss_does_not_train_it(tmp_path):
    learned = dict(mean_type="flow", var_type="learned_range", loss="l2")
    flow = dict(name="flow", num_steps=20)
    config = tiny_config(tmp_path / "none.npz", schedule=flow, objective=learned)
    with pytest.raises(ValueError, match=r"^config\.objective\.loss must be one of"):
        jd.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# From end to end

FIXED = dict(var_type="fixed_small", loss="l2")
LEARNED_V = dict(mean_type="v", var_type="learned_range", loss="hybrid")
LOG_SNR = dict(log_snr_min=-6.0, log_snr_max=8.0)
RUNS = {
    "flow": dict(
        schedule=dict(name="flow", num_steps=20, shift=2.0),
        objective=dict(mean_type="flow", **FIXED),
        timesteps=dict(name="logit_normal"),
    ),
    "logit_normal": dict(
        schedule=dict(name="logit_normal", num_steps=20),
        objective=dict(mean_type="flow", var_type="learned_range", loss="hybrid"),
        timesteps=dict(name="loss_second_moment", history=1),
    ),
    "edm": dict(
        schedule=dict(name="edm", num_steps=20, sigma_max=20.0),
        objective=dict(mean_type="x_0", weighting="edm", precondition=True, **FIXED),
        timesteps=dict(name="log_normal"),
    ),
    "vdm": dict(
        schedule=dict(name="vdm", num_steps=20, **LOG_SNR),
        objective=dict(mean_type="eps", weighting="vdm", **FIXED),
        timesteps=dict(name="stratified"),
    ),
    "cosine_log_snr": dict(
        schedule=dict(name="cosine_log_snr", num_steps=20, **LOG_SNR),
        objective=dict(mean_type="v", weighting="sigmoid", **FIXED),
        timesteps=dict(name="low_discrepancy"),
    ),
    "laplace": dict(
        schedule=dict(name="laplace", num_steps=20),
        objective=LEARNED_V,
        timesteps=dict(name="uniform"),
    ),
}
NUMBERS = ["bits_per_dim", "prior", "kl", "decoder", "rmse", "nll_ode"]


def train_run(name, folder, steps=4):
    write_images(folder / "images.npz", size=4, channels=1)
    config = tiny_config(folder / "images.npz", **RUNS[name], total_steps=steps)
    jd.train(config, folder / "run")
    return jd.load_run(folder / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run of a process, made once."""
    return functools.cache(lambda name: train_run(name, tmp_path_factory.mktemp(name)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nll_ode needs")  # they are untrained
@every_family
def test_a_run_of_every_process_trains_draws_and_scores(name, trained):
    run = trained(name)
    log = logs.read_metrics(run.workdir)
    assert all(np.isfinite(line["loss"]) for line in log)
    assert any(f"loss_q{q}" in log[-1] for q in range(4))
    images = jd.sample_images(run, n=3, steps=6)
    assert images.shape == (3, 4, 4, 1) and images.std() > 0
    found = jd.evaluate(run, metrics=["bpd", "nll_ode"], bpd_images=4, ode_probes=1)
    values = {score.metric: score.value for score in found}
    assert all(np.isfinite(values[name]) for name in NUMBERS)
    assert values["bits_per_dim"] > 0 and values["prior"] >= 0


# A timestep sampler with a state and a learned variance; a preconditioned network.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["logit_normal", "edm"])
def test_a_run_of_a_process_resumes_and_is_exported(name, trained, tmp_path):
    run = trained(name)
    train_run(name, tmp_path, steps=2)
    parts = train_run(name, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, run.params, parts.params)
    images = jd.sample_images(run, n=3, steps=6)
    options = pipeline.SamplingOptions(steps=6)
    pipeline.export_sampler(tmp_path / "e.jaxexport", run, options)
    exported = export.read(tmp_path / "e.jaxexport")(0, np.arange(3))
    exported = data.to_uint8(np.asarray(exported), "floor")
    assert np.abs(np.int32(exported) - images).max() <= 1
    exporting.export_run(run, "safetensors", tmp_path / "own.safetensors")
    back = jd.load_checkpoint(tmp_path / "own.safetensors", config=run.config)
    np.testing.assert_array_equal(jd.sample_images(back, n=3, steps=6), images)


@pytest.mark.slow
def test_what_is_drawn_from_edm_starts_at_sigma_max(tmp_path):
    """A network that predicts 0 leaves one step of DDIM at x_T times a ratio."""
    group = dict(name="edm", num_steps=20)
    objective = dict(mean_type="eps", var_type="fixed_small", loss="l2")
    config = tiny_config("none", schedule=group, objective=objective)
    built = configs.build(config, 1)
    params = jax.tree.map(jnp.zeros_like, random_params(built.model, (4, 4, 1)))
    run = pipeline.Run(config, built.model, params, built.objective, (4, 4, 1))
    options = pipeline.SamplingOptions(steps=20, clip=False)
    bound = pipeline.bind_sampler(run, options)
    rows = {"ids": np.arange(8, dtype=np.int32), "label": np.zeros(8, np.int32)}
    x = bound.draw({"model": params}, bound.schedule, np.uint32(0), rows, bound.numbers)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(8))
    np.testing.assert_allclose(x[-1], 80 * samplers.normal(keys, (4, 4, 1)), rtol=1e-5)
