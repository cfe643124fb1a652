"""The page for those who come from diffusers: its examples run, and say what is so."""

import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.peers import peer
from support.tiny_runs import UNET, make_run

import jax_diffusion as jd
from jax_diffusion import diffusion, samplers, schedules, spacing
from jax_diffusion.diffusion import Objective
from jax_diffusion.interop import coming_from_diffusers, exporting

PAGE = coming_from_diffusers.__doc__
ROWS = re.findall(r"^\| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
CALLS = [call for _, ours in ROWS for call in re.findall(r"`([^`]+)`", ours)]


@functools.cache
def names_of_the_page():
    """The names that its examples define."""
    test = doctest.DocTestParser().get_doctest(PAGE, {}, "page", None, None)
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, clear_globs=False)
    assert runner.failures == 0 and runner.tries > 20
    return test.globs


WITH_A_RUN = re.compile(r"\brun\b|\bjd\.")


@pytest.mark.parametrize("call", [c for c in CALLS if not WITH_A_RUN.search(c)])
def test_every_call_of_ours_in_the_tables_runs(call):
    assert eval(call, dict(names_of_the_page())) is not None


@pytest.mark.slow
def test_every_call_with_a_run_in_the_tables_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objective = dict(mean_type="eps", var_type="fixed_small", loss="l2")
    given = dict(objective=objective, model=UNET | dict(num_res_blocks=1))
    run = jd.load_run(make_run(tmp_path / "run", **given))
    exporting.export_run(run, "diffusers", "theirs")
    calls = {call for call in CALLS if WITH_A_RUN.search(call)}
    found = {call: eval(call, names_of_the_page() | {"run": run}) for call in calls}
    (written,) = (call for call in calls if call.startswith("export_run"))
    assert jd.load_checkpoint("ours").image_shape == (8, 8, 3)
    assert {call for call in calls if found[call] is None} == {written}
    assert len(calls) >= 5


def test_the_tables_name_the_flax_classes_and_their_fields():
    theirs = " ".join(old for old, _ in ROWS) + PAGE.rpartition("|")[2]
    for name in (
        *("FlaxDDPMScheduler", "FlaxDDIMScheduler", "FlaxDPMSolverMultistepScheduler"),
        *("FlaxPNDMScheduler", "FlaxLMSDiscreteScheduler", "FlaxEulerDiscreteSched"),
        *("FlaxUNet2DConditionModel", "FlaxDiffusionPipeline", "FlaxAutoencoderKL"),
        *("create_state", "set_timesteps", "add_noise", "get_velocity", "step("),
        *("scale_model_input", "init_noise_sigma", "prediction_type", "variance_type"),
        *("clip_sample", "thresholding", "timestep_spacing", "steps_offset"),
        *("set_alpha_to_one", "from_pretrained", "save_pretrained", "trained_betas"),
    ):
        assert name in theirs, name
    assert len(ROWS) > 50


T = 1000
BETAS = schedules.linear_betas(T, rescale=False)
X_0, EPS = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
NUMPY_2 = "ignore:__array__ implementation:DeprecationWarning"  # of diffusers, torch
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def scheduler(name, steps=None, **options):
    """A scheduler of diffusers whose steps are set."""
    found = getattr(peer("diffusers"), name)(**options)
    if steps is not None:
        found.set_timesteps(steps)
    return found


def samples(scheduler, x, scale=1.0):
    """What a loop of diffusers draws from noise x with the network of `ours`."""
    torch = pytest.importorskip("torch")
    x = scale * torch.tensor(x)
    for t in scheduler.timesteps:
        output = torch.tanh(scheduler.scale_model_input(x, t))
        x = scheduler.step(output, t, x).prev_sample
    return x.numpy()


def ours(step_fn, keep, x, *, last_row=0):
    schedule = schedules.make_schedule(BETAS, keep=keep)
    denoise_fn = diffusion.denoiser(lambda x, t: jnp.tanh(x), schedule, Objective())
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(len(x)))
    ts = jnp.arange(schedule.num_steps - 1, last_row - 1, -1)
    return samplers.sample(keys, denoise_fn, step_fn, schedule, jnp.asarray(x), ts=ts)


# Differences are of float32 in both, over up to 50 steps of numbers below 10.
close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings(NUMPY_2)
def test_rules_of_spacing_choose_the_steps_of_diffusers():
    calls = dict(
        re.findall(r'^\| `timestep_spacing="(\w+)"` \| `(.*)` \|$', PAGE, re.M)
    )
    calls[None] = re.search(
        r"^\| steps of `FlaxDPMSolver...` \| `(.*)` \|$", PAGE, re.M
    )[1]
    for kind, call in calls.items():
        name = "DDIMScheduler" if kind else "DPMSolverMultistepScheduler"
        options = {"timestep_spacing": kind} if kind else {}
        for n in (2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 1000):
            if n < T or kind:
                found = eval(call, names_of_the_page() | {"num_steps": n})
                theirs = scheduler(name, n, **options).timesteps
                assert found.tolist() == theirs.tolist()[::-1], (kind, n)


@pytest.mark.slow
def test_noising_and_velocity_are_those_of_diffusers():
    torch = pytest.importorskip("torch")
    theirs, t = scheduler("DDPMScheduler"), np.array([0, 10, 500, 999], np.int32)
    given = torch.tensor(X_0), torch.tensor(EPS), torch.tensor(t)
    schedule = schedules.make_schedule(BETAS)
    x_0, eps, t = map(jnp.asarray, (X_0, EPS, t))
    x_t = diffusion.q_sample(schedule, x_0, t, eps)
    exact = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    exact(x_t, theirs.add_noise(*given).numpy())
    exact(diffusion.v_from_x_0(schedule, x_t, t, x_0), theirs.get_velocity(*given))
    exact(schedule.now.signal**2, theirs.alphas_cumprod)


@pytest.mark.slow
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_steps_of_a_short_chain_are_those_of_diffusers(variance):
    torch = pytest.importorskip("torch")
    theirs = scheduler("DDPMScheduler", 50, variance_type=variance)
    output = np.concatenate([np.tanh(X_0), 0.3 * EPS], axis=1)
    output = jnp.asarray(output if variance == "learned_range" else output[:, :6])
    loss = "hybrid" if variance == "learned_range" else "l2"
    objective = Objective(var_type=variance, loss=loss)
    schedule = schedules.make_schedule(BETAS, keep=spacing.uniform_steps(T, 50))
    denoise_fn = diffusion.denoiser(lambda x, t: output, schedule, objective)
    x_t = jnp.asarray(X_0)
    for row in (0, 1, 20, 49):
        t = jnp.full(4, row)
        prediction = diffusion.clip_x_0(denoise_fn)(x_t, t)
        mean = diffusion.guided_mean(schedule, prediction, x_t, t)
        eps = torch.randn(4, 6, generator=torch.manual_seed(0)).numpy()
        x = mean + (row > 0) * jnp.exp(0.5 * prediction.log_var) * eps
        args = torch.tensor(np.array(output)), 20 * row, torch.tensor(X_0)
        drawn = theirs.step(*args, generator=torch.manual_seed(0)).prev_sample
        np.testing.assert_allclose(x, drawn.numpy(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings(NUMPY_2)
def test_chains_of_ddim_euler_and_2m_end_as_those_of_diffusers():
    keep = spacing.uniform_steps(T, 50)
    theirs = scheduler("DDIMScheduler", 50, clip_sample=False)
    close(ours(samplers.ddim_step, keep, EPS), samples(theirs, EPS))
    theirs = scheduler("EulerDiscreteScheduler", 50, timestep_spacing="leading")
    drawn = samples(theirs, EPS, theirs.init_noise_sigma)
    close(ours(samplers.ddim_step, keep, EPS), drawn)
    theirs = scheduler("DPMSolverMultistepScheduler", 20)
    keep = np.linspace(0, T - 1, 21).round()[1:]
    close(ours(samplers.dpmpp_2m_step, keep, EPS), samples(theirs, EPS))


@pytest.mark.slow
def test_steps_offset_and_set_alpha_to_one_of_stable_diffusion_leave_out_row_0():
    options = dict(clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    theirs = scheduler("DDIMScheduler", 50, **options)
    keep = np.append(0, spacing.uniform_steps(T, 50) + 1)
    close(ours(samplers.ddim_step, keep, EPS, last_row=1), samples(theirs, EPS))
