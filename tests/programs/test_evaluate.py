"""Scores of a run and of images: what is printed, kept and refused."""

import hashlib
import json
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support.jobs import Job, evaluations
from support.programs import evaluate, sample
from support.tiny import SMALL

import jax_diffusion as jd
from jax_diffusion import cli, data, metrics
from jax_diffusion.config import FORMAT, build
from jax_diffusion.evaluation import feature_classifier, results
from jax_diffusion.evaluation import features as extractors
from jax_diffusion.evaluation.feature_classifier import train_feature_classifier
from jax_diffusion.interop import inception_weights
from jax_diffusion.models import example_inputs
from jax_diffusion.runtime import checkpoint
from jax_diffusion.runtime.checkpoint import load_record
from jax_diffusion.runtime.resumable_npz import ResumableNpz

# Most tests share the shapes of batches: these are compiled once.
# 100 samples and 64 pixels: enough for moments of full rank.
DRAWN = ("--n", "100", "--steps", "3", "--batch-size", "32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as after four steps of training; its parameters are random numbers."""
    workdir = tmp_path_factory.mktemp("run")
    config = jd.load_config("configs/smoke.py", SMALL)
    params = random_params(config)
    record = {"config": json.loads(config.to_json()), "window": []}
    record |= {"image_shape": [8, 8, 1], "format": FORMAT}
    with checkpoint.make_manager(workdir) as manager:
        tree = {"params": {}, "ema_params": {"0.99": params}}
        checkpoint.save(manager, 4, tree, record)
    return workdir


def random_params(config):
    """Parameters of the network that a config describes, nowhere zero."""
    model = build(config, 1).model
    inputs = example_inputs(model, (8, 8, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32), shapes
    )


@pytest.fixture
def score(monkeypatch):
    def main(*arguments):
        argv = ["evaluate", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate.main()

    return main


@pytest.fixture
def refused(score):
    """The one sentence in which a command is refused."""

    def main(*arguments):
        with pytest.raises(ValueError) as info:
            score(*arguments)
        sentence = str(info.value)
        assert sentence.endswith((".", "?")) and "\n" not in sentence
        return sentence

    return main


def digits(split):
    return data.load("digits", split, batch_size=64, train=False).images


def pixels(images):
    return data.from_uint8(images).reshape(len(images), -1)


def write_pngs(folder, images):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{i:05d}.png")
    return folder


def test_scores_add_up_and_say_how_they_were_made(run, tmp_path, score, capsys):
    score("--workdir", run, "--out", tmp_path, *DRAWN)
    printed = capsys.readouterr().out
    (found,) = evaluations_of(tmp_path)
    scores, errors = found["scores"], found["errors"]
    parts = scores["prior"] + scores["kl"] + scores["decoder"]
    np.testing.assert_allclose(scores["bits_per_dim"], parts, rtol=1e-5)
    for name, value in scores.items():
        assert name in printed and f"{value:.6g}" in printed
    assert found["images"] == {
        **dict(pixel_distance=100, pixel_distance_real_vs_real=100),
        **dict.fromkeys(("bits_per_dim", "prior", "kl", "decoder", "rmse"), 179),
    }
    assert errors["bits_per_dim"] > 0
    told = found["samples"]
    assert (told["sampler"], told["steps"], told["eta"], told["clip"]) == (
        *("ddim", 3, 0.0, True),
    )
    assert told["quantize"] == "floor" and told["seed"] == found["seed"] == 0
    assert found["network"]["ema"] == "0.99" and found["network"]["step"] == 4
    reference = found["reference"]
    assert (reference["by"], reference["split"]) == ("digits", "train")
    assert reference["flip"] is False and len(reference["sha256"]["pixels"]) == 64
    assert found["versions"]["jax"] == jax.__version__
    assert found["seconds"].keys() == {
        *("samples", "reference", "moments", "pixel_distance", "bpd_terms"),
    }


@pytest.mark.slow
def test_a_distance_is_that_of_the_samples_which_are_kept(run, tmp_path, score):
    score("--workdir", run, "--out", tmp_path, "--metrics", "pixel_distance", *DRAWN)
    with np.load(tmp_path / "samples.npz") as kept:
        images, labels = kept["arr_0"], kept["arr_1"]
    assert images.shape == (100, 8, 8, 1) and images.dtype == np.uint8
    assert len(labels) == 100
    distance = metrics.frechet_distance(
        metrics.moments(pixels(images)), metrics.moments(pixels(digits("train")))
    )
    (found,) = evaluations_of(tmp_path)
    np.testing.assert_allclose(found["scores"]["pixel_distance"], distance, rtol=1e-6)


@pytest.mark.slow
def test_samples_can_be_those_that_sample_has_written(
    run, tmp_path, score, monkeypatch
):
    out = tmp_path / "drawn.npz"
    argv = ["sample", "--workdir", run, "--out", out, *DRAWN]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    sample.main()
    only = ("--metrics", "pixel_distance", "--batch-size", 32)
    score("--workdir", run, "--out", tmp_path / "a", "--images", out, *only)
    score("--workdir", run, "--out", tmp_path / "b", *only, *DRAWN)
    read, drawn = (evaluations_of(tmp_path / name)[0] for name in "ab")
    assert read["scores"] == drawn["scores"] and len(read["samples"]["sha256"]) == 64


def evaluations_of(out):
    return json.loads((out / "scores.json").read_text())["evaluations"]


@pytest.mark.slow
def test_terms_are_written_as_image_nll_writes_them(run, tmp_path, score):
    few = ("--metrics", "bpd", "--bpd-images", "30", "--batch-size", "32")
    score("--workdir", run, "--out", tmp_path, *few)
    with np.load(tmp_path / "bpd_terms.npz") as terms:
        vlb, total, prior = terms["vlb"], terms["total"], terms["prior"]
        eps_mse, x_0_mse = terms["eps_mse"], terms["x_0_mse"]
    assert vlb.shape == (30, 10)
    np.testing.assert_allclose(total, prior + vlb.sum(axis=1), rtol=1e-5)
    for name, values in (("vb", vlb), ("mse", eps_mse), ("xstart_mse", x_0_mse)):
        with np.load(tmp_path / f"{name}_terms.npz") as file:
            found = file["arr_0"]
        # column 0 belongs to the last timestep
        np.testing.assert_allclose(found, values.mean(axis=0)[::-1], rtol=1e-6)
    with np.load(tmp_path / "rate_distortion.npz") as curve:
        np.testing.assert_allclose(curve["rate"][-1], prior.mean(), rtol=1e-5)
    for name in ("bpd_terms", "rate_distortion"):
        with Image.open(tmp_path / f"{name}.png") as plot:
            assert plot.size[0] > 100


@pytest.mark.slow
def test_fewer_steps_give_a_bound_of_fewer_terms(run, tmp_path, score):
    few = ("--metrics", "bpd", "--bpd-images", "16", "--bpd-steps", "4")
    score("--workdir", run, "--out", tmp_path, *few)
    with np.load(tmp_path / "bpd_terms.npz") as terms:
        assert terms["vlb"].shape == (16, 4)
    assert evaluations_of(tmp_path)[0]["bpd"]["steps"] == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nll_ode needs")  # the run is untrained
def test_likelihood_by_the_ode_has_its_errors(run, tmp_path, score):
    few = ("--metrics", "nll_ode", "--bpd-images", "8", "--ode-probes", "2")
    score("--workdir", run, "--out", tmp_path, *few)
    (found,) = evaluations_of(tmp_path)
    assert found["nll_ode"]["steps"] == 9 and found["nll_ode"]["probes"] == 2
    assert found["scores"].keys() == {
        *("nll_ode", "nll_ode_step_error", "nll_ode_probe_error"),
    }
    assert all(np.isfinite(v) for v in found["scores"].values())
    assert found["scores"]["nll_ode_step_error"] > 0


@pytest.mark.slow
def test_evaluations_are_added_to_those_before(run, tmp_path, score):
    few = ("--workdir", run, "--out", tmp_path, "--metrics", "bpd")
    for images in (27, 29):
        score(*few, "--bpd-images", images)
    found = [e["images"]["bits_per_dim"] for e in evaluations_of(tmp_path)]
    assert found == [27, 29]


@pytest.mark.slow
def test_a_classifier_of_the_run_scores_its_samples(
    run, tmp_path, score, capsys, monkeypatch
):
    monkeypatch.setattr(feature_classifier, "MIN_STEPS", 60)
    score("--workdir", run, "--out", tmp_path, "--train-feature-classifier")
    said = capsys.readouterr().out
    assert "of 179 test images right" in said
    assert not (tmp_path / "scores.json").exists()
    names = ("cnn_fd", "cnn_is", "cnn_kid", "cnn_precision_recall")
    score("--workdir", run, "--out", tmp_path, "--metrics", ",".join(names), *DRAWN)
    (found,) = evaluations_of(tmp_path)
    scores = found["scores"]
    assert {*names[:3], "cnn_precision", "cnn_recall"} <= scores.keys()
    assert not any("fid" in name for name in scores)
    assert scores["cnn_fd"] > scores["cnn_fd_real_vs_real"]
    assert 1 <= scores["cnn_is"] <= 10
    assert 0 <= scores["cnn_precision"] <= 1
    assert len(found["extractors"]["classifier"]) == 64


def test_scores_stand_beside_those_of_the_paper(run, tmp_path, score, capsys):
    """Of a run that says what it reproduces; here of its record with that added."""
    record = load_record(run)
    record["config"]["reproduces"] = "iddpm_cifar10_hybrid"
    params = jd.load_run(run).params
    record["config"]["ema_decays"] = []
    checkpoint.save_params(tmp_path / "run", params, record)
    few = ("--metrics", "bpd", "--bpd-images", "30", "--compare", "paper")
    score("--workdir", tmp_path / "run", *few)
    (found,) = evaluations(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "transcribed" in printed
    row = next(r for r in printed.splitlines() if "3.17" in r)
    assert row.startswith("bits_per_dim")
    assert f"{found['scores']['bits_per_dim']:.4g}" in row


# from Python, and as `sample` draws


@pytest.mark.slow
def test_python_finds_what_the_program_finds_and_writes_nothing(run, tmp_path, score):
    names = "pixel_distance,bpd"
    few = ("--bpd-images", 30, "--n", 70, "--steps", 3, "--batch-size", 32)
    score("--workdir", run, "--out", tmp_path, "--metrics", names, *few, "--eta", 1)
    (told,) = evaluations_of(tmp_path)
    before = {path.name for path in run.iterdir()}
    sampling = dict(steps=3, eta=1.0)
    found = jd.evaluate(
        jd.load_run(run), metrics=names, bpd_images=30, n=70, batch_size=32, **sampling
    )
    assert {path.name for path in run.iterdir()} == before
    for field in ("scores", "errors", "images", "samples", "reference", "network"):
        assert found.record[field] == told[field]
    assert found.record["samples"]["eta"] == 1 and found.record["network"]["step"] == 4
    assert [s.value for s in found] == [*told["scores"].values()]
    assert f"{found[0].value:.6g}" in str(found)


@pytest.fixture(scope="module")
def labeled(run, tmp_path_factory):
    """A run of a network to which labels were hidden in training; of random numbers."""
    workdir, record = tmp_path_factory.mktemp("labeled") / "run", load_record(run)
    config = record["config"] | dict(label_dropout=0.1, ema_decays=[])
    params = random_params(ConfigDict(config))
    checkpoint.save_params(workdir, params, record | dict(config=config))
    return workdir


@pytest.mark.slow
def test_guided_samples_are_scored_as_sample_draws_them(
    labeled, tmp_path, score, monkeypatch
):
    guided = ("--guidance", 3, "--label", "3,4", "--threshold", 0.9, "--n", 70)
    guided = (*guided, "--steps", 3, "--batch-size", 32)
    out = tmp_path / "drawn.npz"
    argv = ["sample", "--workdir", labeled, "--out", out, *guided]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    sample.main()
    common = ("--workdir", labeled, "--metrics", "pixel_distance", "--out")
    score(*common, tmp_path / "a", "--images", out, "--batch-size", 32)
    score(*common, tmp_path / "b", *guided)
    read, drawn = (evaluations_of(tmp_path / name)[0] for name in "ab")
    assert read["scores"] == drawn["scores"]
    told = drawn["samples"]
    assert (told["guidance"], told["label"], told["threshold"]) == (3, "3,4", 0.9)
    assert "guidance_rescale" not in told  # as by default
    with np.load(tmp_path / "b" / "samples.npz") as kept, np.load(out) as sampled:
        np.testing.assert_array_equal(kept["arr_0"], sampled["arr_0"])
        np.testing.assert_array_equal(kept["arr_1"], sampled["arr_1"])


# stopped, and on other devices


ALL = ("--metrics", "pixel_distance,cnn_fd,bpd", "--bpd-images", "60")
ALL = (*ALL, "--reference-split", "test", "--split", "test", *DRAWN)


@pytest.fixture(scope="module")
def classifier(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "classifier.npz"
    train_split, test_split = (
        data.load("digits", split, batch_size=128, train=split == "train")
        for split in ("train", "test")
    )
    train_feature_classifier(path, train_split, test_split, seed=0, steps=60)
    return path


class Killed(BaseException):
    """Nothing may catch it, as nothing can catch a kill."""


@pytest.mark.slow
def test_an_evaluation_killed_in_every_stage_gives_the_same_numbers(
    run, classifier, tmp_path, score, monkeypatch
):
    common = ("--workdir", run, "--feature-classifier", classifier, *ALL)
    score(*common, "--out", tmp_path / "whole")
    add, starts, left = ResumableNpz.add, 0, 0

    def dying(self, arrays):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        add(self, arrays)

    monkeypatch.setattr(ResumableNpz, "add", dying)
    finished = False
    while not finished:
        starts, left = starts + 1, 3
        try:
            score(*common, "--out", tmp_path / "killed")
            finished = True
        except Killed:
            assert not (tmp_path / "killed" / "scores.json").exists()
    assert starts == 4  # of 100, 179 and 60 images, 32 at a time
    whole, killed = (evaluations_of(tmp_path / name)[0] for name in ("whole", "killed"))
    assert whole["scores"].keys() == killed["scores"].keys()
    for name, value in whole["scores"].items():  # short batches are other programs
        np.testing.assert_allclose(value, killed["scores"][name], rtol=1e-6)
    left_over = [path for path in (tmp_path / "killed").iterdir() if path.is_dir()]
    assert left_over == []


@pytest.mark.slow
def test_one_device_gives_the_numbers_of_eight(run, classifier, tmp_path, score):
    common = ("--feature-classifier", str(classifier), *ALL)
    Job(
        run, *common, "--out", str(tmp_path / "1"), program="evaluate", devices=1
    ).finish()
    score("--workdir", run, *common, "--out", tmp_path / "8")
    one, eight = (evaluations_of(tmp_path / name)[0] for name in "18")
    assert one["hardware"]["devices"] == 1 and eight["hardware"]["devices"] == 8
    for name, value in one["scores"].items():
        np.testing.assert_allclose(value, eight["scores"][name], rtol=1e-6)


def test_two_folders_are_scored_without_a_run(tmp_path, score, capsys):
    a, b = digits("test"), digits("train")[:200]
    write_pngs(tmp_path / "a", a)
    write_pngs(tmp_path / "b", b)
    folders = ("--images", tmp_path / "a", "--reference", tmp_path / "b")
    score(*folders, "--metrics", "pixel_distance", "--out", tmp_path / "out")
    distance = metrics.frechet_distance(
        metrics.moments(pixels(a)), metrics.moments(pixels(b))
    )
    (found,) = evaluations_of(tmp_path / "out")
    np.testing.assert_allclose(found["scores"]["pixel_distance"], distance, rtol=1e-6)
    assert found["samples"]["by"] == str(tmp_path / "a")
    assert len(found["reference"]["sha256"]["pixels"]) == 64
    printed = capsys.readouterr().out
    before = {path.name for path in tmp_path.iterdir()}
    score(*folders, "--metrics", "pixel_distance")  # writes nothing
    assert {path.name for path in tmp_path.iterdir()} == before
    value = f"{distance:.6g}"
    assert value in printed and value in capsys.readouterr().out


FEATURES = 6


@pytest.fixture
def fake_inception(monkeypatch):
    """A few numbers of each image in the place of Inception's features."""

    def apply(params, images):
        x = images.reshape(len(images), -1)[:, : 2 * FEATURES].astype("float32") / 255
        pool, spatial = x[:, :FEATURES], x[:, FEATURES:]
        return {"pool": pool, "spatial": spatial, "logits": pool}

    found = extractors.FeatureExtractor("inception", "0" * 64, {}, apply)
    monkeypatch.setattr(extractors, "inception", lambda *args, **options: found)


def noise(n, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 4, 4, 3)).astype(np.uint8)


def no_nan(path):
    """The evaluations of a scores.json, read as a strict reader does."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (path / "scores.json").read_text()
    return json.loads(text, parse_constant=refuse)["evaluations"]


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_what_can_be_computed_of_three_images_is_kept(
    tmp_path, score, fake_inception, capsys
):
    """FID and KID can, precision needs four; the program says so, with status 1."""
    for name, n in (("few", 3), ("many", 20)):
        np.savez(tmp_path / f"{name}.npz", noise(n, 0))
    flags = ("--images", tmp_path / "few.npz", "--reference", tmp_path / "many.npz")
    with pytest.raises(SystemExit) as info:
        cli.run_program(lambda: score(*flags, "--out", tmp_path / "out"))
    printed = capsys.readouterr()
    (found,) = no_nan(tmp_path / "out")
    assert info.value.code == 1 and {"fid_n3", "kid"} == found["scores"].keys()
    sentence = "n must be >= 4 for precision_recall, got 3."
    assert found["failures"] == {"precision_recall": sentence}
    assert f"error: precision_recall is missing: {sentence}\n" in printed.err
    assert "fid_n3" in printed.out and sentence in printed.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"scores.json"}


def test_too_few_images_for_every_metric_are_refused_before_anything(
    tmp_path, refused, fake_inception
):
    np.savez(tmp_path / "few.npz", noise(1, 0))
    flags = ("--images", tmp_path / "few.npz", "--reference", tmp_path / "few.npz")
    sentence = refused(*flags, "--out", tmp_path / "out")
    assert sentence == "--n must be >= 2 for fid, got 1."
    assert not (tmp_path / "out").exists()


OWN_METRICS = """
def fails(samples, reference):
    raise ValueError("nothing can be said of these.")

def is_nan(samples, reference):
    return float("nan")
"""


def test_a_metric_that_fails_or_is_not_finite_keeps_the_others(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "failing_metrics.py").write_text(OWN_METRICS)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["failing_metrics:fails", "pixel_distance", "failing_metrics:is_nan"]
    images: Any = dict(reference=digits("train")[:80], out=tmp_path / "out")
    scores = jd.evaluate(digits("test")[:80], metrics=names, **images)
    (found,) = no_nan(tmp_path / "out")
    assert found["scores"].keys() == {"pixel_distance", names[2]}
    assert found["scores"][names[2]] is None
    sentence = "metrics must be a Metric or a function (samples, reference) -> float, "
    sentence += f"got {names[0]!r}: nothing can be said of these."
    assert (
        scores.failures
        == found["failures"]
        == {
            names[0]: sentence,
            names[2]: f"{names[2]} must be finite, got nan.",
        }
    )
    assert all(reason in str(scores) for reason in scores.failures.values())
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        jd.evaluate(digits("test")[:80], metrics=names[0], **images)


def test_old_scores_with_nan_are_read_and_become_json(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"evaluations": [{"scores": {"fid": NaN, "kid": 0.5}}]}')
    assert results.read_records(path)[0]["scores"] == {"fid": None, "kid": 0.5}
    results.append_record(path, {"scores": {"fid": float("inf")}})
    assert [r["scores"]["fid"] for r in no_nan(tmp_path)] == [None, "inf"]


def test_few_samples_have_a_fid_that_says_how_many(tmp_path, score, fake_inception):
    for n in (9_999, 10_000):
        np.savez(tmp_path / f"{n}.npz", noise(n, 0))
        arguments = ("--images", tmp_path / f"{n}.npz", "--metrics", "fid,sfid")
        out = ("--out", tmp_path / f"{n}")
        score(*arguments, "--reference", tmp_path / f"{n}.npz", *out)
    few, many = (evaluations_of(tmp_path / str(n))[0]["scores"] for n in (9999, 10000))
    assert {"fid_n9999", "sfid_n9999"} <= few.keys() and "fid" not in few
    assert {"fid", "sfid"} <= many.keys() and "fid_n10000" not in many


def test_moments_that_were_saved_stand_for_their_images(
    tmp_path, score, fake_inception
):
    np.savez(tmp_path / "a.npz", noise(50, 0))
    np.savez(tmp_path / "b.npz", noise(60, 1))
    common = ("--images", tmp_path / "a.npz", "--metrics", "fid,sfid,inception_score")
    save = ("--reference", tmp_path / "b.npz", "--save-moments", tmp_path / "m.npz")
    score(*common, *save, "--out", tmp_path / "images")
    score(*common, "--reference", tmp_path / "m.npz", "--out", tmp_path / "moments")
    images, moments = (evaluations_of(tmp_path / n)[0] for n in ("images", "moments"))
    of_moments = moments["scores"]
    assert of_moments.keys() == {"fid_n50", "sfid_n50", "inception_score"}
    for name, value in of_moments.items():
        np.testing.assert_allclose(value, images["scores"][name], rtol=1e-12)
    digests = [e["reference"]["sha256"] for e in (images, moments)]
    assert digests[0] == digests[1]


def test_a_reference_batch_has_moments_and_images(tmp_path, score, fake_inception):
    """guided-diffusion's: the moments are of more images than are in the file."""
    np.savez(tmp_path / "a.npz", noise(50, 0))
    mu, sigma = np.full(FEATURES, 0.5), np.eye(FEATURES) / 12
    np.savez(tmp_path / "b.npz", arr_0=noise(40, 1), mu=mu, sigma=sigma)
    common = ("--images", tmp_path / "a.npz", "--reference", tmp_path / "b.npz")
    score(*common, "--metrics", "fid,precision_recall", "--out", tmp_path / "out")
    (found,) = evaluations_of(tmp_path / "out")
    assert found["scores"].keys() == {"fid_n50", "precision", "recall"} | (
        {k for k in found["scores"] if k.endswith("real_vs_real")}
    )
    pool = noise(50, 0).reshape(50, -1)[:, :FEATURES] / np.float64(255)
    told = metrics.Moments(10**6, mu, sigma)
    expected = metrics.frechet_distance(metrics.moments(pool), told)
    np.testing.assert_allclose(found["scores"]["fid_n50"], expected, rtol=1e-6)


def test_what_cannot_be_scored_is_refused_in_one_sentence(tmp_path, refused):
    good = tmp_path / "good.npz"
    np.savez(good, noise(20, 0))
    mixed = write_pngs(tmp_path / "mixed", noise(2, 0))
    Image.fromarray(noise(1, 0)[0].repeat(2, axis=0)).save(mixed / "9.png")
    broken = write_pngs(tmp_path / "broken", noise(3, 0))
    (broken / "00001.png").write_bytes((broken / "00001.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "large.npz", noise(20, 0).repeat(2, axis=1).repeat(2, axis=2))
    only = ("--metrics", "pixel_distance")
    for images, reference, words in (
        (tmp_path / "empty", good, "must hold images"),
        (tmp_path / "absent", good, "absent"),
        (mixed, good, "must be of one size"),
        (broken, good, "00001.png must be a whole image"),
        (good, tmp_path / "large.npz", "must be of one shape"),
        (good, tmp_path / "empty", "must hold images"),
    ):
        assert words in refused("--images", images, "--reference", reference, *only)
    wrong = ("--images", good, "--reference", tmp_path / "wrong.npz")
    assert "wrong.npz" in refused(*wrong, "--metrics", "fid")
    assert "is for Inception's features" in refused(*wrong, *only)
    assert "at most 20" in refused(
        "--images", good, "--reference", good, *only, "--n=21"
    )


def test_weights_of_another_hash_are_refused(tmp_path, refused):
    np.savez(tmp_path / "a.npz", noise(20, 0))
    file = tmp_path / "weights.pth"
    file.write_bytes(b"not what it should be")
    both = ("--images", tmp_path / "a.npz", "--reference", tmp_path / "a.npz")
    sentence = refused(*both, "--metrics", "fid", "--inception", file)
    assert inception_weights.SHA256 in sentence
    assert hashlib.sha256(file.read_bytes()).hexdigest() in sentence


def test_a_classifier_needs_labels(run, tmp_path, refused):
    np.savez(tmp_path / "plain.npz", digits("all"))
    command = ("--workdir", run, "--data", f"npz:{tmp_path / 'plain.npz'}")
    out = ("--out", tmp_path / "out", "--train-classifier")
    assert "labels" in refused(*command, *out)
    assert not (tmp_path / "out").exists()


def test_arguments_that_fit_nothing_are_refused(run, tmp_path, refused):
    for arguments, words in (
        ((), "--workdir must be given, or both --images and --reference"),
        (("--images", tmp_path), "--workdir must be given, or both"),
        (("--workdir", run, "--metrics", "fidd"), "got 'fidd'"),
        (("--workdir", run, "--metrics", "accuracy"), "got 'accuracy'"),
        (("--workdir", run, "--n", 0), "--n must be an integer >= 1, got 0."),
        (("--workdir", run, "--eta", 2), "--eta must be in [0, 1]"),
        (("--workdir", run, "--eta", 1, "--sampler", "heun"), "got 'heun'"),
        (("--workdir", run, "--quantize", "up"), "got 'up'"),
        (("--workdir", run, "--compare", "me"), "--compare: invalid choice: 'me'"),
        (("--workdir", run, "--compare", "paper"), "names what it reproduces"),
        (("--workdir", run, "--save-moments", "m.npz"), "Inception's features"),
        (("--workdir", run, "--steps", 3, "--metrics", "cnn_is"), "--train-"),
        (("--workdir", run, "--steps", 11), "got 11"),
        (("--workdir", run, "--steps", 3, "--metrics", "bpd"), "--steps is for metri"),
        (("--workdir", run, "--images", "a.npz", "--no-clip"), "--no-clip needs sampl"),
        (("--workdir", run, "--metrics", "bpd", "--bpd-steps", 11), "--bpd-steps must"),
        (("--workdir", run, "--classifier", "a.npz"), "--feature-classifier takes"),
        (("--workdir", run, "--classifier", run), "must be a classifier's run"),
        (("--workdir", run, "--guidance", 2), "--guidance needs a run"),
        (("--workdir", run, "--metrics", "bpd", "--bpd-images", 180), "at most 179"),
    ):
        out = ("--out", tmp_path / "out")
        assert words in refused(*arguments, *out)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_evaluation_resumes_unless_parts_or_records_are_others(
    run, tmp_path, refused, score, monkeypatch
):
    few = ("--workdir", run, "--out", tmp_path, "--metrics", "bpd")
    few = (*few, "--bpd-images", "60", "--batch-size", "32")

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(results, "append_record", killed)
        with pytest.raises(Killed):
            score(*few)
    assert "seed 0 -> 1" in refused(*few, "--seed", "1")
    (tmp_path / "scores.json").write_text("[]")
    assert "must be an object with a list `evaluations`" in refused(*few)
    (tmp_path / "scores.json").unlink()
    with monkeypatch.context() as patch:  # all parts are there: none is added
        patch.setattr(ResumableNpz, "add", killed)
        score(*few)
    assert evaluations_of(tmp_path)[0]["images"]["bits_per_dim"] == 60
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
