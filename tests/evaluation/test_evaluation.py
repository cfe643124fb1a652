"""`jax_diffusion.evaluate` of arrays, files and data sets, and metrics of users."""

import inspect

import numpy as np
import pytest
from PIL import Image
from support.features import images_of, refuses
from support.tiny import SMALL

import jax_diffusion as jd
from jax_diffusion import data, metrics
from jax_diffusion.config import build
from jax_diffusion.evaluation import METRICS, Metric, features, sample_quality
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.evaluation.image_sets import as_image_set

DIGITS = data.load("digits", "train", batch_size=64, train=False).images
FEW, MANY = DIGITS[:100], DIGITS[100:400]


def pixels(images):
    return data.from_uint8(images).reshape(len(images), -1)


def distance(a, b):
    a, b = (metrics.moments(pixels(images)) for images in (a, b))
    return metrics.frechet_distance(a, b)


def write_pngs(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{i:05d}.png")
    return folder


@pytest.mark.slow
def test_arrays_folders_and_npz_files_have_the_same_pixel_distance(tmp_path):
    np.savez(tmp_path / "few.npz", FEW)
    np.save(tmp_path / "many.npy", MANY)
    sources = [FEW, write_pngs(tmp_path / "few", FEW), str(tmp_path / "few.npz")]
    sources += [f"npz:{tmp_path / 'few.npz'}"]
    for images in sources:
        scores = jd.evaluate(
            images, reference=tmp_path / "many.npy", metrics="pixel_distance"
        )
        expected = distance(FEW, MANY)
        np.testing.assert_allclose(scores[0].value, expected, rtol=1e-6)
        assert scores[0][:1] + scores[0][2:] == ("pixel_distance", 100, None)
        assert f"{expected:.6g}" in str(scores) and str(scores).startswith("metric")
        assert scores.record["scores"]["pixel_distance"] == scores[0].value
        assert len(scores.record["samples"]["sha256"]) == 64
    assert {path.name for path in tmp_path.iterdir()} == {
        *("few", "few.npz", "many.npy"),  # nothing is written unless `out` is given
    }


def test_a_data_set_by_its_name_is_a_reference_of_one_split():
    scores = jd.evaluate(
        FEW, n=90, reference="digits", reference_split="test", metrics="pixel_distance"
    )
    test = data.load("digits", "test", batch_size=64, train=False).images
    np.testing.assert_allclose(scores[0].value, distance(FEW[:90], test), rtol=1e-6)
    told = scores.record["reference"]
    assert (told["by"], told["split"], told["flip"]) == ("digits", "test", False)


def test_real_vs_real_is_the_distance_of_as_many_images_to_all_others():
    one, real = jd.evaluate(FEW, reference=MANY, metrics=["pixel_distance"])
    assert real.metric == "pixel_distance_real_vs_real" and real.images == 100
    order = np.random.default_rng(0).permutation(len(MANY))
    expected = distance(MANY[order[:100]], MANY[order[100:]])
    np.testing.assert_allclose(real.value, expected, rtol=1e-6)
    # Without as many images as numbers, its moments have no full rank.
    (alone,) = jd.evaluate(FEW, reference=MANY[:120], metrics=["pixel_distance"])
    assert alone.metric == one.metric


OWN = """
import numpy as np
from jax_diffusion.evaluation import Metric, Score
from jax_diffusion.evaluation.features import FeatureExtractor
from jax_diffusion.evaluation.image_sets import as_image_set

def shift(samples, reference):
    return np.abs(samples.mean(axis=0) - reference.mean(axis=0)).max()

def means(params, images):
    return {"pool": images.astype("float32").mean(axis=(1, 2))}

def gap(name, samples, reference):
    return [Score("gap", float(samples["pool"].max()), len(samples["pool"]))]

def nothing(samples, reference):
    pass

def every(samples, reference):
    return samples.mean(axis=0)

row = Metric(FeatureExtractor("means", "", {}, means), gap)
number = 3
"""


def test_metrics_of_a_users_module_are_named_by_module_and_function(
    tmp_path, monkeypatch
):
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["own_metrics:shift", "own_metrics:row"]
    shift, gap = jd.evaluate(FEW, reference=MANY, metrics=names)
    expected = np.abs(pixels(FEW).mean(axis=0) - pixels(MANY).mean(axis=0)).max()
    assert shift.metric == "own_metrics:shift" and shift.images == 100
    np.testing.assert_allclose(shift.value, expected, rtol=1e-5)
    np.testing.assert_allclose(gap.value, FEW.mean(axis=(1, 2)).max(), rtol=1e-5)
    assert gap.metric == "gap"
    for name, words in (
        (
            "own_metrics:number",
            "or an importable function, got 'own_metrics:number', which is 3",
        ),
        ("own_metrics:none", "own_metrics:none"),
        ("math:pi", "or an importable function, got 'math:pi', which is 3.14"),
        ("math:sqrt", "metrics must name a function of two arguments"),
        ("own_metrics:nothing", "'own_metrics:nothing': it returns None"),
        ("own_metrics:every", "'own_metrics:every': it returns float32 [64]"),
        ("fidd", "did you mean 'fid'"),
    ):
        assert words in refuses(jd.evaluate, FEW, reference=MANY, metrics=name)


def test_features_are_found_by_extractor_and_kind_whatever_their_names():
    arrays = {k: np.zeros(1) for k in ("a_pool", "a_b_pool", "a_b_logits")}
    assert [*features.of_extractor(arrays, "a")] == ["pool"]
    found = features.of_extractor(arrays, "a_b")
    assert [*found] == ["pool", "logits"] and found["pool"] is arrays["a_b_pool"]


def test_every_metric_knows_its_extractor_and_gives_scores_of_its_features():
    rng = np.random.default_rng(0)
    sets = [
        {k: rng.normal(size=(60, 6)).astype(np.float32) for k in ("pool", "spatial")}
        | {"logits": rng.normal(size=(60, 5)).astype(np.float32)}
        for _ in range(2)
    ]
    samples, features = sets
    moments = sample_quality.moments_of(features)
    reference = sample_quality.Reference(features, moments)
    for name, row in METRICS.items():
        assert row.extractor_name in ("inception", "classifier", "pixels")
        scores = row.compute(name, samples, reference)
        assert scores and all(np.isfinite(s.value) for s in scores)
        assert all(s.images <= 60 for s in scores)
        if row.needs_reference_features:
            continue
        alone = row.compute(name, samples, sample_quality.Reference({}, moments))
        assert alone[0] == scores[0]


def test_images_of_other_sizes_are_for_extractors_that_take_any_size():
    def means(params, images):
        return {"pool": images.astype("float32").mean(axis=(1, 2))}

    def gap(name, samples, reference):
        assert samples["pool"].shape[1] == reference.features["pool"].shape[1]
        return [sample_quality.Score(name, 0.0, len(samples["pool"]))]

    large, small = (
        as_image_set(images_of(9, side, side, 3), batch_size=4) for side in (6, 4)
    )
    for any_size in (True, False):
        extractor = FeatureExtractor("means", "", {}, means, any_size)
        row, args = {"gap": Metric(extractor, gap)}, (large, small)
        if any_size:
            assert sample_quality.score_images(*args, row, {}).scores[0].images == 9
        else:
            words = refuses(sample_quality.score_images, *args, row, {})
            assert "must be of one shape" in words


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (FEW, {}, "reference must be given"),
        (FEW / 255, dict(reference=MANY), "images must be uint8 [n h w c]"),
        (FEW[0], dict(reference=MANY), "got uint8 (8, 8, 1)"),
        (FEW, dict(reference=MANY, n=0), "n must be an integer >= 1, got 0"),
        (FEW, dict(reference=MANY, n=101), "n must be at most 100 images, got 101"),
        (FEW, dict(reference=MANY, metrics="bpd"), "images without a run must be of"),
        (FEW, dict(reference=MANY, steps=3), "steps needs samples of a run"),
        (
            FEW,
            dict(reference=MANY, metrics="pixel_distance", save_moments="m.npz"),
            "Inception's features",
        ),
        (
            FEW,
            dict(reference=MANY, metrics="cnn_fd"),
            "feature_classifier must be a file, got None",
        ),
        (
            FEW,
            dict(reference=MANY, metrics="pixel_distance", classifier="a.npz"),
            "classifier needs samples of a run",
        ),
        (
            images_of(9, 40, 40, 3),
            dict(reference=images_of(9, 40, 40, 3), metrics="pixel_distance"),
            "pixel_distance is for images of up to 4096 numbers",
        ),
        ("", dict(reference=MANY), "images must be"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(images, options, words):
    assert words in refuses(jd.evaluate, images, **options)


@pytest.fixture(scope="module")
def run():
    """A run of a network whose parameters are never read."""
    return tiny_run("configs/smoke.py", *SMALL)


@pytest.fixture(scope="module")
def classifier_run():
    return tiny_run("configs/digits_classifier.py")


def tiny_run(*args):
    config = jd.load_config(args[0], args[1:])
    built = build(config, 1)
    return jd.Run(config, built.model, {}, built.objective, (8, 8, 1))


ABSENT = "absent.npz"  # is never read
BPD = dict(metrics=["bpd"])
PIXELS = dict(metrics=["pixel_distance"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(images=FEW), "images must be given once"),
        (dict(data="digits"), "data needs a run"),
        (dict(options=jd.SamplingOptions(eta=1.0)), "eta needs samples of a run"),
        (dict(bpd_images=3), "bpd_images is for the metrics ['bpd', 'nll_ode']"),
        (dict(bpd_steps=3), "bpd_steps is for the metrics ['bpd'], got ['fid', "),
        (dict(split="all"), "split is for the metrics ['bpd', 'nll_ode', 'accuracy']"),
        (dict(reference_split="test"), "reference_split needs a data set with splits"),
        (dict(n=1, **PIXELS), "n must be >= 2 for pixel_distance, got 1."),
        (dict(n=True), "n must be an integer >= 1, got True."),
        (dict(n=2.0), "n must be an integer >= 1, got 2.0."),
        (dict(batch_size=None), "batch_size must be an integer >= 1, got None."),
        (dict(ode_steps=None), "ode_steps must be an integer >= 1, got None."),
        (dict(ode_probes=1.5), "ode_probes must be an integer >= 1, got 1.5."),
        (dict(bpd_images="8"), "bpd_images must be an integer >= 1, got '8'."),
        (dict(seed=0.5), "seed must be an integer in [0, 4294967295], got 0.5."),
        (dict(metrics=[]), "metrics must be one name or more, got []."),
        (dict(metrics=3), "metrics must be one name or more, got [3]."),
        (dict(metrics=["fid", None]), "metrics must be one name or more, got ['fid', "),
    ],
)
def test_arguments_that_do_not_fit_images_are_refused_before_these_are_read(
    options, words
):
    # As users call it: tests check types by annotations, too.
    call = inspect.unwrap(jd.evaluate)
    sentence = refuses(call, ABSENT, **dict(reference=ABSENT) | options)
    assert sentence.startswith(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(n=8, **BPD), "n is for metrics of images, got metrics ['bpd'];"),
        (dict(images=ABSENT, **BPD), "images is for metrics of images"),
        (dict(reference=ABSENT, **BPD), "reference is for metrics of images"),
        (dict(reference_split="test", **BPD), "reference_split is for metrics of im"),
        (dict(steps=3, **BPD), "steps is for metrics of images"),
        (dict(options=jd.SamplingOptions(label=3), **BPD), "label is for metrics of"),
        (dict(images=ABSENT, guidance=2.0), "guidance needs samples of a run"),
        (dict(bpd_images=8, **PIXELS), "bpd_images is for the metrics ['bpd', "),
        (dict(bpd_steps=100, **BPD), "bpd_steps must be in [1, T = 10], got 100."),
        (dict(reference_split="x", **PIXELS), "reference_split must be one of"),
        (dict(split="x", **BPD), "split must be one of"),
    ],
)
def test_arguments_that_do_not_fit_a_run_are_refused(run, options, words):
    assert refuses(jd.evaluate, run, **options).startswith(words)


@pytest.mark.parametrize("name", ["n", "steps", "label", "bpd_images"])
def test_a_noisy_classifier_has_no_samples_that_arguments_could_be_of(
    classifier_run, name
):
    words = refuses(jd.evaluate, classifier_run, **{name: 1})
    assert words.startswith(f"{name} is for") and "'accuracy'" in words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(label=99), "label"),
        (dict(steps=99), "steps"),
        (dict(metrics="cnn_fd", label=99), "label"),
        (dict(metrics="cnn_fd", steps=99), "steps must be in [1, T = 10], got 99."),
        (dict(metrics="cnn_fd, bpd", bpd_images=999), "bpd_images must be at most 179"),
    ],
)
def test_a_feature_classifier_is_trained_after_all_else_was_checked(
    run, tmp_path, options, words
):
    file = tmp_path / "classifier.npz"
    told = dict(train_feature_classifier=True, feature_classifier=file, out=tmp_path)
    assert refuses(jd.evaluate, run, **told, **options).startswith(words)
    assert not any(tmp_path.iterdir())


def test_names_of_metrics_may_have_spaces_around_them():
    names = " pixel_distance, pixel_distance "
    scores = jd.evaluate(FEW, reference=MANY, metrics=names)
    assert scores[0].metric == "pixel_distance"
