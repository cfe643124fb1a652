"""Grids, GIFs and curves, read back from their files."""

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import plotting

GRAY = 128


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_grid_lays_out_row_by_row_with_gaps_around():
    images = np.array([[[1, 2]], [[3, 4]], [[5, 6]]], np.uint8)[..., None]  # 1 x 2 each
    g = GRAY
    expected = [
        [g, g, g, g, g, g, g],
        [g, 1, 2, g, 3, 4, g],
        [g, g, g, g, g, g, g],
        [g, 5, 6, g, g, g, g],
        [g, g, g, g, g, g, g],
    ]
    np.testing.assert_array_equal(plotting.grid(images, 2)[..., 0], expected)


def test_grid_without_gaps_holds_the_images_only():
    images = noise(4, 2, 3, 3)
    top, bottom = plotting.grid(images, 2, gap=0).reshape(2, 2, 6, 3)
    np.testing.assert_array_equal(top, np.concatenate(images[:2], axis=1))
    np.testing.assert_array_equal(bottom, np.concatenate(images[2:], axis=1))


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (7, 3, 3)]
)
def test_grid_is_as_square_as_can_be_unless_told(n, rows, columns):
    sheet = plotting.grid(noise(n, 2, 4, 1), gap=0)
    assert sheet.shape == (rows * 2, columns * 4, 1)


def test_grid_takes_a_wider_gap():
    sheet = plotting.grid(noise(2, 3, 3, 3), 2, gap=2)
    assert sheet.shape == (2 + 3 + 2, 2 + 3 + 2 + 3 + 2, 3)
    assert np.all(sheet[:2] == GRAY) and np.all(sheet[:, 5:7] == GRAY)


def test_png_keeps_every_pixel(tmp_path):
    image = noise(4, 6, 3)
    plotting.save_png(tmp_path / "new" / "image.png", image)
    np.testing.assert_array_equal(read(tmp_path / "new" / "image.png"), image)


def test_png_of_one_channel_is_gray(tmp_path):
    image = noise(4, 6, 1)
    plotting.save_png(tmp_path / "image.png", image)
    np.testing.assert_array_equal(read(tmp_path / "image.png"), image[..., 0])


def test_png_is_enlarged_by_a_whole_number_to_the_size_asked_for(tmp_path):
    image = noise(2, 4, 3)
    plotting.save_png(tmp_path / "image.png", image, min_size=10)
    pixels = read(tmp_path / "image.png")
    assert pixels.shape == (6, 12, 3)
    for i in range(3):
        for j in range(3):
            np.testing.assert_array_equal(pixels[i::3, j::3], image)


def test_png_that_is_large_enough_is_not_enlarged(tmp_path):
    plotting.save_png(tmp_path / "image.png", noise(2, 4, 3), min_size=4)
    assert read(tmp_path / "image.png").shape == (2, 4, 3)


def frames_of(path):
    """Pixels, and milliseconds shown, of each frame, and how often they repeat."""
    with Image.open(path) as gif:
        pixels, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            pixels.append(np.asarray(gif.convert("RGB")))
            durations.append(gif.info["duration"])
        return pixels, durations, gif.info["loop"]


def test_gif_shows_every_frame_rests_on_the_last_and_never_ends(tmp_path):
    frames = [np.full((4, 4, 3), value, np.uint8) for value in (0, 100, 200)]
    plotting.save_gif(tmp_path / "new" / "images.gif", frames, min_size=8)
    pixels, durations, loop = frames_of(tmp_path / "new" / "images.gif")
    np.testing.assert_array_equal(
        pixels, np.repeat(frames, 4, axis=0).reshape(3, 8, 8, 3)
    )
    assert durations == [120, 120, 1500]
    assert loop == 0  # for ever


def test_gif_of_one_channel_is_gray(tmp_path):
    frames = list(noise(3, 4, 4, 1))
    plotting.save_gif(tmp_path / "images.gif", frames, min_size=4)
    pixels, _, _ = frames_of(tmp_path / "images.gif")
    np.testing.assert_array_equal(pixels, np.repeat(frames, 3, axis=-1))


def test_gif_may_have_a_single_frame(tmp_path):
    plotting.save_gif(tmp_path / "image.gif", [noise(4, 4, 3)], min_size=4)
    assert read(tmp_path / "image.gif").shape[:2] == (4, 4)


def curve(path, save, *what, width=840):
    save(path, *what)
    pixels = read(path)
    assert pixels.shape == (480, width, 4)
    return pixels


def test_loss_curve_draws_the_loss_and_its_quartiles_and_leaves_gaps(tmp_path):
    rows = [{"step": i, "loss": 0.8 - 0.1 * i, "loss_q3": 0.2} for i in range(5)]
    other_loss = [rows[0], {**rows[1], "loss": 0.5}, *rows[2:]]
    gap = [rows[0], {**rows[1], "loss": None}, *rows[2:]]  # it was not finite
    no_quartile = [*rows[:4], {"step": 4, "loss": 0.4}]
    original, *others = (
        curve(tmp_path / "new" / "loss.png", plotting.save_loss_curve, r)
        for r in (rows, other_loss, gap, no_quartile)
    )
    assert all(np.any(other != original) for other in others)


def test_vlb_curve_draws_every_term(tmp_path):
    vlb, mse = np.array([1.0, 0.2, 0.1]), np.array([0.3, 0.3, 0.3])
    original, *others = (
        curve(tmp_path / "new" / "vlb.png", plotting.save_vlb_curve, terms)
        for terms in (
            {"vlb": vlb, "mse": mse},
            {"vlb": vlb[[0, 2, 1]], "mse": mse},
            {"vlb": vlb, "mse": 2 * mse},
        )
    )
    assert all(np.any(other != original) for other in others)


def rate_distortion(tmp_path, rate, distortion):
    save = plotting.save_rate_distortion
    return curve(tmp_path / "new" / "rd.png", save, rate, distortion, width=1440)


@pytest.mark.slow
def test_rate_and_distortion_are_drawn_against_each_other_and_the_steps(tmp_path):
    rate, distortion = np.array([1.8, 0.9, 0.3, 0.0]), np.array([1.0, 8.0, 30.0, 70.0])
    original = rate_distortion(tmp_path, rate, distortion)
    other_rate = rate_distortion(tmp_path, rate * [1, 2, 1, 1], distortion)
    other_distortion = rate_distortion(tmp_path, rate, distortion * [1, 2, 1, 1])

    def changed(other):  # left to right: both, distortion by steps, rate by steps
        return [bool(np.any(o)) for o in np.split(other != original, 3, axis=1)]

    assert changed(other_rate) == [True, False, True]
    assert changed(other_distortion) == [True, True, False]


def test_steps_are_counted_from_noise_where_nothing_is_known_yet(tmp_path):
    """A rate that is paid in the last step rises at the right end."""
    last = rate_distortion(tmp_path, np.eye(50)[0], np.zeros(50))
    by_steps = last[:240, 960:, :3].astype(int)  # the upper half of the third
    line = np.flatnonzero(np.any(by_steps[..., 2] - by_steps[..., 0] > 60, axis=0))
    assert line.size and line.min() > 360


@pytest.mark.parametrize(
    "save",
    [
        lambda path: plotting.save_png(path, noise(4, 6, 3)),
        lambda path: plotting.save_gif(path, [noise(4, 6, 3)] * 2),
        lambda path: plotting.save_loss_curve(path, [{"step": 1, "loss": 1.0}] * 2),
        lambda path: plotting.save_vlb_curve(path, {"vlb": np.ones(3)}),
        lambda path: plotting.save_rate_distortion(path, np.ones(3), np.ones(3)),
    ],
    ids=["png", "gif", "loss", "vlb", "rate"],
)
def test_a_kill_leaves_no_half_of_a_picture(save, tmp_path, monkeypatch):
    """It gets its name when it is whole, and an old one stays until then."""
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os.replace", kill)
        save(path)
    assert path.read_bytes() == b"old"
    save(path)
    assert read(path).size > 0 and [p.name for p in tmp_path.iterdir()] == ["a.png"]
