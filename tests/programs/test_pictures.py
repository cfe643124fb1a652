"""Pictures that are no squares of one or three channels; masks; gray photographs."""

import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support import tiny_runs
from support.programs import train

import jax_diffusion as jd
from jax_diffusion import config as settings
from jax_diffusion import plotting
from jax_diffusion.evaluation import image_sets
from jax_diffusion.pipeline import masks

H, W = 4, 8


def png(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)
    return path


# Masks

LEFT = np.zeros((H, W), np.uint8)
LEFT[:, : W // 2] = 255


def rgba(color, alpha):
    return np.concatenate([np.broadcast_to(color, (H, W, 3)), alpha[..., None]], -1)


WHITE, GRAY = np.uint8([255, 255, 255]), LEFT[..., None].repeat(3, -1)
MASKS = {
    "gray": LEFT,
    "one bit": LEFT > 0,
    "16 bits": LEFT.astype(np.uint16) * 257,
    "colors": GRAY,
    "alpha hides what is white": rgba(WHITE, LEFT),
    "opaque": rgba(GRAY, np.full_like(LEFT, 255)),
    "gray with alpha": np.stack([np.full_like(LEFT, 255), LEFT], -1),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_knows_what_is_white_and_not_transparent(tmp_path, name):
    file = png(tmp_path / "mask.png", MASKS[name])
    found = masks.read_mask(file, (H, W, 3))
    np.testing.assert_array_equal(found[..., 0], LEFT > 0)
    assert found.dtype == np.float32 and found.shape == (H, W, 1)


@pytest.mark.parametrize("dtype", [bool, int, np.uint8, np.float32, np.float16])
@pytest.mark.parametrize("axes", [(), (None,)])
def test_a_mask_of_zeros_and_ones_knows_the_ones(dtype, axes):
    mask = (LEFT > 0).astype(dtype)[..., *axes]
    for given in (mask, jnp.asarray(mask)):
        found = masks.read_mask(given, (H, W, 3))
        np.testing.assert_array_equal(found[..., 0], LEFT > 0)


def test_a_mask_means_the_same_as_an_array_and_as_a_file(tmp_path):
    grays = np.arange(H * W).reshape(H, W).astype(np.uint8) * 8  # 0 to 248
    for mask in (grays, grays // 2 + 60, 255 - grays):
        found = masks.read_mask(png(tmp_path / "mask.png", mask), (H, W, 3))
        np.testing.assert_array_equal(masks.read_mask(mask, (H, W, 3)), found)
        np.testing.assert_array_equal(found[..., 0], mask > 127)


@pytest.mark.parametrize("value", [7.5, 0.5, -1, 2, 255, np.nan, np.inf, 1j])
def test_a_mask_of_other_numbers_is_refused(value):
    words = "^mask must be of bool, of 0 and 1, or a uint8 picture, got "
    with pytest.raises(ValueError, match=words):
        masks.read_mask(np.where(LEFT > 0, value, 0), (H, W, 3))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.full((H, W), 255, np.uint8), "all are known"),
        (np.zeros((H, W), np.uint8), "none is known"),
        (rgba(WHITE, 0 * LEFT), "none is known"),
        (LEFT.astype(np.uint16) * 2, "none is known"),  # 510 of 65535 is black
    ],
)
def test_a_mask_that_hides_nothing_or_all_is_refused(tmp_path, mask, words):
    file = png(tmp_path / "mask.png", mask)
    arrays = [mask > 0] if mask.dtype == np.uint8 and mask.ndim == 2 else []
    for given in (file, *arrays):
        with pytest.raises(ValueError, match=f"^mask must have known and .*{words}"):
            masks.read_mask(given, (H, W, 3))
    with pytest.raises(ValueError, match="none is known in top"):
        masks.read_mask("top", (1, W, 3))


# Sheets


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_of_other_numbers_stand_side_by_side(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (3, H, W, channels), np.uint8)
    sheet = plotting.grid(images, columns=3)
    assert sheet.shape == (H + 2, 3 * (channels * W + 1) + 1, 1)
    for i in range(3):
        for k in range(channels):
            left = 1 + i * (channels * W + 1) + k * W
            found = sheet[1 : H + 1, left : left + W, 0]
            np.testing.assert_array_equal(found, images[i, ..., k])
    plotting.save_png(tmp_path / "sheet.png", sheet)
    plotting.save_gif(tmp_path / "sheet.gif", [sheet])


# Runs of other shapes


@pytest.fixture(scope="module", params=[(4, 8, 2), (8, 4, 5)], ids=str)
def odd(request, tmp_path_factory):
    """A run of images that are not square and have 2 or 5 channels; and its images."""
    folder, shape = tmp_path_factory.mktemp("odd"), request.param
    images = np.random.default_rng(0).integers(0, 256, (200, *shape), np.uint8)
    np.savez(folder / "images.npz", images=images)
    network = dict(name="support.networks:Tiny")
    return tiny_runs.make_run(folder / "run", shape=shape, model=network), images


@pytest.mark.slow
def test_images_of_any_height_width_and_channels_are_drawn_edited_and_scored(odd):
    workdir, images = odd
    run = jd.load_run(workdir)
    shape = run.image_shape
    assert jd.sample_images(run, 3, steps=2).shape == (3, *shape)
    drawn = jd.sample_images(
        run,
        2,
        steps=2,
        task="inpaint",
        images=images[:2],
        mask="left",
        rounding="round",
    )
    known = np.s_[:, :, : shape[1] // 2]
    np.testing.assert_array_equal(drawn[known], images[:2][known])
    metrics = ["pixel_distance", "bpd"]
    results = jd.evaluate(
        run, n=170, bpd_images=4, metrics=metrics, bpd_steps=2, steps=2
    )
    assert all(np.isfinite(score.value) for score in results)
    same = jd.evaluate(images, reference=images, metrics=["pixel_distance"])
    np.testing.assert_allclose(same[0].value, 0, atol=1e-3)


@pytest.mark.slow
def test_images_of_any_height_width_and_channels_train(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (32, 4, 8, 4), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    config = settings.load_config(
        "configs/smoke.py",
        [
            "--config.schedule.num_steps=4",
            "--config.timesteps.history=1",
            "--config.total_steps=2",
            "--config.sample_every=2",
            "--config.sampling.n=4",
            "--config.sampling.steps=1",
        ],
    )
    path = str(tmp_path / "images.npz")
    config.data = dict(name="npz", path=path, batch_size=8, image_size=(4, 8))
    config.model = dict(name="support.networks:Tiny")
    train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "000002.png").exists()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "samples_mean_3" in json.loads(rows[-1])
    assert jd.load_run(tmp_path / "run").image_shape == (4, 8, 4)


# Pictures of a task, and of evaluations


@pytest.mark.slow
def test_gray_photographs_are_colorized_by_a_run_with_colors(tmp_path):
    run = jd.load_run(tiny_runs.make_run(tmp_path / "run", shape=(H, W, 3)))
    tiny_runs.write_images(tmp_path / "images.npz")
    gray = np.random.default_rng(0).integers(0, 256, (2, H, W), np.uint8)
    for i in range(2):
        png(tmp_path / "photos" / f"{i}.png", gray[i])
    how = dict(task="colorize", steps=2, split="all")
    drawn = jd.sample_images(run, 2, images=str(tmp_path / "photos"), **how)
    assert drawn.shape == (2, H, W, 3)
    same = jd.sample_images(run, 2, images=gray[..., None], **how)
    np.testing.assert_array_equal(drawn, same)
    with pytest.raises(ValueError, match="images must be "):
        jd.sample_images(run, 2, images=gray[:, :2, :, None], **how)


def test_a_reference_is_read_as_the_runs_own_pictures(tmp_path):
    pixels = rgba(np.uint8([200, 100, 0]), LEFT)
    png(tmp_path / "a.png", pixels)
    group = dict(name="folder", background="black", max_value=None)
    run = jd.pipeline.Run(
        ConfigDict({"data": group}), nn.Dense(1), None, None, (H, W, 3)
    )
    options = dict(batch_size=1)
    for like, below in ((run, 0), (None, 255)):
        found = image_sets.as_image_set(str(tmp_path), like=like, **options)
        image = next(iter(found.batches(0)))["image"][0]
        np.testing.assert_array_equal(image[:, W // 2 :], below)
        np.testing.assert_array_equal(image[:, : W // 2], pixels[:, : W // 2, :3])
        assert found.about.get("background") == (like and "black")
