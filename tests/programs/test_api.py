"""The package from Python: jd.load_run, sample_images, evaluate, train."""

import concurrent.futures
import dataclasses
import gc
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import evaluate
from support.tiny_runs import KNOWN, LABELS, SIZE, make_run, write_images

import jax_diffusion as jd
from jax_diffusion import diffusion, guidance, models, samplers
from jax_diffusion.evaluation import arguments
from jax_diffusion.pipeline import draw

DIGITS = dict(name="digits", split="train", batch_size=16)


@pytest.fixture(scope="module")
def digits(folder):
    """The workdir of a run on 8 x 8 digits."""
    return make_run(folder / "digits", shape=(8, 8, 1), data=DIGITS)


@pytest.fixture(scope="module")
def labeled(folder):
    write_images(folder / "images.npz")
    return jd.load_run(make_run(folder / "labeled", **LABELS))


def test_a_workdir_is_loaded_sampled_and_evaluated_in_three_lines(digits):
    run = jd.load_run(digits)
    images = jd.sample_images(run, n=6, sampler="ddim", steps=5)
    assert images.shape == (6, 8, 8, 1) and images.dtype == np.uint8
    results = jd.evaluate(run, metrics=["pixel_distance", "bpd"], n=100, bpd_images=8)
    found = {score.metric: score for score in results}
    assert found["pixel_distance"].value > 0 and found["pixel_distance"].images == 100
    assert found["bits_per_dim"].images == 8
    lines = str(results).splitlines()
    assert lines[0].split() == ["metric", "value", "+-", "images"]
    assert [line.split()[0] for line in lines[1 : 1 + len(results)]] == [*found]
    assert results.record["scores"]["bits_per_dim"] == found["bits_per_dim"].value


def test_evaluate_takes_arrays_and_a_reference():
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
    (score,) = jd.evaluate(
        images[:20], reference=images[20:], metrics=["pixel_distance"]
    )[:1]
    assert score.metric == "pixel_distance" and score.value > 0


def test_sampling_again_compiles_again_only_for_another_program(tiny, monkeypatch):
    run, traced = tiny, []

    def counted(*args, **options):  # called when a program is traced
        traced.append(args)
        return models.bind(*args, **options)

    def times_traced(**options):
        before = len(traced)
        images = jd.sample_images(run, **dict(n=3, steps=2, guidance=1) | options)
        return len(traced) - before, images

    monkeypatch.setattr(draw, "bind", counted)
    monkeypatch.setattr(draw, "kept", {})
    assert times_traced()[0] > 0
    numbers = dict(steps=4, guidance=3, eta=0.5, spacing="trailing", seed=1, label=2)
    again, images = times_traced(**numbers)
    assert again == 0
    inpainted = dict(task="inpaint", mask="top")
    for change in (
        *(dict(sampler="ddpm"), dict(clip=False), dict(threshold=0.9)),
        *(dict(guidance_method="apg"), dict(guidance=None)),
        *(dict(task="progress", frames=2), dict(task="progress", frames=1)),
        *(inpainted, inpainted | dict(mask="left"), inpainted | dict(steps=3)),
    ):
        assert times_traced(**change)[0] > 0, change
        assert times_traced(**change)[0] == 0, change
    monkeypatch.setattr(draw, "kept", {})
    np.testing.assert_array_equal(times_traced(**numbers)[1], images)


def test_samplers_that_were_not_used_for_long_are_forgotten(monkeypatch):
    monkeypatch.setattr(draw, "kept", {})
    made = [draw.keep(i, lambda: lambda: None) for i in range(draw.MAX_KEPT)]
    assert draw.keep(0, lambda: lambda: None) is made[0]
    draw.keep("one more", lambda: lambda: None)
    assert draw.keep(0, lambda: lambda: None) is made[0]
    assert draw.keep(1, lambda: lambda: None) is not made[1]
    assert len(draw.kept) == draw.MAX_KEPT
    assert draw.keep(([],), lambda: print) is print  # what cannot be hashed


@pytest.fixture(scope="module")
def tiny(folder):
    """A run of a network that compiles in no time, and knows labels."""
    write_images(folder / "images.npz")
    tiny = LABELS | dict(model=dict(name="support.networks:Tiny", num_classes=KNOWN))
    return jd.load_run(make_run(folder / "tiny", **tiny))


class Brightness:
    """A network that is no Flax module, and may be changed: it predicts one value."""

    takes_labels = False

    def __init__(self, value):
        self.value = value

    def init(self, key, *inputs, **told):
        return {"params": {}}

    def apply(self, variables, x, timesteps, **told):
        return jnp.full_like(x, self.value)


def test_a_network_that_was_changed_is_never_drawn_from_as_it_was(tiny, monkeypatch):
    monkeypatch.setattr(draw, "kept", {})
    config = tiny.config.copy_and_resolve_references()
    config.label_dropout = 0.0
    told = dict(config=config, objective=diffusion.Objective("x_0", "fixed_small"))
    run = dataclasses.replace(tiny, model=Brightness(-1.0), params={}, **told)
    assert np.all(jd.sample_images(run, n=2, steps=2) == 0)
    run.model.value = 1.0
    assert np.all(jd.sample_images(run, n=2, steps=2) == 255)


def test_a_method_of_guidance_that_was_replaced_is_used(tiny, monkeypatch):
    monkeypatch.setattr(draw, "kept", {})
    told = dict(n=2, steps=2, guidance=2, guidance_method="mine")
    for value in (-1.0, 1.0):

        def mine(told_fn, weak_fn, scale, *, rescale, value=value):
            def denoise_fn(x_t, t, **cond):
                x_0 = jnp.full_like(x_t, value)
                return diffusion.Prediction(x_0, x_t)

            return denoise_fn

        monkeypatch.setitem(guidance.GUIDANCE_METHODS, "mine", mine)
        images = jd.sample_images(tiny, **told)
        assert np.all(images == (255 if value > 0 else 0))


def test_a_kept_sampler_keeps_neither_parameters_nor_arrays(tiny, monkeypatch):
    monkeypatch.setattr(draw, "kept", {})
    params = jax.tree.map(np.array, tiny.params)
    run = dataclasses.replace(tiny, params=params)
    images = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    mask = np.eye(SIZE, dtype=bool)
    held = [weakref.ref(a) for a in (*jax.tree.leaves(params), images, mask)]
    told = dict(task="inpaint", images=images, mask=mask, label=0)
    jd.sample_images(run, 2, steps=2, **told)
    assert len(draw.kept) == 1
    del run, params, images, mask, told
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


def test_threads_may_draw_at_the_same_time(monkeypatch):
    """Bookkeeping of more samplers than are kept, by threads that switch often."""
    monkeypatch.setattr(draw, "kept", {})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def use(first):
        for i in range(2000):
            draw.keep((first + i) % (2 * draw.MAX_KEPT), lambda: print)

    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(use, 3 * k) for k in range(8)]:
                done.result()  # raises what the thread has raised
    finally:
        sys.setswitchinterval(interval)
    assert len(draw.kept) == draw.MAX_KEPT


def test_an_image_depends_on_seed_and_number_only(labeled):
    whole = jd.sample_images(labeled, n=5, steps=3, eta=1, label=[1, 2])
    some = jd.sample_images(labeled, ids=[4, 1], steps=3, eta=1, label=[1, 2])
    for image, number in zip(some, (4, 1), strict=True):
        assert np.abs(image.astype(int) - whole[number]).max() <= 1
    other = jd.sample_images(labeled, n=5, steps=3, eta=1, label=[1, 2], seed=1)
    assert np.mean(other != whole) > 0.5


@pytest.mark.slow
def test_tasks_labels_guidance_and_arrays_go_by_keyword(labeled):
    start = np.full((3, SIZE, SIZE, 3), 200, np.uint8)
    known = np.zeros((SIZE, SIZE), bool)
    known[:, :5] = True
    images = jd.sample_images(
        *(labeled, 3),
        **dict(task="inpaint", images=start, mask=known, rounding="round"),
        **dict(steps=3, label=3, guidance=2),
    )
    assert images.shape == start.shape
    np.testing.assert_array_equal(images[:, known], start[:, known])
    strip = jd.sample_images(labeled, 2, task="slerp", frames=3, steps=2)
    assert strip.shape == (3, 2, SIZE, SIZE, 3)


@pytest.mark.slow
def test_a_second_run_enlarges_what_is_drawn(labeled, folder):
    model = LABELS["model"] | dict(low_res=True)
    up = make_run(folder / "up", shape=(2 * SIZE,) * 2 + (3,), model=model)
    large = jd.sample_images(labeled, 2, steps=2, upsample=up)
    assert large.shape == (2, 2 * SIZE, 2 * SIZE, 3)
    small = jd.sample_images(labeled, 2, steps=2)
    alone = jd.sample_images(jd.load_run(up), 2, steps=2, low_res=small, label=[0, 1])
    assert np.abs(large.astype(int) - alone).max() <= 1


REFUSED = [
    (dict(stps=3), "there is no option 'stps'; did you mean 'steps'"),
    (dict(eta=2), r"eta must be in \[0, 1\], got 2"),
    (dict(sampler="dimm"), "sampler must be one of .*did you mean 'ddim'"),
    (dict(steps=99), r"steps must be in \[1, T = 8\], got 99"),
    (dict(label=KNOWN), "label must be from 0 to 3, got 4"),
    (dict(task="inpant"), "task must be one of .*did you mean 'inpaint'"),
    (dict(ids=np.empty(0, int)), "ids must be integers"),
    (dict(ids=np.array([0.5])), "ids must be integers"),
    (dict(ids=np.array([2**31])), r"ids must be in \[0, 2\^31\)"),
    (dict(n=0), "n must be an integer in"),
    (dict(n=True), "n must be an integer in"),
    (dict(batch_size=0), "batch_size must be an integer in"),
    (dict(seed=-1), "seed must be an integer in"),
    (dict(seed=2**32), "seed must be an integer in"),
    (dict(steps=2.5), "steps must be an integer, got 2.5"),
    (dict(steps=True), "steps must be an integer, got True"),
    (dict(eta="0.5"), "eta must be a number, got '0.5'"),
    (dict(guidance="3"), "guidance must be a number"),
    (dict(clip="no"), "clip must be True or False, got 'no'"),
    (dict(group=True, task="complete", eta=1.0), "group must be an integer in"),
    (dict(level="a", task="edit"), "level must be in"),
    (dict(sampler="math:pi"), "sampler must be one of .*, which is 3.14"),
    (dict(sampler="math:sqrt"), "sampler must be a function of .keys, denoise_fn"),
    (dict(classifier="nowhere"), "classifier must be a workdir that can be loaded"),
    (dict(guide_with="a", guidance=2), "guide_with must be a workdir that can be load"),
    (dict(guide_with=3, guidance=2), "guide_with must be the path of a workdir, got 3"),
    (dict(guidance_method=3, guidance=2), "guidance_method must be one of"),
    (dict(upsample="nowhere"), "upsample must be a workdir that can be loaded"),
    (dict(mask=None, task="inpaint"), "mask must be of"),
    (dict(mask=np.ones((8, 8, 3)), task="inpaint"), "mask must be 8 x 8"),
    (dict(level=2, task="edit"), r"level must be in \[0, 1\]"),
    (dict(images=np.zeros((1, 4, 4, 3), np.uint8), task="edit"), r"\(8, 8, 3\)"),
    (dict(mask=np.zeros((4, 4)), task="inpaint"), "mask must be 8 x 8"),
    (dict(low_res=np.zeros((1, 4, 4, 3), np.uint8)), "low_res must be given for"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(fields, sentence, labeled):
    with pytest.raises(ValueError, match=sentence):
        jd.sample_images(labeled, **fields)


@pytest.mark.parametrize("value", [None, 3, 2.5, print, object()])
def test_what_evaluate_scores_is_checked_before_what_it_is_compared_with(value):
    words = "^run_or_images must be a run, as load_run returns it, or images, "
    with pytest.raises(ValueError, match=words):
        arguments.check_kinds(value, None, None)


def test_a_workdir_in_the_place_of_images_is_told_what_it_is(labeled, monkeypatch):
    workdir, rule = labeled.workdir, "PATH of images, got the workdir of a run"
    given = [workdir, str(workdir), f"folder:{workdir}"]
    for path in given:
        with pytest.raises(ValueError, match=rf"^images must .*{rule}.*jd\.load_run"):
            jd.evaluate(path)
        with pytest.raises(ValueError, match=f"^images must .*{rule}"):
            jd.evaluate(labeled, images=path)
        with pytest.raises(ValueError, match=f"^reference must .*{rule}"):
            jd.evaluate(labeled, reference=path)
    told = ["evaluate", "--images", str(workdir), "--reference", str(workdir)]
    monkeypatch.setattr("sys.argv", told)
    with pytest.raises(ValueError, match=f"^--images must .*{rule}"):
        evaluate.main()


@pytest.mark.parametrize("interval", [(1, 0), "1,0", (-1, 2), (1,), "x"])
def test_an_interval_of_guidance_has_its_ends_in_order(interval, labeled):
    words = r"^guidance_interval must be LOW,HIGH with 0 <= LOW <= HIGH, got "
    with pytest.raises(ValueError, match=words):
        jd.sample_images(labeled, guidance=2.0, guidance_interval=interval)
    with pytest.raises(ValueError, match=r"^guidance_interval needs "):
        jd.sample_images(labeled, guidance_interval=interval)


def test_options_may_be_given_as_one_object(labeled):
    options = jd.SamplingOptions(steps=2, label=1)
    images = jd.sample_images(labeled, 2, options=options, label=2)
    np.testing.assert_array_equal(
        images, jd.sample_images(labeled, 2, steps=2, label=2)
    )


def test_the_api_is_listed_for_completion():
    names = dir(jd)
    assert {*jd.__all__, "data", "metrics", "models"} <= {*names}
    assert jd.data.load and jd.metrics.frechet_distance


def test_options_that_flags_know_are_fields():
    from jax_diffusion import cli

    parser = cli.make_parser("sample", None)
    cli.add_sampling_flags(parser)
    told = {action.dest for action in parser._actions} - {"help", "version"}
    told = {
        {"no_clip": "clip", "no_reclip": "reclip", "quantize": "rounding"}.get(n, n)
        for n in told
    }
    assert told == set(jd.SamplingOptions.__dataclass_fields__)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_functions_stay_functions_when_programs_are_imported(name):
    code = (
        f"import jax_diffusion.{name}, jax_diffusion as jd; "
        f"from jax_diffusion.{name} import main; "
        f"assert callable(jd.{name}) and callable(main); print(jd.{name}.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{name}\n", done.stderr


def test_unknown_attributes_are_unknown():
    with pytest.raises(AttributeError, match="no attribute 'samplr'"):
        jd.samplr  # noqa: B018


def test_the_package_lists_its_programs():
    done = subprocess.run(
        [sys.executable, "-m", "jax_diffusion"], capture_output=True, text=True
    )
    for name in ("train", "sample", "evaluate", "convert"):
        assert f"python -m jax_diffusion.{name} " in done.stdout
    assert done.returncode == 0


@pytest.mark.slow
def test_every_sampler_draws_with_its_own_defaults(folder):
    network = dict(name="support.networks:Tiny")
    run = jd.load_run(make_run(folder / "plain", shape=(4, 4, 1), model=network))
    for name in samplers.SAMPLERS:
        images = jd.sample_images(run, 2, sampler=name)
        assert images.shape == (2, 4, 4, 1)
