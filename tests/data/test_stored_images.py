"""Images of anybody as they are, `open_images`, against files that the tests write."""

import contextlib
import hashlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data

PIXELS = np.random.default_rng(0).integers(0, 256, (70, 4, 5, 3), np.uint8)


def write(folder, images, names=None):
    """Writes images [n h w c] as lossless files."""
    names = names or [f"{i:04d}.png" for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / name)
    return folder


def everything(path):
    found = data.open_images(path)
    return found.read(np.arange(len(found)))


def test_a_folder_holds_its_images_as_they_are_in_order_of_paths(tmp_path):
    names = ["a/2.png", "a/b/1.PNG", "a-b/0.png", "b.png"]
    write(tmp_path, PIXELS[:4], names)
    write(tmp_path, PIXELS[4:6], [".hidden.png", ".cache/0.png"])
    (tmp_path / "notes.txt").write_text("no image")
    found = data.open_images(tmp_path)
    assert len(found) == 4 and found.image_shape == (4, 5, 3)
    np.testing.assert_array_equal(found.read(np.arange(4)), PIXELS[:4])


def test_rows_come_as_they_are_asked_for_whichever_thread_decodes_them(tmp_path):
    found = data.open_images(write(tmp_path, PIXELS))
    rows = np.random.default_rng(1).integers(0, 70, 200)  # some of them twice
    np.testing.assert_array_equal(found.read(rows), PIXELS[rows])
    assert found.read(np.arange(0)).shape == (0, 4, 5, 3)


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "folder"])
def test_batches_go_on_from_any_image(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        write(path, PIXELS[:10])
    elif name == "x.npz":
        np.savez(path, arr_0=PIXELS[:10], arr_1=np.arange(10))
    else:
        np.save(path, PIXELS[:10])
    found = data.open_images(path)
    whole = [batch["image"] for batch in found.batches(4)]
    assert [len(images) for images in whole] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(whole), PIXELS[:10])
    later = [batch["image"] for batch in found.batches(3, 5)]
    np.testing.assert_array_equal(np.concatenate(later), PIXELS[5:10])
    assert [*found.batches(4, 10)] == []


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_an_archive_may_hold_gray_images_without_channels(tmp_path, key):
    np.savez(tmp_path / "x.npz", **{key: PIXELS[..., 0]}, other=np.zeros(3))
    np.testing.assert_array_equal(everything(tmp_path / "x.npz"), PIXELS[..., :1])


def test_an_array_in_a_file_is_mapped_and_not_read(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    assert isinstance(data.open_images(tmp_path / "x.npy").stored, np.memmap)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_gray_files_have_one_channel(tmp_path, mode):
    gray = PIXELS[0, ..., 0] // 128 * 255 if mode == "1" else PIXELS[0, ..., 0]
    if mode == "I;16":  # whose low byte is dropped
        image = Image.fromarray(gray.astype(np.uint16) * 256 + 200)
    else:
        image = Image.fromarray(gray).convert(mode)
    image.save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as stored:
        assert stored.mode == mode
    warns = pytest.warns(UserWarning) if mode == "I;16" else contextlib.nullcontext()
    with warns:
        np.testing.assert_array_equal(everything(tmp_path), gray[None, ..., None])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_all_other_files_have_three_channels(tmp_path, mode):
    colors = np.array([[[200, 30, 60], [10, 220, 90]]], np.uint8)
    image = Image.fromarray(colors).convert(mode)
    # Of a palette with such shades, Pillow warns unless it becomes RGBA first.
    shades = {"transparency": bytes([0, 128])} if mode == "P" else {}
    image.save(tmp_path / "x.png", **shades)
    with Image.open(tmp_path / "x.png") as stored:
        expected = np.asarray(stored.convert("RGBA"))[..., :3]
    assert np.abs(expected.astype(int) - colors).max() < 60  # a palette is coarse
    np.testing.assert_array_equal(everything(tmp_path), expected[None])


def test_square_files_are_read_as_the_data_set_of_that_size_reads_them(tmp_path):
    square = np.random.default_rng(2).integers(0, 256, (6, 8, 8, 3), np.uint8)
    names = ["0.png", "1.jpg", "2.jpeg", "3.gif", "4.png", "5.JPG"]
    write(tmp_path, square, names)
    loaded = data.load("folder", "all", path=tmp_path, image_size=8, batch_size=1)
    np.testing.assert_array_equal(everything(tmp_path), loaded.images)


def test_a_photograph_stands_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    flat = np.zeros((8, 16, 3), np.uint8)
    flat[:, :8] = 255  # the left half, which comes to be the upper one
    Image.fromarray(flat).save(tmp_path / "x.jpg", exif=exif)
    image = everything(tmp_path)[0]
    assert image.shape == (16, 8, 3)
    assert image[:8].min() > 250 and image[8:].max() < 5


def test_gray_among_colors_is_repeated_whatever_comes_first(tmp_path):
    gray = PIXELS[1, ..., :1]
    write(tmp_path / "color", [PIXELS[0], gray])
    expected = [PIXELS[0], np.repeat(gray, 3, axis=-1)]
    np.testing.assert_array_equal(everything(tmp_path / "color"), expected)
    write(tmp_path / "gray", [gray, PIXELS[0]])
    np.testing.assert_array_equal(everything(tmp_path / "gray"), expected[::-1])


def test_a_file_is_decoded_when_it_is_asked_for_and_no_sooner(tmp_path):
    write(tmp_path, PIXELS[:10])
    (tmp_path / "0007.png").write_bytes(b"no image")
    found = data.open_images(tmp_path)
    first = next(found.batches(7))["image"]
    np.testing.assert_array_equal(first, PIXELS[:7])
    with pytest.raises(ValueError, match=r"0007\.png must be a whole image, got "):
        found.read(np.array([7]))


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=PIXELS)
    expected = hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()
    assert data.open_images(tmp_path / "x.npz").sha256 == expected


def test_the_digest_of_a_folder_knows_names_and_contents_and_no_more(tmp_path):
    def digest(name):
        return data.open_images(tmp_path / name).sha256

    write(tmp_path / "one", PIXELS)
    before = digest("one")
    assert re.fullmatch("[0-9a-f]{64}", before)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    (tmp_path / "copy" / ".hidden.png").write_bytes(b"")
    assert digest("copy") == before
    (tmp_path / "copy" / "0069.png").rename(tmp_path / "copy" / "0070.png")
    assert digest("copy") != before
    swapped = PIXELS.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert digest(write(tmp_path / "swapped", swapped).name) != before
    assert digest(write(tmp_path / "fewer", PIXELS[:-1]).name) != before


def test_images_beside_moments_in_a_file_are_read_and_moments_alone_refused(tmp_path):
    moments = dict(mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "moments.npz", **moments)
    np.savez(tmp_path / "both.npz", **moments, arr_0=PIXELS)
    np.testing.assert_array_equal(everything(tmp_path / "both.npz"), PIXELS)
    with pytest.raises(ValueError, match=r"images .* or arr_0 .*, got .*mu.*sigma"):
        data.open_images(tmp_path / "moments.npz")


def test_sizes_that_differ_are_named(tmp_path):
    write(tmp_path, [PIXELS[0], PIXELS[1, :3]], ["a.png", "b.png"])
    found = data.open_images(tmp_path)
    rule = r"images must be of one size, got 4 x 5 \(.*a\.png\) and 3 x 5 \(.*b\.png\)"
    with pytest.raises(ValueError, match=rule):
        found.read(np.arange(2))


@pytest.mark.parametrize("name", ["cut.png", "cut.npz", "cut.npy"])
def test_a_file_that_was_cut_off_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, arr_0=PIXELS)
    elif name.endswith("npy"):
        np.save(path, PIXELS)
    else:
        large = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(large).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    place = tmp_path if name.endswith("png") else path
    by_file = rf"{re.escape(name)} must be .*, got |^images must .*, got .*{name}'"
    with pytest.raises(ValueError, match=by_file):
        data.open_images(place)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": PIXELS / 255},
            r"must be uint8 .* got float64 \(70, 4, 5, 3\); .*max_value",
        ),
        ({"arr_0": PIXELS[0, 0]}, r"must be uint8 .* got uint8 \(5, 3\)\.$"),
        (
            {"arr_0": PIXELS.transpose(0, 3, 1, 2)},
            r"\[n h w c\], got uint8 \(70, 3, 4, 5\), .*transpose",
        ),
        ({"arr_0": PIXELS[:0]}, r"n >= 1, got uint8 \(0, 4, 5, 3\)\.$"),
        ({"pixels": PIXELS}, r"images .* or arr_0 .*, got \['pixels'\] in .*x\.npz'"),
        ({"arr_0": np.array([{}])}, "of plain arrays, got "),
    ],
    ids=["floats", "one row", "channels first", "none", "unnamed", "pickled"],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        data.open_images(tmp_path / "x.npz")
    assert str(error.value).startswith("images ") and "x.npz" in str(error.value)


def test_an_array_of_no_images_in_a_file_of_its_own_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS[:0])
    with pytest.raises(ValueError, match=r"x\.npy must .*, got "):
        data.open_images(tmp_path / "x.npy")


def test_a_place_without_images_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"^images must hold images, .* got none in '"):
        data.open_images(tmp_path)
    with pytest.raises(ValueError, match=r"must be a \.npz or \.npy file .*x\.txt'"):
        data.open_images(tmp_path / "x.txt")
    for missing in ("", str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"must be in a folder, .* got (no )?'"):
            data.open_images(missing)


def test_batches_start_within_the_images(tmp_path):
    found = data.open_images(write(tmp_path, PIXELS[:3]))
    with pytest.raises(ValueError, match=r"batch_size must be >= 1, got 0\.$"):
        found.batches(0)
    for start in (-1, 4):
        with pytest.raises(
            ValueError, match=rf"start must be in \[0, 3\], got {start}"
        ):
            found.batches(2, start)
