"""EDM's stochastic sampler in options and programs, as the core draws by hand."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import programs
from support.tiny_runs import LABELS, make_run, tiny_config, write_images

import jax_diffusion as jd
from jax_diffusion import config as configs
from jax_diffusion import data, diffusion, export, pipeline, samplers, schedules
from jax_diffusion.models import bind
from jax_diffusion.pipeline import SamplingOptions
from jax_diffusion.samplers import SAMPLERS

SHAPE = (4, 4, 1)
FIXED = dict(var_type="fixed_small", loss="l2")
EDM = dict(
    schedule=dict(name="edm", num_steps=5, sigma_min=0.05, sigma_max=20.0),
    objective=dict(mean_type="x_0", weighting="edm", precondition=True, **FIXED),
)
FLOW = dict(
    schedule=dict(name="flow", num_steps=5), objective=dict(mean_type="flow", **FIXED)
)
CHAIN = dict(
    schedule=dict(name="linear", num_steps=100, rescale_timesteps=True),
    objective=dict(mean_type="eps", **FIXED),
)
RUNS = dict(edm=EDM, flow=FLOW, chain=CHAIN)
ALL = ("--sampler", "edm_heun", "--churn", 40)  # of 5 levels: all the noise it can add
FLAGS = (*ALL, "--churn-interval", "0.1,15", "--churn-noise", 1.25, "--steps", 9)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of three processes."""
    folder = tmp_path_factory.mktemp("churn")
    write_images(folder / "images.npz", size=4, channels=1)
    tiny: Any = dict(
        shape=SHAPE, model=dict(name="support.networks:Tiny"), label_dropout=0
    )
    for name, changes in RUNS.items():
        make_run(folder / name, **(tiny | changes))
    return folder


@pytest.fixture
def draws(monkeypatch, tmp_path):
    """Draws into a file; returns the images, as integers."""

    def run(workdir, *args, n=4):
        out = tmp_path / f"{len(list(tmp_path.glob('*.npz')))}.npz"
        told = ("--workdir", workdir, "--out", out, "--n", n)
        programs.run_main(monkeypatch, programs.sample, *told, *args)
        return np.load(out)["arr_0"].astype(int)

    return run


def churned(kind):
    """The table of algorithm 2 on 5 levels of each process."""
    options: Any = dict(churn=40.0, s_min=0.1, s_max=15.0)
    if kind == "edm":
        return schedules.churned(
            schedules.edm_levels(5, sigma_min=0.05, sigma_max=20.0).noise, **options
        )
    if kind == "flow":
        return schedules.churned(
            [0.25, 2 / 3, 1.5, 4.0, np.inf],
            lambda sigma: schedules.time_levels(1 - 1 / (1 + sigma)),
            **options,
        )
    betas = schedules.linear_betas(100)
    keep = schedules.log_snr_steps(betas, 5)
    alpha_bar = np.cumprod(1 - betas)
    known = np.sqrt((1 - alpha_bar) / alpha_bar)

    def rounded(sigma):
        rows = np.array([np.argmin(np.abs(known - one)) for one in sigma])
        signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
        return schedules.Levels(signal[rows], noise[rows], 10.0 * rows)

    return schedules.churned(known[keep], rounded, **options)


@pytest.mark.parametrize("kind", RUNS)
def test_sample_draws_what_the_core_draws_on_churned_levels(kind, runs, draws):
    found, run = draws(runs / kind, *FLAGS), jd.load_run(runs / kind)
    objective: Any = run.objective
    schedule = churned(kind)
    model_fn = bind(run.model, run.params, jnp.zeros(4, jnp.int32))
    denoise_fn = diffusion.denoiser(model_fn, schedule, objective)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(4))
    step_fn = functools.partial(samplers.edm_heun_step, s_noise=1.25)
    x_T = samplers.pure_noise(keys, schedule, SHAPE)
    args = keys, diffusion.clip_x_0(denoise_fn), step_fn, schedule, x_T
    wanted = data.to_uint8(np.asarray(samplers.sample(*args)), "floor")
    assert np.abs(found - wanted).max() <= 1 and np.mean(found == wanted) > 0.95
    plain = draws(runs / kind, "--sampler", "edm_heun", "--steps", 5)
    assert np.abs(found - plain).mean() > 1


def test_an_exported_sampler_churns(runs, draws, tmp_path):
    run, file = jd.load_run(runs / "flow"), tmp_path / "e.jaxexport"
    interval: Any = np.array([0.1, 15.0])
    options = SamplingOptions(
        "edm_heun", 9, churn=40, churn_interval=interval, churn_noise=1.25
    )
    pipeline.export_sampler(file, run, options)
    images = data.to_uint8(np.asarray(export.read(file)(0, np.arange(4))), "floor")
    assert np.abs(images - draws(runs / "flow", *FLAGS)).max() <= 1


def test_churn_0_is_the_sampler_without_it_and_the_same_job(
    runs, monkeypatch, capsys, tmp_path
):
    """Also of a folder whose record is of a version that had no churn."""
    told = ("--workdir", runs / "edm", "--out", tmp_path / "out", "--n", 2)
    told = (*told, "--sampler", "edm_heun", "--steps", 3)
    programs.run_main(monkeypatch, programs.sample, *told)
    file = tmp_path / "out" / "record.json"
    record = json.loads(file.read_text())
    file.write_text(
        json.dumps({k: v for k, v in record.items() if not k.startswith("churn")})
    )
    images = (tmp_path / "out" / "00000.png").read_bytes()
    programs.run_main(monkeypatch, programs.sample, *told, "--churn", 0)
    assert (tmp_path / "out" / "00000.png").read_bytes() == images
    error = programs.failure(
        monkeypatch, capsys, programs.sample, *told, "--churn", "1"
    )
    assert "out must be a new or empty folder, or hold the same job" in error
    again = (*told, "--churn", 1, "--overwrite")
    programs.run_main(monkeypatch, programs.sample, *again)
    assert json.loads(file.read_text())["churn"] == 1
    error = programs.failure(
        monkeypatch, capsys, programs.sample, *told, "--churn=1", "--churn-noise=2"
    )
    assert "out must be a new or empty folder, or hold the same job" in error


def test_the_steps_of_churn_are_those_of_twice_as_many_levels_less_one(runs):
    run = jd.load_run(runs / "edm")

    def schedule(**options):
        bound = pipeline.bind_sampler(run, SamplingOptions("edm_heun", **options))
        return bound.schedule, bound.choices["steps"]

    assert schedule(churn=1)[1] == 9  # of 5 levels; by default 35 of many
    padded, steps = schedule(churn=1, steps=5)
    assert steps == 5 and schedules.num_visited(padded) == 5
    np.testing.assert_allclose(padded.now.noise[1:4:2], [0.05, 2.0], rtol=0.3)


def test_scores_tell_what_churn_their_samples_had(runs):
    run = jd.load_run(runs / "edm")
    options = SamplingOptions("edm_heun", 3, churn=2.0, churn_interval="0.1,9")
    told: Any = dict(metrics=["pixel_distance"], n=20, options=options)
    record = jd.evaluate(run, **told).record["samples"]
    assert record["churn"] == 2 and record["churn_interval"] == "0.1,9"
    assert "churn_noise" not in record and record["steps"] == 3


@pytest.mark.slow
def test_images_during_training_are_drawn_with_churn(tmp_path, monkeypatch):
    """Of the command line, and as `sample_images` draws them."""
    write_images(tmp_path / "images.npz", size=4, channels=1)
    seen, numbers = [], SamplingOptions.numbers

    def watched(self, null):
        seen.append(numbers(self, null))
        return seen[-1]

    monkeypatch.setattr(SamplingOptions, "numbers", watched)
    sampling = dict(sampler="edm_heun", steps=3, churn=1.0, churn_noise=1.5, n=2)
    config = tiny_config(tmp_path / "images.npz", **EDM)
    config.sampling, config.sample_every = sampling, 1
    jd.train(config, tmp_path / "run")
    assert seen[0]["s_noise"] == 1.5
    assert (tmp_path / "run" / "samples").is_dir()


CHURN: dict[str, Any] = dict(sampler="edm_heun", churn=1.0)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(churn=1.0), "churn is for the samplers ['edm_heun'], got 'ddim'."),
    (dict(churn=-1.0), "churn must be a number >= 0, got -1.0."),
    (dict(churn=float("nan")), "churn must be a number >= 0, got nan."),
    (dict(churn=float("inf")), "churn must be a number >= 0, got inf."),
    (CHURN | dict(churn_noise=-0.5), "churn_noise must be a number >= 0, got -0.5."),
    (CHURN | dict(churn_interval="2,1"), "churn_interval must be LOW,HIGH with 0 <= "),
    (CHURN | dict(churn_interval="1"), "churn_interval must be LOW,HIGH with 0 <= LOW"),
    (CHURN | dict(churn_interval="a,b"), "churn_interval must be LOW,HIGH with 0 <= "),
    (CHURN | dict(churn_interval="0,nan"), "churn_interval must be LOW,HIGH with 0 "),
    (dict(churn_interval="0,1"), "churn_interval needs churn, got none."),
    (dict(churn_noise=2.0), "churn_noise needs churn, got none."),
    (CHURN | dict(steps=4), "steps must be odd with churn, 2 N - 1 calls for N"),
    (CHURN | dict(steps=11), "steps must be in [1, 2 T - 1 = 9] with churn, got 11."),
    (CHURN | dict(task="edit"), "churn is for the tasks ['generate', 'sequence', "),
    (CHURN | dict(task="inpaint"), "churn is for the tasks ['generate', 'sequence', "),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=str)
def test_churn_that_cannot_be_is_refused_in_one_sentence(
    fields, words, runs, monkeypatch, capsys, tmp_path
):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        jd.sample_images(jd.load_run(runs / "edm"), 1, **fields)
    assert str(error.value).startswith(words)
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in fields.items()]
    told = ("--workdir", runs / "edm", "--out", tmp_path / "x.npz", *flags)
    said = programs.failure(monkeypatch, capsys, programs.sample, *told)
    field, _, rest = words.partition(" ")
    assert f"--{field.replace('_', '-')} {rest}" in said or words in said
    assert not list(tmp_path.iterdir())


def test_churn_needs_a_network_that_predicts_no_variance(tmp_path):
    labels: Any = LABELS
    run = jd.load_run(make_run(tmp_path / "run", **labels))
    said = "^churn needs a network that predicts neither mu nor a variance, got x_0 and"
    with pytest.raises(ValueError, match=said):
        jd.sample_images(run, 1, **CHURN)


def test_a_config_says_churn_and_a_wrong_one_is_refused():
    told = ["sampler=edm_heun", "churn=2", "churn_interval=0.1,9", "churn_noise=1.5"]
    flags = [f"--config.sampling.{one}" for one in (*told, "steps=9")]
    sampling = configs.load_config("configs/digits_edm.py", flags).sampling
    assert sampling.churn == 2.0 and tuple(sampling.churn_interval) == (0.1, 9)
    with pytest.raises(ValueError, match=r"^config\.sampling\.churn must be a number"):
        configs.load_config("configs/digits_edm.py", ["--config.sampling.churn=x"])


def own_step(keys, denoise_fn, schedule, state, t, *, s_noise=1.0):
    """EDM's, of somebody else's package."""
    args = keys, denoise_fn, schedule, state, t
    return samplers.edm_heun_step(*args, s_noise=s_noise)


def test_a_step_of_your_own_with_s_noise_takes_churn(runs):
    assert samplers.as_sampler(own_step).takes_churn
    assert [name for name, row in SAMPLERS.items() if row.takes_churn] == ["edm_heun"]
    run: Any = jd.load_run(runs / "edm")
    told: Any = dict(churn=2.0, steps=5, spacing="log_snr")
    ours = jd.sample_images(run, 2, sampler="edm_heun", **told)
    theirs = jd.sample_images(run, 2, sampler=f"{__name__}:own_step", **told)
    np.testing.assert_array_equal(ours, theirs)
