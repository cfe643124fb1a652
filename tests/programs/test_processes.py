"""Any process of LEVELS in a config: what it builds, and runs of it from end to end."""

import jax
import numpy as np
import pytest
from support.oracles import F32

from jax_diffusion import config as configs
from jax_diffusion import schedules
from jax_diffusion.diffusion import Objective
from jax_diffusion.schedules import LEVELS
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
    chain = schedules.tabulate(schedules.betas_of_levels(levels))
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
            "config.objective.sigma_data = 0.5, got 0.4",
        ),
        (
            {"timesteps": dict(name="log_normal")},
            "config.timesteps.name must fit config.schedule, got 'log_normal', where "
            "schedule must be of the levels of sigma_levels, got those of time_levels",
        ),
        (
            {"schedule": dict(name="cosine", num_steps=50)},
            "config.timesteps.name must fit config.schedule, got 'logit_normal', where "
            "schedule must have real times",
        ),
        ({"timesteps.std": 0.0}, "config.timesteps.std must be a number > 0, got 0"),
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
