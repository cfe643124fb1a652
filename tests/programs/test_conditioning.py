"""Vectors and tokens from data to samples: Python, command line, evaluation, export."""

import json

import numpy as np
import pytest
from support.programs import failure, run_main, sample
from support.tiny_runs import (
    KNOWN,
    SIZE,
    UNET,
    make_run,
    tiny_config,
    write_images,
)

import jax_diffusion as jd
from jax_diffusion import data, export, pipeline
from jax_diffusion.evaluation import during_training, image_sets
from jax_diffusion.training import setup

MODEL = UNET | dict(cond_dim=3, token_dim=5, attention_resolutions=(SIZE,))
RNG = np.random.default_rng(0)
COND, TOKENS = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 2, 5))
MASK = np.array([[True, True], [True, False], [False, True], [True, True]])
TOLD = dict(cond=COND, tokens=TOKENS, tokens_mask=MASK)
OFTEN = dict(steps=2, clip=False)


@pytest.fixture(scope="module")
def workdir(folder):
    """The workdir of a run whose network takes a vector and tokens."""
    write_images(folder / "images.npz")
    with np.load(folder / "images.npz") as arrays:
        images, n = arrays["arr_0"], len(arrays["arr_0"])
    rng = np.random.default_rng(3)
    beside = dict(cond=rng.normal(size=(n, 3)), tokens=rng.normal(size=(n, 2, 5)))
    np.savez(folder / "images.npz", images=images, **beside)
    np.savez(folder / "told.npz", **TOLD)
    return make_run(folder / "told", model=MODEL, label_dropout=0.1)


@pytest.fixture(scope="module")
def run(workdir):
    return jd.load_run(workdir)


@pytest.fixture(scope="module")
def plain(workdir, folder):
    return jd.load_run(make_run(folder / "plain"))


def test_images_get_the_rows_of_cond_in_turn_and_by_default_one_each(run):
    images = jd.sample_images(run, cond=TOLD, **OFTEN)
    assert images.shape == (4, SIZE, SIZE, 3)
    more = jd.sample_images(run, 6, cond=TOLD, **OFTEN)
    np.testing.assert_array_equal(more[:4], images)
    swapped = {name: a[[1, 0, 2, 3]] for name, a in TOLD.items()}
    other = jd.sample_images(run, cond=swapped, **OFTEN)
    np.testing.assert_array_equal(other[2:], images[2:])
    assert np.mean(other[:2] != images[:2]) > 0.3


@pytest.mark.slow
def test_guidance_1_is_the_conditional_image_and_0_the_unconditional_one(run):
    none = dict(cond=0 * COND, tokens=TOKENS, tokens_mask=MASK & False)
    for scale, told in ((1, TOLD), (0, none)):
        guided = jd.sample_images(run, cond=TOLD, guidance=scale, **OFTEN)
        alone = jd.sample_images(run, cond=told, **OFTEN)
        assert np.abs(guided.astype(int) - alone).max() <= 1


@pytest.mark.slow
def test_tasks_take_conditioning_of_their_images_or_cond(run):
    how = dict(task="edit", level=0.5, **OFTEN)
    own = jd.sample_images(run, 3, **how)
    test = pipeline.open_split(run.config, "test").conditioning
    np.testing.assert_array_equal(jd.sample_images(run, 3, cond=test, **how), own)
    images = np.full((3, SIZE, SIZE, 3), 90, np.uint8)
    edited = jd.sample_images(run, 3, images=images, cond=TOLD, **how)
    assert edited.shape == images.shape
    with pytest.raises(ValueError, match="cond must be given for a network that takes"):
        jd.sample_images(run, 3, images=images, **how)


REFUSED = [
    ({}, "cond must be given for a network that takes cond and tokens, got None."),
    (dict(cond=TOLD | dict(cond=COND[:, :2])), r"cond must be \[n, 3\] for a network"),
    (dict(cond=COND), r"tokens must be \[n, k, 5\] for a network with token_dim = 5"),
    (dict(cond=TOLD | dict(words=COND)), "cond's names must be one of .*got 'words'"),
    (dict(cond={}), "cond must hold cond or tokens, got no array."),
    (dict(cond=3), "cond must be arrays by name, an array .* or a .npz file, got 3"),
    (dict(cond="none.npz"), "cond must be a .npz file .*got 'none.npz', which is no"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED)
def test_conditioning_that_does_not_fit_the_network_is_refused(run, given, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        jd.sample_images(run, 2, **given, **OFTEN)


def test_a_network_without_conditioning_refuses_cond(plain):
    told = "cond must hold what the network takes .*got cond for one that takes neither"
    with pytest.raises(ValueError, match=told):
        jd.sample_images(plain, 2, cond=COND, **OFTEN)


@pytest.mark.slow
def test_evaluate_draws_and_scores_with_the_conditioning_of_the_data(run, folder):
    metrics = dict(metrics=["pixel_distance", "bpd"], n=6, bpd_images=4)
    with pytest.warns(UserWarning, match="needs more than 192 images"):
        found = jd.evaluate(run, **metrics, steps=2, reference_split="all")
    record = found.record
    assert {score.metric for score in found} >= {"pixel_distance", "bits_per_dim"}
    for part in (record["samples"], record["bpd"]):
        assert part["conditioning"]["tokens"]["shape"] == [2, 5]


@pytest.mark.parametrize("who", ["evaluate", "training", "preview", "upsampling"])
def test_labels_and_conditioning_are_of_the_same_images(who, tmp_path, monkeypatch):
    """The vector of every image is its label; both are bound in one order."""
    labels = np.random.default_rng(4).integers(0, KNOWN, 40)
    images = (
        np.zeros((40, SIZE, SIZE, 3), np.uint8)
        + np.uint8(labels * 50)[:, None, None, None]
    )
    cond = np.float32(labels[:, None] + [0, 10, 20])
    np.savez(path := tmp_path / "a.npz", images=images, labels=labels, cond=cond)
    low = dict(low_res=True) if who == "upsampling" else {}
    fields = dict(model=UNET | dict(num_classes=KNOWN, cond_dim=3) | low)
    fields |= dict(sample_every=1, sampling=dict(n=6))
    fields |= dict(low_res_size=4) if low else {}
    config = tiny_config(path, **fields)
    bound = []

    def binding(*args, **options):
        bound.append(pipeline.bind_sampler(*args, **options))
        return bound[-1]

    for module in (setup, during_training, image_sets):
        monkeypatch.setattr(module, "bind_sampler", binding)
    made = setup.make_setup(config)
    if who == "evaluate":
        of_run = (config, made.model, {}, made.objective, (SIZE, SIZE, 3))
        of_data = dict(source=None, split="train", batch_size=8)
        options = pipeline.SamplingOptions()
        image_sets.open_samples(jd.Run(*of_run), 9, None, options, 0, **of_data)
    if who == "training":
        parts = made.model, made.objective, made.batches, made.mesh
        some = dict(n=20, reference=10, bpd_images=0, steps=1)
        config = tiny_config(path, **fields, eval_every=1, evaluation=some)
        during_training.make_watch(config, tmp_path, {}, *parts)
    rows = bound[-1].rows
    assert len(rows["label"]) == dict(evaluate=9, training=20).get(
        who, len(rows["cond"])
    )
    np.testing.assert_array_equal(rows["label"], rows["cond"][:, 0])
    if low:
        shown = data.to_uint8(rows["low_res"][:, 0, 0, 0])
        np.testing.assert_allclose(shown, rows["label"] * 50, atol=1)


@pytest.mark.slow
def test_sample_takes_a_file_of_conditioning_and_records_its_digest(
    workdir, folder, monkeypatch, capsys
):
    out, told = folder / "drawn", str(folder / "told.npz")
    flags = ("--workdir", str(workdir), "--steps", "2", "--no-clip")
    run_main(monkeypatch, sample, *flags, "--out", str(out), "--cond", told)
    drawn = sorted(file.name for file in out.glob("0*.png"))
    assert drawn == [f"{i:05d}.png" for i in range(4)]
    record = json.loads((out / "record.json").read_text())
    assert record["conditioning"]["cond"]["shape"] == [3]
    assert len(record["conditioning"]["tokens"]["digest"]) == 64
    said = failure(monkeypatch, capsys, sample, *flags, "--out", str(folder / "x.npz"))
    assert "error: --cond must be given for a network that takes cond and tok" in said


@pytest.mark.slow
def test_an_exported_sampler_takes_conditioning_and_draws_the_same(run, folder):
    path = folder / "told.jaxexport"
    pipeline.export_sampler(path, run, pipeline.SamplingOptions(**OFTEN))
    draw = export.read(path)
    told = {
        name: a.astype(bool if a.dtype == bool else np.float32)
        for name, a in TOLD.items()
    }
    images = draw(0, range(4), **told)
    alone = jd.sample_images(run, cond=TOLD, **OFTEN)
    ours = np.floor((np.clip(images, -1, 1) + 1) * 127.5)
    assert np.abs(ours - alone).max() <= 1
    longer = {
        name: np.concatenate([a, a], 1) for name, a in told.items() if name != "cond"
    }
    longer["tokens_mask"][:, 2:] = False
    np.testing.assert_allclose(draw(0, range(4), **told | longer), images, atol=1e-4)
    with pytest.raises(ValueError, match="the sampler must be told cond, tokens, tok"):
        draw(0, range(4))
    with pytest.raises(ValueError, match=r"cond must be a float array \[4, 3\]"):
        draw(0, range(4), **told | dict(cond=COND[:2]))
    with pytest.raises(ValueError, match=r"tokens_mask must be a bool array \[4, k\]"):
        draw(0, range(4), **told | dict(tokens_mask=MASK * 0.3))
