"""A denoiser that is made with one schedule is refused beside another one.

The table holds every function that takes both, and every wrapper of a denoiser.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import normal

from jax_diffusion import diffusion, editing, guidance, likelihood, samplers, schedules
from jax_diffusion.diffusion import Prediction
from jax_diffusion.samplers import SAMPLERS

BETAS = schedules.cosine_betas(20)
S = schedules.make_schedule(BETAS)
OTHERS = {  # schedules in whose place S was meant, and what is said of them
    "other betas": (schedules.make_schedule(schedules.linear_betas(20)), "other betas"),
    "respaced": (schedules.make_schedule(BETAS, keep=[*range(0, 20, 2)]), "for 10, wi"),
    "shifted": (schedules.make_schedule(BETAS, keep=[*range(20)][1:]), "for 19, with"),
    "other timesteps": (
        schedules.make_schedule(BETAS, rescale_timesteps=True),
        "with other timesteps in row 1",
    ),
    "longer": (
        schedules.make_schedule(np.append(BETAS, 0.5)),
        "for 21",
    ),
    "padded": (
        schedules.pad(schedules.make_schedule(schedules.linear_betas(20)), 24),
        "other betas",
    ),
}
SAME = {  # other objects that are the same
    "itself": S,
    "made again": schedules.make_schedule(BETAS),
    "padded": schedules.pad(S, 24),
    "of float64": schedules.tabulate(BETAS),
    "cut": schedules.make_schedule(BETAS[:9]),
}
KEY, KEYS = jax.random.key(0), samplers.image_keys(jax.random.key(0), jnp.arange(2))
X, T = jnp.tanh(normal(0, 2, 4, 4, 1)), jnp.array([3, 3])
STATE = samplers.start(X)
MASK = jnp.ones((4, 4, 1))


def model_fn(x, timesteps, **conditioning):
    return jnp.tanh(x + 1e-3 * timesteps[:, None, None, None])


def made(schedule):
    return diffusion.denoiser(model_fn, schedule, diffusion.Objective("v"))


def log_prob(x, timesteps):
    return -jnp.sum(x**2, axis=(1, 2, 3))


def first_value(x_0):
    return -x_0[:, 0, 0, 0]


WRAPPERS = {  # of a denoiser f that is made with schedule s
    "clip_x_0": lambda f, s: diffusion.clip_x_0(f),
    "threshold_x_0": lambda f, s: diffusion.threshold_x_0(f),
    "classifier_free": lambda f, s: guidance.classifier_free(f, T, 0, 2.0),
    "autoguidance": lambda f, s: guidance.autoguidance(f, f, 2.0),
    "autoguidance by another": lambda f, s: guidance.autoguidance(
        lambda x, t: f(x, t), f, 2.0
    ),
    "adaptive_projected": lambda f, s: guidance.adaptive_projected(f, f, 2.0),
    "zero_star": lambda f, s: guidance.zero_star(f, f, 2.0, schedule=s),
    "classifier": lambda f, s: guidance.classifier(f, s, log_prob),
    "posterior": lambda f, s: guidance.posterior(f, lambda x_0: -x_0.sum((1, 2, 3))),
    "shift_x_0": lambda f, s: guidance.shift_x_0(f, s),
    "partial": lambda f, s: functools.partial(f, label=T),
    "jit": lambda f, s: jax.jit(f),
    "checkpoint": lambda f, s: jax.checkpoint(f),
    "wraps": lambda f, s: functools.wraps(f)(lambda x, t: f(x, t)),
    "all": lambda f, s: diffusion.clip_x_0(
        guidance.shift_x_0(
            guidance.classifier(
                functools.partial(guidance.classifier_free(f, T, 0, 2.0)), s, log_prob
            ),
            s,
        )
    ),
}


def step_call(step_fn):
    state = samplers.start(X, step_fn)
    return lambda f, s: step_fn(KEYS, f, s, state, jnp.full(2, 3))


ddim = samplers.ddim_step
CALLS = {  # everything that takes a denoiser f and a schedule s
    **{name: step_call(row.step) for name, row in SAMPLERS.items()},
    "ddim_inversion_step": step_call(samplers.ddim_inversion_step),
    "inpaint": step_call(samplers.inpaint(ddim, X, MASK)),
    "share_noise": step_call(samplers.share_noise(ddim, KEY, until=2)),
    "on_step": step_call(samplers.on_step(ddim, lambda t: None)),
    "sample": lambda f, s: samplers.sample(KEYS, f, ddim, s, X),
    "sample with a step of one's own": lambda f, s: samplers.sample(
        KEYS, f, lambda keys, f, s, state, t: state, s, X
    ),
    "sample from a state": lambda f, s: samplers.sample(KEYS, f, ddim, s, state=STATE),
    "sample_frames": lambda f, s: samplers.sample_frames(
        KEYS, f, ddim, s, X, num_frames=1
    ),
    "invert": lambda f, s: samplers.invert(f, s, X),
    "interpolate": lambda f, s: samplers.interpolate(
        KEYS, f, ddim, s, X, X, jnp.ones(1), t=3
    ),
    "repaint": lambda f, s: editing.repaint(KEYS, f, ddim, s, X, X, MASK),
    "edit": lambda f, s: editing.edit(KEYS, f, ddim, s, X, t=3),
    "descend": lambda f, s: editing.descend(KEYS, f, ddim, s, X, t=3),
    "reconstruct": lambda f, s: editing.reconstruct(KEYS, f, s, X, t=3),
    "dps": lambda f, s: editing.dps(KEYS, f, ddim, s, X, first_value),
    "twisted_smc": lambda f, s: editing.twisted_smc(KEYS, f, s, X, first_value),
    "between_noises": lambda f, s: editing.between_noises(
        KEYS, f, ddim, s, X, X, jnp.ones(1)
    ),
    "bits_per_dim": lambda f, s: likelihood.bits_per_dim(KEY, f, s, X),
    "ode_bits_per_dim": lambda f, s: likelihood.ode_bits_per_dim(KEY, f, s, X),
    "ode_log_prob": lambda f, s: likelihood.ode_log_prob(KEY, f, s, X, probes=1),
    "classifier": lambda f, s: guidance.classifier(f, s, log_prob),
    "shift_x_0": lambda f, s: guidance.shift_x_0(f, s),
    "zero_star": lambda f, s: guidance.zero_star(f, f, 2.0, schedule=s),
}
RULE = r"^denoise_fn must be made with the schedule that it is used with, got one of "


def public_functions_of(*arguments):
    """Names of public functions that take arguments of these names."""
    for module in (diffusion, guidance, samplers, editing, likelihood):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith(("_", "check_")):
                if {*arguments} <= {*inspect.signature(function).parameters}:
                    yield name


def test_the_tables_hold_every_function():
    both = {*public_functions_of("denoise_fn", "schedule")}
    assert {name.removesuffix("_step") for name in both} - {
        name.removesuffix("_step") for name in CALLS
    } == set()
    wrappers = {*public_functions_of("denoise_fn")} - both
    assert wrappers <= {*WRAPPERS}


@pytest.mark.parametrize("other", OTHERS)
def test_sampling_on_another_schedule_is_refused(other):
    schedule, said = OTHERS[other]
    with pytest.raises(ValueError, match=f"{RULE}20 steps.*{said}.*"):
        CALLS["sample"](made(S), schedule)


@pytest.mark.parametrize("call", CALLS)
def test_everything_that_takes_a_denoiser_and_a_schedule_refuses_another_one(call):
    schedule, _ = OTHERS["respaced"]
    with pytest.raises(ValueError, match=RULE):
        CALLS[call](made(S), schedule)
    with pytest.raises(ValueError, match=RULE):  # both are known within jit
        jax.jit(lambda: CALLS[call](made(S), schedule) and None)()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_of_a_denoiser_knows_its_schedule(wrapper):
    denoise_fn = WRAPPERS[wrapper](made(S), S)
    assert diffusion.schedule_of(denoise_fn) is S
    with pytest.raises(ValueError, match=RULE):
        CALLS["sample"](denoise_fn, OTHERS["respaced"][0])


def test_a_scale_of_another_schedule_is_refused():
    scale = guidance.within(S, 3.0)
    said = r"^scale must be made with the schedule that it is used with, got one of 20 "
    f = made(OTHERS["respaced"][0])
    with pytest.raises(ValueError, match=said):
        guidance.classifier_free(f, T, 0, scale)
    with pytest.raises(ValueError, match=said):
        guidance.classifier(f, OTHERS["respaced"][0], log_prob, scale)
    guidance.classifier_free(made(S), T, 0, scale)
    guidance.classifier_free(lambda x, t, label: None, T, 0, scale)  # does not say


def test_a_weaker_denoiser_of_another_schedule_is_refused():
    said = r"^weak_fn must be made with the schedule that it is used with, got one of "
    for method in guidance.GUIDANCE_METHODS.values():
        with pytest.raises(ValueError, match=said):
            method(made(S), made(OTHERS["respaced"][0]), 2.0)


@pytest.mark.parametrize("same", SAME)
def test_a_schedule_that_is_the_same_is_accepted(same):
    found = CALLS["descend"](made(S), SAME[same])
    np.testing.assert_allclose(found, CALLS["descend"](made(S), S), atol=1e-5)
    diffusion.check_schedule_of(made(schedules.pad(S, 30)), S)


def test_a_table_with_churn_is_the_same_as_another_copy_of_it_and_no_chain():
    sigma = [0.5, 1.0, 2.0]
    made_of, same = (schedules.churned(sigma, churn=1.0) for _ in range(2))
    denoise_fn = diffusion.denoiser(model_fn, made_of, diffusion.Objective("x_0"))
    for other in (same, schedules.pad(same, 12)):
        diffusion.check_schedule_of(denoise_fn, other)
    for other in (
        schedules.churned([0.4, 1.0, 2.0], churn=1.0),
        schedules.from_levels(*schedules.sigma_levels(np.array([0.5, 1, 1.5, 2, 3]))),
    ):
        with pytest.raises(ValueError, match=RULE):
            diffusion.check_schedule_of(denoise_fn, other)


TRACED = {  # made of, and used with, one of them traced; what is said
    "t beyond its table": (S, SAME["padded"], "20 rows for 24"),
    "padded, too short": (schedules.pad(S, 22), SAME["padded"], "20 rows for 24"),
    "rows beyond the other": (S, SAME["cut"], "20 rows for 9"),
}


@pytest.mark.parametrize("case", TRACED)
def test_a_traced_schedule_whose_length_cannot_fit_is_refused(case):
    own, other, said = TRACED[case]
    with pytest.raises(ValueError, match=f"{RULE}{said}; within jax.jit, make it ther"):
        jax.eval_shape(lambda s: CALLS["sample"](made(own), s), other)


def test_a_schedule_beside_a_traced_one_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=f"{RULE}9 rows for 20; within jax.jit, make"):
        jax.eval_shape(lambda s: CALLS["sample"](made(s), S), SAME["cut"])


def test_a_traced_schedule_of_fitting_length_is_accepted():
    def sample(own, other):
        return CALLS["sample"](made(own), other)

    for known in (S, SAME["padded"], SAME["cut"]):
        jax.eval_shape(lambda s, known=known: sample(s, known), S)
    for known in (S, SAME["padded"]):
        jax.eval_shape(lambda s, known=known: sample(known, s), S)
    jax.eval_shape(sample, SAME["padded"], S)  # both are traced


def test_schedules_that_are_traced_and_functions_that_do_not_say_pass():
    other, _ = OTHERS["other betas"]
    jax.eval_shape(lambda s: CALLS["sample"](made(S), s), other)
    jax.eval_shape(lambda s: CALLS["sample"](made(s), other), S)
    f = made(S)
    jax.eval_shape(lambda: CALLS["sample"](lambda x, t: f(x, t), other))

    def plain(x_t, t):
        return Prediction(x_t, jnp.zeros(()))

    assert diffusion.schedule_of(diffusion.clip_x_0(plain)) is None
    assert diffusion.schedule_of(guidance.classifier(plain, S, log_prob)) is S


def test_a_denoiser_that_holds_the_schedule_of_its_training_meets_others():
    class Own:
        schedule = S

        def __call__(self, x_t, t):
            return Prediction(x_t, jnp.zeros(()))

    other, _ = OTHERS["respaced"]
    for denoise_fn in (Own(), diffusion.clip_x_0(Own())):
        assert CALLS["sample"](denoise_fn, other).shape == X.shape


def test_vmap_over_schedules_is_not_hindered():
    pair = jax.tree.map(lambda *a: jnp.stack(a), S, OTHERS["other betas"][0])
    found = jax.vmap(lambda s: CALLS["sample"](made(s), s))(pair)
    assert found.shape == (2, *X.shape)


def test_what_is_compiled_is_the_same_whether_the_schedule_is_known_or_not():
    f = made(S)
    programs = [
        str(jax.make_jaxpr(lambda x, g=g: samplers.sample(KEYS, g, ddim, S, x))(X))
        for g in (f, lambda x, t: f(x, t))
    ]
    assert programs[0] == programs[1]
