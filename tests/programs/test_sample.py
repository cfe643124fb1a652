"""The program `sample`: what it draws, as the core by hand, and what it refuses."""

import contextlib
import dataclasses
import functools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import Dense
from ml_collections import ConfigDict
from PIL import Image
from support.jobs import Job
from support.tiny_runs import (
    COSINE,
    ENCODER,
    KNOWN,
    LABELS,
    SIZE,
    UNET,
    T,
    make_run,
    write_images,
)

import jax_diffusion as jd
from jax_diffusion import (
    cli,
    data,
    diffusion,
    export,
    guidance,
    pipeline,
    samplers,
)
from jax_diffusion import config as configs
from jax_diffusion.models import bind
from jax_diffusion.pipeline import (
    SamplingOptions,
    TaskOptions,
    bind_sampler,
    draw,
    inputs,
    masks,
)
from jax_diffusion.pipeline.tasks import TASKS
from jax_diffusion.runtime import resumable_npz, sharding
from jax_diffusion.sample import main, upgrade_record

N = 5  # images of a job, the same in most: then programs are compiled once


def stored_images(folder):
    """Those that tasks start from, as integers, and their labels."""
    path = folder / "images.npz"
    found = data.load("npz", "test", path=path, batch_size=1, train=False)
    return found.images.astype(int), found.labels


@pytest.fixture(scope="module")
def labelled(folder):
    """A run with labels, some of which were hidden, and images of its own."""
    write_images(folder / "images.npz")
    return make_run(folder / "labelled", **LABELS)


@pytest.fixture(scope="module")
def plain(folder):
    """A run of grey images without labels, in many steps."""
    shape, schedule = (SIZE, SIZE, 1), COSINE | dict(num_steps=80)
    return make_run(folder / "plain", shape=shape, schedule=schedule)


@pytest.fixture(scope="module")
def classifier(folder):
    """Of fewer labels than there are."""
    options = dict(objective=None, scale=0.5)
    return make_run(folder / "classifier", model=ENCODER, **options)


@pytest.fixture(scope="module")
def upsampler(folder):
    """A run that makes 16 x 16 pixels of 8 x 8."""
    model = LABELS["model"] | dict(low_res=True)
    return make_run(folder / "up", shape=(2 * SIZE,) * 2 + (3,), model=model)


@pytest.fixture
def program(monkeypatch):
    """Runs `sample` with its arguments."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, args)])
        main()

    return run


@pytest.fixture
def draws(program, tmp_path):
    """Draws into a file; returns the images, as integers, and their labels."""

    def run(workdir, *args, n=N):
        out = tmp_path / f"{len(list(tmp_path.glob('*.npz')))}.npz"
        program("--workdir", workdir, "--out", out, "--n", n, *args)
        with np.load(out) as arrays:
            return arrays["arr_0"].astype(int), arrays["arr_1"]

    return run


@pytest.fixture
def refuses(program, tmp_path, capsys):
    """Runs a job that must end in one sentence and write nothing; returns it."""

    def run(workdir, *args, out=("--out", tmp_path / "refused.npz")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as info:
            cli.run_program(
                functools.partial(program, "--workdir", workdir, *out, *args)
            )
        error = capsys.readouterr().err
        assert info.value.code == 2 and error.count("\n") == 1
        assert error.startswith("error: ") and error.endswith((".\n", "?\n"))
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


@pytest.fixture
def floats(monkeypatch):
    """What is drawn before it becomes uint8, batch by batch."""
    seen, to_uint8 = [], data.to_uint8

    def watched(x, rounding="floor"):
        seen.append(np.array(x))
        return to_uint8(x, rounding)

    monkeypatch.setattr(pipeline.data, "to_uint8", watched)
    return seen


def by_hand(
    workdir,
    wrap=lambda denoise_fn, schedule, label: diffusion.clip_x_0(
        functools.partial(denoise_fn, label=label)
    ),
    *,
    step=samplers.ddim_step,
    num_labels=KNOWN,
    group=1,
    **steps,
):
    """The images of seed 0 from the core alone, float32.

    Those of a group of several share x_T and the noise of the upper half of the steps.
    """
    run = pipeline.load_run(workdir)
    schedule = configs.make_schedule(run.config.schedule, **steps)
    ids = jnp.arange(N)

    def model_fn(params, x_t, timesteps, label):
        return run.model.apply({"params": params}, x_t, timesteps, label)

    @jax.jit
    def draw(params, schedule):
        bound = functools.partial(model_fn, params)
        denoise_fn = diffusion.denoiser(bound, schedule, run.objective)
        denoise_fn = wrap(denoise_fn, schedule, ids % num_labels)
        keys = samplers.image_keys(jax.random.key(0), ids)
        shared = samplers.image_keys(jax.random.key(0), ids // group)
        x_T = samplers.normal(shared, run.image_shape)
        step_fn = step
        if group > 1:
            step_fn = samplers.share_noise(step, shared, until=T // 2 - 1)
        return samplers.sample(keys, denoise_fn, step_fn, schedule, x_T)

    return np.asarray(draw(run.params, schedule))


def assert_same(images, others):
    """To one grey level, where another program rounds to the other side of it."""
    if others.dtype == np.float32:
        others = data.to_uint8(others)
    difference = np.abs(images.astype(int) - others.astype(int))
    counted = f"{np.count_nonzero(difference)} of {difference.size} pixels differ"
    assert difference.max() <= 1 and np.mean(difference != 0) < 0.01, counted


def assert_other(images, others):
    assert np.mean(np.abs(images - others) > 1) > 0.05


# Jobs that are killed


def stored(out):
    return len(list(out.with_suffix(".parts").glob("[0-9]*.npz")))


@pytest.mark.slow
def test_a_job_killed_twice_ends_in_the_same_file(plain, tmp_path, program, refuses):
    arguments = ("--sampler", "ddpm", "--n", "300")
    whole, out = tmp_path / "whole.npz", tmp_path / "killed.npz"

    def job(out):
        options = ("--out", str(out), "--batch-size", "16", *arguments)
        return Job(plain, *options, program="sample", devices=1)

    job(whole).finish()
    for _ in range(2):  # a job that begins, and one that goes on
        there, killed = stored(out), job(out)
        killed.wait_for(lambda there=there: stored(out) >= there + 2)
        killed.kill()
    assert not out.exists() and 4 <= stored(out) < 19
    other = tmp_path / "other.npz"
    shutil.copytree(out.with_suffix(".parts"), other.with_suffix(".parts"))
    job(out).finish()
    assert out.read_bytes() == whole.read_bytes() and stored(out) == 0

    told = ("--out", other)
    error = refuses(plain, *arguments, "--steps", 50, out=told)
    assert ", got steps " in error and error.endswith(" -> 50.\n")
    # On other devices, too, and in another number of parts.
    program("--workdir", plain, *told, *arguments, "--batch-size", 37)
    with np.load(other) as images, np.load(whole) as others:
        assert_same(images["arr_0"], others["arr_0"])
        np.testing.assert_array_equal(images["arr_1"], others["arr_1"])


class Killed(Exception):
    """Some images are written, and then no more."""


def cut_off(monkeypatch, program, *args):
    """Runs a job that is lost after its first part."""
    add = resumable_npz.ResumableNpz.add

    def add_one(self, arrays):
        if self.done:
            raise Killed
        add(self, arrays)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resumable_npz.ResumableNpz, "add", add_one)
        program(*args)


@pytest.mark.slow
def test_parts_of_other_images_to_start_from_are_refused(
    labelled, tmp_path, program, refuses, monkeypatch
):
    path = tmp_path / "start.npz"
    write_images(path)
    options = ("--task", "edit", "--images", f"npz:{path}", "--n", N, "--batch-size", 2)
    out = ("--out", tmp_path / "a.npz")
    cut_off(monkeypatch, program, "--workdir", labelled, *out, *options)
    write_images(path, labels=(1, 1, 1))
    assert "parts of other settings" in refuses(labelled, *options, out=out)


@pytest.mark.slow
def test_parts_of_another_mask_are_refused(
    labelled, tmp_path, program, refuses, monkeypatch
):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[0] = 255
    options = ("--task", "inpaint", "--mask", tmp_path / "mask.png", "--n", N)
    options += ("--batch-size", 2)
    out = ("--out", tmp_path / "a.npz")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cut_off(monkeypatch, program, "--workdir", labelled, *out, *options)
    Image.fromarray(255 - mask).save(tmp_path / "mask.png")
    assert "got mask " in refuses(labelled, *options, out=out)


@pytest.mark.slow
def test_parts_whose_noise_was_drawn_by_another_rule_are_refused(
    labelled, tmp_path, program, refuses, monkeypatch
):
    """RePaint's, until 0.1; plain chains have the noise that they had."""
    options = ("--n", N, "--batch-size", 2)
    for task in ("generate", "inpaint"):
        out = ("--out", tmp_path / f"{task}.npz")
        arguments = (*out, "--task", task, *options)
        cut_off(monkeypatch, program, "--workdir", labelled, *arguments)
        record = tmp_path / f"{task}.parts" / "record.json"
        told = json.loads(record.read_text())
        assert ("noise" in told) == (task == "inpaint")
    told.pop("noise")
    record.write_text(json.dumps(told))
    refused = refuses(labelled, "--task", "inpaint", *options, out=out)
    assert "got noise None -> by row" in refused


OF_0_1 = dict(  # the record of parts that version 0.1 has written
    **dict(block=2, classifier="c", classifier_scale=1.0, eta=0.5, export=None),
    **dict(frames=10, group=8, guidance=None, guidance_interval=None, images=None),
    **dict(guidance_rescale=0.0, jump=10, label=None, level=0.5, low_res=None),
    **dict(no_clip=False, no_reclip=True, quantize="round", resamples=1, seed=0),
    **dict(sampler="ddim", split="test", task="generate", threshold=None, steps=20),
    **dict(upsample=None, weights_beside=False, workdir="w", spacing="sections"),
    **dict(ema="0.99", mask=None, upsampled=None, jax="0.10.2", network=1, rows=[2]),
)


def test_parts_of_version_0_1_are_resumed_by_the_same_options(tmp_path):
    options = SamplingOptions(eta=0.5, rounding="round", classifier="c", reclip=False)
    fields = dataclasses.asdict(options) | dataclasses.asdict(TaskOptions())
    fields |= dict(churn=None, churn_noise=None)  # as sample records no churn
    decided = ("steps", "spacing", "ema", "mask", "workdir", "seed", "upsampled")
    today = fields | {k: OF_0_1[k] for k in (*decided, "jax", "network", "rows")}
    resumable_npz.ResumableNpz(tmp_path / "a.npz", OF_0_1).add({"arr_0": np.zeros(3)})
    resumed = resumable_npz.ResumableNpz(tmp_path / "a.npz", today, upgrade_record)
    assert resumed.done == 3
    with pytest.raises(ValueError, match=r"got eta 0.5 -> 0.6"):
        other = today | dict(eta=0.6)
        resumable_npz.ResumableNpz(tmp_path / "a.npz", other, upgrade_record)


# Grey levels


@pytest.mark.slow
def test_grey_levels_are_cut_as_openai_does_or_rounded_as_ddim_does(
    labelled, draws, floats
):
    images = {rule: draws(labelled, "--quantize", rule)[0] for rule in data.ROUNDINGS}
    x = np.asarray(floats[0][-1], np.float64)[:N]
    np.testing.assert_array_equal(floats[0], floats[1])
    cut = np.clip((x + 1) * 127.5, 0, 255)  # ((x + 1) * 127.5).clamp(0, 255).to(uint8)
    # (x + 1) / 2, clamped, and torchvision's mul(255).add(0.5).clamp(0, 255).to(uint8)
    rounded = np.clip(np.clip((x + 1) / 2, 0, 1) * 255 + 0.5, 0, 255)
    for rule, level in (("floor", cut), ("round", rounded)):
        sure = np.abs(level - np.round(level)) > 1e-3  # else float32 may round it up
        assert sure.mean() > 0.8
        np.testing.assert_array_equal(images[rule][sure], np.floor(level)[sure])
    assert 0.3 < np.mean(images["round"] == images["floor"] + 1) < 0.7


def test_another_rule_of_rounding_is_refused(plain, refuses):
    with pytest.raises(ValueError, match=r"must be one of .*, got 'ceil'"):
        data.to_uint8(np.zeros(1, np.float32), "ceil")
    assert "got 'ceil'" in refuses(plain, "--quantize", "ceil")


# Labels and guidance


@pytest.mark.slow
def test_labels_go_round(labelled, draws):
    images, labels = draws(labelled)
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, 0])
    assert_same(images, by_hand(labelled))
    of_one, labels = draws(labelled, "--label", 3)
    np.testing.assert_array_equal(labels, [3] * N)
    np.testing.assert_array_equal(of_one[3], images[3])
    assert_other(of_one[0], images[0])
    of_three, labels = draws(labelled, "--label", "0,1,2")
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(of_three[:3], images[:3])
    assert_other(of_three[3], images[3])


@pytest.mark.parametrize("text", ["4", "-1", "1.5", "x", "", "1,,2", "nan", "0,inf"])
def test_wrong_labels_are_refused(text, labelled, refuses):
    error = refuses(labelled, f"--label={text}")
    assert error.endswith(f"got {text!r}.\n") and "--label must be" in error


def test_labels_for_a_network_without_are_refused(plain, refuses):
    assert "needs a network that knows labels" in refuses(plain, "--label", 0)


def guided(scale):
    """Classifier-free guidance by hand."""

    def wrap(denoise_fn, schedule, label):
        at = scale(schedule) if callable(scale) else scale
        guiding = guidance.classifier_free(denoise_fn, label, KNOWN, at)
        return diffusion.clip_x_0(guiding)

    return wrap


def test_guidance_is_that_of_the_core(labelled, draws):
    images, _ = draws(labelled)
    assert_same(draws(labelled, "--guidance", 1)[0], images)
    strong, _ = draws(labelled, "--guidance", 3)
    assert_other(strong, images)
    assert_same(strong, by_hand(labelled, guided(3.0)))


@pytest.mark.slow
def test_guidance_may_be_limited_to_an_interval_of_noise(labelled, draws):
    images, _ = draws(labelled)
    nowhere = ("--guidance-interval", "1e6,1e7")
    assert_same(draws(labelled, "--guidance", 3, *nowhere)[0], images)

    def scale(schedule):
        alpha_bar = jnp.cumprod(1 - schedule.betas)
        ratio = jnp.sqrt((1 - alpha_bar) / alpha_bar)
        return lambda t: jnp.where((0.2 <= ratio[t]) & (ratio[t] <= 1.5), 3.0, 1.0)

    some, _ = draws(labelled, "--guidance", 3, "--guidance-interval", "0.2,1.5")
    assert_other(some, images)
    assert_same(some, by_hand(labelled, guided(scale)))


def test_guidance_needs_a_run_that_hid_labels(plain, folder, refuses):
    words = "--guidance needs a run that was trained with label_dropout"
    assert words in refuses(plain, "--guidance", 2)
    never = make_run(folder / "never", model=LABELS["model"])
    assert words in refuses(never, "--guidance", 2)


def test_an_interval_must_be_one_and_of_some_guidance(labelled, refuses):
    for text in ("1", "1,2,3", "2,1", "-1,2", "low,high", "nan,1"):
        options = ("--guidance", 2, f"--guidance-interval={text}")
        error = refuses(labelled, *options)
        assert "--guidance-interval must be" in error and repr(text) in error
    error = refuses(labelled, "--guidance-interval", "0,1")
    assert "--guidance-interval needs guidance or a classifier" in error


def by_classifier(workdir, scale, *, reclip):
    """Classifier guidance by hand; the classifier's parameters are constants."""
    other = pipeline.load_run(workdir)

    def wrap(denoise_fn, schedule, label):
        def logits_fn(x_t, timesteps):
            return other.model.apply({"params": other.params}, x_t, timesteps)

        clipped = diffusion.clip_x_0(functools.partial(denoise_fn, label=label))
        log_prob = guidance.label_log_prob(logits_fn, label)
        guiding = guidance.classifier(clipped, schedule, log_prob, scale)
        if not reclip:
            return guiding
        return diffusion.clip_x_0(guidance.shift_x_0(guiding, schedule))

    return wrap


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reclip", "step", "scale"),
    [
        ((), True, samplers.ddim_step, 8.0),
        (("--no-reclip",), False, samplers.ddim_step, 8.0),
        (("--sampler", "ddpm"), False, samplers.ddpm_step, 200.0),
    ],
    ids=["ddim", "no-reclip", "ddpm"],
)
def test_a_classifier_guides_as_in_the_core(
    options, reclip, step, scale, labelled, classifier, draws
):
    told = ("--classifier", classifier, "--classifier-scale", scale, *options)
    images, labels = draws(labelled, *told)
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1])  # those that both know
    wrap = by_classifier(classifier, scale, reclip=reclip)
    assert_same(images, by_hand(labelled, wrap, step=step, num_labels=3))
    chain = [option for option in options if option != "--no-reclip"]
    plain, _ = draws(labelled, "--label", "0,1,2", *chain)
    assert_other(images, plain)
    if not options:
        assert_same(draws(labelled, *told, "--classifier-scale", 0)[0], plain)


def test_a_classifier_must_fit_the_run(labelled, classifier, folder, refuses):
    options = dict(model=ENCODER, objective=None)
    small = make_run(folder / "small", shape=(4, 4, 3), **options)
    longer = COSINE | dict(num_steps=T + 1)
    longer = make_run(folder / "longer", schedule=longer, **options)
    for workdir, words in (
        (small, "must be of images (8, 8, 3), as the run's, got (4, 4, 3)"),
        (longer, "must have the run's schedule"),
        (labelled, f"must be a classifier's run, got {labelled}"),
        (folder / "none", "holds none"),
    ):
        assert words in refuses(labelled, "--classifier", workdir)
    assert "to 2, got '3'" in refuses(labelled, "--classifier", classifier, "--label=3")
    assert "must be of a denoiser, got a classifier's" in refuses(classifier)


@pytest.fixture(scope="module")
def weaker(folder):
    """A run that predicts something else, with labels that were never hidden."""
    model, v = UNET | dict(num_classes=KNOWN), dict(mean_type="v", var_type="learned")
    return make_run(folder / "weaker", model=model, objective=v, scale=0.2)


def by_pair(method, weak_fn_of):
    """Guidance with scale 3 by two denoisers, by hand."""

    def wrap(denoise_fn, schedule, label):
        labeled = functools.partial(denoise_fn, label=label)
        weak_fn = weak_fn_of(denoise_fn, schedule, label)
        return diffusion.clip_x_0(method(labeled, weak_fn, 3.0))

    return wrap


def unlabeled(denoise_fn, schedule, label):
    return functools.partial(denoise_fn, label=jnp.full_like(label, KNOWN))


@pytest.mark.slow
def test_a_weaker_run_guides_as_autoguidance_of_the_core(labelled, weaker, draws):
    other = pipeline.load_run(weaker)

    def weak_fn(denoise_fn, schedule, label):
        model_fn = bind(other.model, other.params, label)
        return diffusion.denoiser(model_fn, schedule, other.objective)

    told = ("--guide-with", weaker, "--guidance")
    images, _ = draws(labelled, *told, 3)
    wrap = by_pair(guidance.autoguidance, weak_fn)
    assert_same(images, by_hand(labelled, wrap))
    assert_same(draws(labelled, *told, 1)[0], draws(labelled)[0])
    again = pipeline.load_run(labelled)
    assert again.null_label == KNOWN
    for mark in ":@":
        options = dict(guide_with=f"{weaker}{mark}none", guidance=3, n=N)
        assert_same(images, jd.sample_images(again, **options).astype(int))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apg", "zero_star"])
def test_a_method_of_guidance_is_that_of_the_core(name, labelled, draws):
    images, _ = draws(labelled, "--guidance", 3, "--guidance-method", name)
    wrap = by_pair(guidance.GUIDANCE_METHODS[name], unlabeled)
    assert_same(images, by_hand(labelled, wrap))
    assert_other(images, draws(labelled, "--guidance", 3)[0])


def test_a_guide_must_fit_the_run(labelled, plain, weaker, classifier, folder, refuses):
    model = UNET | dict(num_classes=KNOWN + 1)
    small = make_run(folder / "small guide", shape=(4, 4, 3))
    schedule = COSINE | dict(num_steps=T + 1)
    longer = make_run(folder / "longer guide", schedule=schedule)
    of_five = make_run(folder / "five", model=model)
    told = make_run(folder / "told guide", model=UNET | dict(cond_dim=5))
    options = ("--guidance", 2, "--guide-with")
    for workdir, words in (
        (small, "must be of images (8, 8, 3), as the run's, got (4, 4, 3)"),
        (longer, "must have the run's schedule"),
        (of_five, "must have the run's classes, 4 classes, or take none, got 5"),
        (classifier, f"must be a denoiser's run, got {classifier}"),
        (folder / "none", "holds none"),
        (f"{weaker}@0.5", "must be a workdir that can be loaded, got: "),
        (f"{weaker}:0.5", "must be a workdir that can be loaded, got: ema must be one"),
        (f"{weaker}@", "must be a workdir that can be loaded, got: ema must be one of"),
        (
            told,
            "must take what the run takes of cond and tokens, cond_dim = 0, or none",
        ),
    ):
        error = refuses(labelled, *options, workdir)
        assert error.startswith("error: --guide-with ") and words in error
    error = refuses(labelled, "--guide-with", weaker)
    assert "--guide-with needs guidance, got none" in error
    error = refuses(labelled, "--guidance-method", "apg")
    assert "--guidance-method needs guidance, got none" in error
    error = refuses(labelled, *options[:2], "--guidance-method", "cfg")
    assert "--guidance-method must be one of ['classifier_free', 'apg', " in error
    no_labels = make_run(folder / "no labels")
    assert "got 4 classes" in refuses(no_labels, *options, weaker)


EDM = dict(name="edm", num_steps=T)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (COSINE, COSINE | dict(rescale_timesteps=False), True),
        (EDM, EDM | dict(sigma_min=0.002), True),
        (EDM, EDM | dict(sigma_min=0.003), False),
        (COSINE, COSINE | dict(rescale_timesteps=True), False),
        (COSINE, EDM, False),
    ],
)
def test_a_process_may_be_written_in_two_ways_to_guide_another(one, other, same):
    runs = [
        pipeline.Run(ConfigDict(dict(schedule=schedule)), Dense(3), {}, None, (8, 8, 3))
        for schedule in (one, other)
    ]
    told = pytest.raises(ValueError, match="guide_with must have the run's schedule")
    with contextlib.nullcontext() if same else told:
        inputs.check_noised_alike("guide_with", *runs)


@pytest.mark.slow
def test_another_guide_is_another_job(labelled, weaker, folder, tmp_path, program):
    """Also of the same name: its weights are in the record of the folder."""
    out, guide = tmp_path / "out", folder / "its guide"
    told = ("--workdir", labelled, "--out", out, "--n", 2, "--guidance", 2)
    told = (*told, "--guide-with", guide)
    shutil.copytree(weaker, guide)
    program(*told)
    program(*told)
    assert json.loads((out / "record.json").read_text())["guide_with"] == str(guide)
    shutil.rmtree(guide)
    shutil.copytree(labelled, guide)
    with pytest.raises(ValueError, match="or hold the same job"):
        program(*told)


# Tasks

ROWS_AND_COLUMNS = {  # of the grid of three images, 4 frames, 2 in a group
    **{name: (3, 4) for name in ("sequence", "progress", "slerp")},
    **{name: (3, 3) for name in ("inpaint", "colorize", "enlarge", "reconstruct")},
    "generate": (2, 2),
    "complete": (2, 2),
    "edit": (3, 2),
    "interpolate": (3, 6),
}
FLAGS = {
    "complete": ("--sampler", "ddpm", "--group", 2),
    "sequence": ("--sampler", "heun"),
}


def cells(path, rows, columns):
    """The images of a grid, [rows, columns, h, w, c], after a look at its size."""
    side = SIZE + 1
    height, width = rows * side + 1, columns * side + 1
    factor = -(-512 // max(height, width))
    with Image.open(path) as picture:
        assert picture.size == (width * factor, height * factor)
        sheet = np.asarray(picture)[::factor, ::factor]
    found = sheet[1:, 1:].reshape(rows, side, columns, side, 3)[:, :-1, :, :-1]
    return found.swapaxes(1, 2)


def test_old_names_of_tasks_are_still_known():
    assert TaskOptions(task="colourise").row is TASKS["colorize"]


QUICK = ("generate", "inpaint", "interpolate")  # the others are slow


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=() if task in QUICK else pytest.mark.slow)
        for task in TASKS
    ],
)
def test_every_task_ends_in_a_grid(task, labelled, folder, program, tmp_path):
    n, (rows, columns) = 3, ROWS_AND_COLUMNS[task]
    options = ("--n", n, *FLAGS.get(task, ()))
    if "frames" in TASKS[task].reads:
        options += ("--frames", 4)
    options += ("--task", task, "--quantize", "round")
    program("--workdir", labelled, "--out", tmp_path, *options)
    shown = cells(tmp_path / "sheets" / "grid.png", rows, columns)
    names = {path.name for path in tmp_path.iterdir()} - {"sheets", "record.json"}
    gif = {"denoising.gif"} if task == "generate" else set()
    assert {p.name for p in (tmp_path / "sheets").iterdir()} == {"grid.png", *gif}
    results = [] if TASKS[task].is_strip else [f"{i:05d}.png" for i in range(n)]
    assert names == set(results)
    by_row = shown.reshape(-1, *shown.shape[2:])
    if columns > 2 or task == "edit":
        by_row = shown[:, -1]
    for image, name in zip(by_row, results, strict=False):
        with Image.open(tmp_path / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture), image)
    if TASKS[task].from_images:  # "round" is the inverse of what scales them
        images, _ = stored_images(folder)
        np.testing.assert_array_equal(shown[:, 0], images[:n])
        if task == "interpolate":
            np.testing.assert_array_equal(shown[:, -1], images[1 : n + 1])


@pytest.mark.slow
def test_noises_between_two_begin_and_end_in_their_images(
    labelled, draws, program, tmp_path
):
    options = ("--label", 1, "--task")
    told = ("--n", 3, "--frames", 4, *options, "slerp")
    program("--workdir", labelled, "--out", tmp_path / "out", *told)
    shown = cells(tmp_path / "out" / "sheets" / "grid.png", 3, 4)
    images, _ = draws(labelled, *options, "generate")
    assert_same(shown[:, 0], images[:3])
    assert_same(shown[:, -1], images[1:4])
    assert_other(shown[:, 1].astype(int), images[:3])


@pytest.mark.slow
def test_what_is_known_of_an_image_stays(labelled, folder, draws, tmp_path):
    images, labels = (a[:N] for a in stored_images(folder))
    white = np.random.default_rng(0).random((SIZE, SIZE)) < 0.5
    Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).save(tmp_path / "m.png")
    task = ("--quantize", "round", "--task")
    drawn, told = draws(labelled, *task, "inpaint", "--mask", tmp_path / "m.png")
    np.testing.assert_array_equal(told, labels)
    np.testing.assert_array_equal(drawn[:, white], images[:, white])
    assert_other(drawn[:, ~white], images[:, ~white])

    drawn, _ = draws(labelled, *task, "colorize")
    inside = np.all((drawn > 0) & (drawn < 255), axis=-1)  # what is not clipped
    difference = (drawn - images).mean(axis=-1)
    assert inside.mean() > 0.3 and np.abs(difference[inside]).max() <= 0.5 + 1e-3
    assert_other(drawn, images)

    drawn, _ = draws(labelled, *task, "enlarge", "--block", 2)
    blocks = np.stack([drawn[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    inside = np.all((blocks > 0) & (blocks < 255), axis=0)
    known = np.stack([images[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    difference = (blocks - known).mean(axis=0)
    assert inside.mean() > 0.3 and np.abs(difference[inside]).max() <= 0.5 + 1e-3
    assert_other(drawn, images)


@pytest.mark.slow
def test_images_of_a_group_are_one_while_all_noise_is_shared(labelled, draws):
    options = ("--sampler", "ddpm", "--task", "complete", "--group", 2)
    images, _ = draws(labelled, *options, "--level", 0, "--label", 1)
    np.testing.assert_array_equal(images[0::2][:2], images[1::2])
    assert_other(images[1], images[2])
    images, _ = draws(labelled, *options, "--level", 0.5)
    assert_same(images, by_hand(labelled, step=samplers.ddpm_step, group=2))


def test_other_images_than_the_runs_are_read_in_their_own_way(labelled, folder):
    own = dict(name="folder", path="none", image_size=SIZE, in_memory=False)
    data_of_run = own | dict(batch_size=1)
    run = pipeline.load_run(make_run(folder / "folders", data=data_of_run, **LABELS))
    source = f"npz:{folder / 'images.npz'}"
    batches = pipeline.open_images(run, source, "test", batch_size=1)
    np.testing.assert_array_equal(batches.images, stored_images(folder)[0])


def test_a_mask_is_a_half_or_what_is_white_in_a_file(tmp_path):
    white = np.random.default_rng(0).random((SIZE, SIZE)) < 0.5
    Image.fromarray(np.where(white, 200, 99).astype(np.uint8)).save(tmp_path / "m.png")
    row, column = np.indices((SIZE, SIZE))
    for mask, known in (
        ("left", column < SIZE // 2),
        ("right", column >= SIZE // 2),
        ("top", row < SIZE // 2),
        ("bottom", row >= SIZE // 2),
        (tmp_path / "m.png", white),
        (white, white),
        (white.astype(np.float32)[..., None], white),
    ):
        found = masks.read_mask(mask, (SIZE, SIZE, 3))
        np.testing.assert_array_equal(found, known[..., None])


def test_a_mask_that_does_not_fit_is_refused(labelled, tmp_path, refuses):
    Image.new("L", (SIZE, SIZE + 1)).save(tmp_path / "large.png")
    whole = (tmp_path / "large.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("large.png", "--mask must be 8 x 8, as the images, got (9, 8)"),
        ("broken.png", "--mask must be a whole image"),
        ("middle", "--mask must be of"),
    ):
        mask = ("--mask", tmp_path / name if "." in name else name)
        assert words in refuses(labelled, "--task", "inpaint", *mask)


def test_a_task_that_does_not_fit_is_refused(labelled, plain, tmp_path, refuses):
    write_images(tmp_path / "small.npz", size=6)
    write_images(tmp_path / "grey.npz", channels=1)
    write_images(tmp_path / "colors.npz")
    write_images(tmp_path / "many.npz", labels=(0, 4))
    images = {
        name: ("--images", f"npz:{tmp_path / name}.npz")
        for name in ("small", "grey", "colors", "many", "none")
    }
    edit = ("--task", "edit")
    cases = [
        (labelled, (*edit, *images["small"]), "must be 6 x 6, got 8"),
        (plain, (*edit, *images["colors"]), "images must be (8, 8, 1), as the run's"),
        (labelled, (*edit, *images["many"]), "must be below 4, got 4"),
        (labelled, (*edit, *images["none"]), "--images must exist, got "),
        (labelled, (*edit, "--images", "zip:a"), "dataset must be one of"),
        (labelled, (*edit, "--split", "some"), "split must be one of"),
        (labelled, images["small"], "--images must be for"),
        (plain, ("--task", "colorize", *images["grey"]), "3 channels, got 1"),
        (labelled, ("--task", "complete"), "'complete' needs noise"),
        (labelled, ("--task", "complete", "--sampler", "heun"), "needs noise"),
        (
            labelled,
            ("--task", "enlarge", "--block", 3),
            "--block must divide 8 x 8, got 3",
        ),
        (labelled, ("--task", "paint"), "--task must be one of"),
        *(
            (labelled, ("--task", task), f"--out of {task} must be a folder")
            for task, row in TASKS.items()
            if row.is_strip
        ),
    ]
    for workdir, args, words in cases:
        assert words in refuses(workdir, *args)


# Steps, batches and devices


@pytest.mark.slow
def test_one_program_serves_all_steps_and_numbers(labelled, monkeypatch):
    run, traced = pipeline.load_run(labelled), []

    def counted(*args, **options):  # called when a program is traced
        traced.append(args)
        return bind(*args, **options)

    monkeypatch.setattr(draw, "bind", counted)
    monkeypatch.setattr(draw, "kept", {})
    first = bind_sampler(run, SamplingOptions(guidance=1))
    drawn, once = {}, 0
    for steps, spacing, eta, scale in (
        *((8, "sections", 0, 1), (3, "trailing", 0, 1), (5, "quadratic", 1, 1)),
        *((1, "uniform", 0.5, 2), (4, "karras", 0, 3)),
    ):
        told = dict(guidance=scale, steps=steps, spacing=spacing, eta=eta)
        wanted = bind_sampler(run, SamplingOptions(**told))
        one = dataclasses.replace(wanted, draw=first.draw)
        drawn[steps] = next(one.batches(N))[0][-1]
        once = once or len(traced)
        assert len(traced) == once > 0 and first.draw._cache_size() == 1
    assert_same(drawn[4], by_hand(labelled, guided(3.0), steps=4, spacing="karras"))


@pytest.mark.slow
def test_images_do_not_depend_on_batches_or_devices(labelled):
    bound = bind_sampler(pipeline.load_run(labelled), SamplingOptions(eta=1))

    def drawn(devices, batch_size):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        batches = list(bound.batches(N, batch_size=batch_size, mesh=mesh))
        frames, labels = zip(*batches, strict=True)
        assert [len(part) for part in labels] == [
            min(batch_size, N - i) for i in range(0, N, batch_size)
        ]
        np.testing.assert_array_equal(np.concatenate(labels), [0, 1, 2, 3, 0])
        return np.concatenate([part[-1] for part in frames])

    whole = drawn(8, 5)
    assert_other(whole[:-1].astype(int), whole[1:].astype(int))
    for devices, batch_size in ((1, 2), (2, 3)):
        assert_same(drawn(devices, batch_size), whole)


@pytest.mark.slow
def test_every_step_is_told_to_the_host(labelled):
    run, seen = pipeline.load_run(labelled), []
    options = SamplingOptions(steps=6)
    bound = bind_sampler(run, options)
    watched = pipeline.make_sampler(
        *(run.model, run.objective, run.image_shape, options, TaskOptions()),
        num_steps=6,
        on_step=lambda t: seen.append(int(t)),
    )
    list(dataclasses.replace(bound, draw=watched).batches(1))
    jax.effects_barrier()
    assert seen == [5, 4, 3, 2, 1, 0]


class Bar:
    """What `tqdm` would show, on a terminal."""

    def __init__(self, made, *, total, **options):
        self.total, self.n, self.disable, self.shown = total, 0, False, []
        made.append(self)

    def update(self, n):
        self.n += n
        self.shown.append(self.n)


@pytest.mark.slow
def test_long_samplers_alone_show_their_steps(labelled, draws, monkeypatch):
    bars = []
    monkeypatch.setattr(draw, "tqdm", functools.partial(Bar, bars))
    monkeypatch.setattr(pipeline, "LONG", 3)
    draws(labelled, "--batch-size", 3, "--steps", 3)
    assert not bars
    draws(labelled, "--batch-size", 3, "--steps", 4)
    jax.effects_barrier()
    (bar,) = bars
    assert bar.total == 4 and bar.shown == [1, 2, 3, 4] * 2


# Cascades


@pytest.mark.slow
def test_a_cascade_enlarges_the_small_images(
    labelled, upsampler, draws, program, tmp_path, monkeypatch
):
    options = ("--seed", 3, "--eta", 1, "--batch-size", 3)  # the last one is of two
    small, labels = draws(labelled, *options)
    np.savez(tmp_path / "small.npz", small.astype(np.uint8), labels)
    large, others = draws(upsampler, "--low-res", tmp_path / "small.npz", *options)
    cascade, together = draws(labelled, "--upsample", upsampler, *options)
    assert cascade.shape == (N, 2 * SIZE, 2 * SIZE, 3)
    assert_same(cascade, large)
    np.testing.assert_array_equal(together, others)
    np.testing.assert_array_equal(together, labels)
    assert_other(cascade[0], cascade[4])

    whole, out = tmp_path / "whole.npz", tmp_path / "resumed.npz"
    arguments = ("--workdir", labelled, "--upsample", upsampler, "--n", N, *options)
    cut_off(monkeypatch, program, *arguments, "--out", out)
    assert stored(out) == 1
    program(*arguments, "--out", out)
    program(*arguments, "--out", whole)
    assert out.read_bytes() == whole.read_bytes()
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], cascade)


def test_a_second_stage_must_fit_the_first(labelled, plain, folder, refuses):
    def enlarging(name, channels=3, **model):
        model, shape = UNET | dict(low_res=True) | model, (16, 16, channels)
        return make_run(folder / name, shape=shape, model=model)

    for workdir, words in (
        (labelled, "must be a run of a network with low_res"),
        (enlarging("grey", channels=1), "must have 3 channels, as the images, got 1"),
        (enlarging("few", num_classes=3), "must know 4 labels, got 3"),
        (folder / "none", "holds none"),
    ):
        assert words in refuses(labelled, "--upsample", workdir)
    task = ("--task", "slerp", "--upsample", labelled)
    words = "--upsample is for the task generate"
    assert words in refuses(labelled, *task, out=("--out", folder / "out"))
    assert not (folder / "out").exists()


# Samplers as files


@pytest.mark.slow
def test_an_exported_sampler_draws_the_same_images(
    labelled, draws, program, tmp_path, floats
):
    options = ("--guidance", 2, "--eta", 0.5, "--steps", 3)
    _, labels = draws(labelled, *options)
    file = tmp_path / "sampler"
    program("--workdir", labelled, "--export", file, *options)
    drawn = export.read(file)(0, np.arange(N), labels)
    np.testing.assert_allclose(drawn, floats[0][-1][:N], rtol=1e-3, atol=1e-3)
    record = json.loads((tmp_path / "sampler.json").read_text())
    assert record["about"]["steps"] == 3 and record["about"]["guidance"] == 2
    assert record["inputs"]["label"]["num_labels"] == KNOWN


def test_an_export_is_of_drawing_from_noise(labelled, plain, tmp_path, refuses):
    out = ("--export", tmp_path / "sampler")
    for args in (("--low-res", "a.npz"), ("--upsample", plain), ("--label", 3)):
        assert f"got {args[0]}" in refuses(labelled, *args, out=out)
    error = refuses(labelled, "--task", "edit", out=out)
    assert "--export is of the task generate, got 'edit'" in error
    assert "one of --out and --export" in refuses(labelled, out=())
    both = (*out, "--out", tmp_path / "a.npz")
    assert "one of --out and --export" in refuses(labelled, out=both)


# What is refused at once


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--sampler euler", "--sampler must be one of"),
        ("--spacing leading --steps 5", "spacing must be one of"),
        ("--spacing leading", "spacing must be one of"),
        ("--steps 0", "steps must be in [1, T = 8], got 0"),
        ("--steps 9", "steps must be in [1, T = 8], got 9"),
        ("--n 0", "--n must be an integer >= 1, got 0"),
        ("--batch-size 0", "--batch-size must be an integer >= 1, got 0"),
        ("--task slerp --frames 0", "--frames must be an integer >= 1, got 0"),
        ("--eta 2", "--eta must be in [0, 1], got 2.0"),
        ("--eta nan", "--eta must be in [0, 1], got nan"),
        ("--eta 0.5 --sampler heun", "--eta is for the samplers ['ddim'], got 'heun'"),
        ("--level=-0.1", "--level must be in [0, 1], got -0.1"),
        ("--guidance-rescale 2", "--guidance-rescale must be in [0, 1]"),
        ("--threshold 2", "--threshold must be in (0, 1], got 2.0"),
        ("--threshold 0", "--threshold must be in (0, 1], got 0.0"),
        (
            "--threshold 0.9 --no-clip",
            "--threshold must not be given where nothing is clipped",
        ),
        ("--guidance nan", "--guidance must be finite, got nan"),
        ("--guidance-rescale 0.5", "--guidance-rescale needs guidance, got none"),
        ("--ema 0.5", "ema must be one of"),
    ],
)
@pytest.mark.parametrize("out", ["refused.npz", "refused"])
def test_what_is_out_of_range_is_refused(args, words, out, labelled, tmp_path, refuses):
    assert words in refuses(labelled, *args.split(), out=("--out", tmp_path / out))
