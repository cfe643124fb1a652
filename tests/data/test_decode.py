"""Decoding pictures whose pixels are known: alpha, depths, sizes, layouts of arrays."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from jax_diffusion import data
from jax_diffusion.data import DamagedImageError
from jax_diffusion.data.decode import MAX_TEXT, Decoder, fit, parse_color

COLORS = dict(white=(255, 255, 255), black=(0, 0, 0)) | {"#ff8800": (255, 136, 0)}
ALPHA = np.array([[0, 1, 64], [127, 254, 255]], np.uint8)  # of six pixels


def over(color, alpha, below):
    """Alpha compositing in exact arithmetic, rounded: float64 holds it."""
    a = alpha[..., None] / 255
    return np.rint(color * a + np.asarray(below) * (1 - a)).astype(np.uint8)


def with_texts(path, *lengths, color_profile=b""):
    """A PNG of known pixels with compressed texts, and perhaps a color profile."""
    texts = PngImagePlugin.PngInfo()
    for i, length in enumerate(lengths):
        add = texts.add_itxt if i else texts.add_text
        add("prompt", "x" * length, zip=True)
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    Image.fromarray(pixels).save(path, pnginfo=texts, icc_profile=color_profile or None)
    return pixels


@pytest.mark.slow
def test_a_png_with_long_texts_is_whole_in_many_threads(tmp_path):
    before = PngImagePlugin.MAX_TEXT_CHUNK
    files = [str(tmp_path / f"{i}.png") for i in range(6)]
    for file in files:
        profile = b"p" * 2 * 2**20
        pixels = with_texts(file, 3 * 10**6, 2 * 10**6, color_profile=profile)
    with ThreadPoolExecutor(6) as pool:
        found = [*pool.map(Decoder().decode, files * 4)]
        gray = [*pool.map(Decoder().is_gray, files * 4)]
    assert all((image == pixels).all() for image in found) and not any(gray)
    assert before == PngImagePlugin.MAX_TEXT_CHUNK


def test_a_text_that_fits_in_no_memory_is_one_sentence(tmp_path):
    before = PngImagePlugin.MAX_TEXT_CHUNK
    file = str(tmp_path / "bomb.png")
    with_texts(file, MAX_TEXT + 1)
    with pytest.raises(DamagedImageError, match=r"must be a whole image, got .*large"):
        Decoder().decode(file)
    assert before == PngImagePlugin.MAX_TEXT_CHUNK


def rgba(path):
    color = np.broadcast_to(np.uint8([200, 30, 90]), (2, 3, 3))
    image = Image.fromarray(np.concatenate([color, ALPHA[..., None]], -1), "RGBA")
    image.save(path)
    return color, ALPHA


def la(path):
    gray = np.uint8([[10, 20, 30], [40, 50, 60]])
    Image.fromarray(np.stack([gray, ALPHA], -1), "LA").save(path)
    return gray[..., None], ALPHA


def palette(path):
    image = Image.fromarray(np.uint8([[0, 1, 2], [2, 1, 0]]), "P")
    colors = np.uint8([[9, 8, 7], [200, 100, 50], [1, 2, 3]])
    image.putpalette(colors.tobytes())
    image.save(path, transparency=bytes([0, 100, 255]))
    rows = np.array([[0, 1, 2], [2, 1, 0]])
    return colors[rows], np.uint8([0, 100, 255])[rows]


def gif(path):
    rows = np.array([[0, 1, 2], [2, 1, 0]])
    image = Image.fromarray(np.uint8(rows), "P")
    colors = np.uint8([[9, 8, 7], [200, 100, 50], [1, 2, 3]])
    image.putpalette(colors.tobytes())
    image.save(path.with_suffix(".gif"), transparency=1)
    return colors[rows], np.uint8(255 * (rows != 1))


def key_of_gray(path):
    gray = np.uint8([[10, 20, 30], [40, 50, 20]])
    Image.fromarray(gray).save(path, transparency=20)
    return gray[..., None], np.uint8(255 * (gray != 20))


def key_of_colors(path):
    color = np.uint8(
        [[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 4], [4, 5, 6]] * 1 + [[1, 2, 3]]]
    )
    Image.fromarray(color).save(path, transparency=(1, 2, 3))
    return color, np.uint8(255 * (color != (1, 2, 3)).any(-1))


TRANSPARENT = [rgba, la, palette, gif, key_of_gray, key_of_colors]


@pytest.mark.parametrize("background", [None, *COLORS])
@pytest.mark.parametrize("write", TRANSPARENT)
def test_what_is_transparent_shows_the_background(tmp_path, write, background):
    color, alpha = write(tmp_path / "a.png")
    below = COLORS[background or "white"]
    expected = over(color, alpha, below)
    options = dict(path=tmp_path, image_size=(2, 3), batch_size=1, train=False)
    for in_memory in (True, False):
        batches = data.load(
            "folder", "all", background=background, in_memory=in_memory, **options
        )
        found = batches.batch(0)["image"][0]
        gray = color.shape[-1] == 1 and background != "#ff8800"
        assert found.shape[-1] == (1 if gray else 3)
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
    stored = data.open_images(tmp_path, decoder=Decoder(background))
    np.testing.assert_array_equal(stored.read(np.arange(1))[0], found)


def test_what_hides_behind_transparency_does_not_show(tmp_path):
    for i, hidden in enumerate([0, 255]):
        pixels = np.full((4, 4, 4), hidden, np.uint8)
        pixels[..., 3] = 0
        pixels[1:3, 1:3] = (220, 30, 30, 255)
        Image.fromarray(pixels, "RGBA").save(tmp_path / f"{i}.png")
    batches = data.load("folder", "all", path=tmp_path, image_size=8, batch_size=2)
    np.testing.assert_array_equal(*batches.images)


def test_alpha_of_arrays_is_a_channel_unless_a_background_is_given(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
    alpha = np.random.default_rng(1).integers(0, 256, (2, 6, 6), np.uint8)
    images = np.concatenate([color, alpha[..., None]], -1)
    np.savez(tmp_path / "x.npz", images=images)
    options = dict(path=tmp_path / "x.npz", batch_size=2)
    np.testing.assert_array_equal(data.load("npz", "all", **options).images, images)
    found = data.load("npz", "all", background="black", **options).images
    np.testing.assert_array_equal(found, over(color, alpha, (0, 0, 0)))


@pytest.mark.parametrize("color", ["", "whit", (1, 2), (0, 0, 256), "#ff000080"])
def test_a_background_that_is_no_color_is_refused(color):
    with pytest.raises(ValueError, match=r"^background must be .* got "):
        data.load("digits", batch_size=1, background=color)
    assert parse_color("White") == (255, 255, 255)


# More than 8 bits

TWELVE = np.array([[0, 1, 15, 16], [2047, 2048, 4094, 4095]])


def scaled(values, max_value):
    return np.floor(values / max_value * 255 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("kind", ["png", "tiff", "int32", "float"])
def test_a_declared_range_is_scaled_to_all_gray_levels(tmp_path, kind):
    values, white = TWELVE.astype(np.uint16), 4095
    if kind == "float":
        values, white = (TWELVE / 4095).astype(np.float32), 1.0
    elif kind == "int32":
        values = TWELVE.astype(np.int32)
    name = "a.png" if kind == "png" else "a.tiff"
    Image.fromarray(values).save(tmp_path / name)
    found = data.load(
        *("folder", "all"),
        **dict(path=tmp_path, image_size=(2, 4), batch_size=1, max_value=white),
    ).images
    np.testing.assert_array_equal(found[0, ..., 0], scaled(TWELVE, 4095))
    assert found.min() == 0 and found.max() == 255


def test_an_undeclared_range_keeps_the_upper_bits_and_tells_once_what_is_lost(tmp_path):
    for i in range(3):
        Image.fromarray(TWELVE.astype(np.uint16)).save(tmp_path / f"{i}.png")
    options = dict(path=tmp_path, image_size=(2, 4), batch_size=1)
    with pytest.warns(UserWarning) as told:
        found = data.load("folder", "all", **options).images
    assert len(told) == 1
    for part in ("up to 4095", "8 gray levels become 4", "max_value, such as 4095"):
        assert part in str(told[0].message)
    np.testing.assert_array_equal(found[0, ..., 0], TWELVE >> 8)


@pytest.mark.parametrize("write_key", [False, True])
def test_a_transparent_value_of_16_bits_shows_the_background(tmp_path, write_key):
    keys = dict(transparency=2047) if write_key else {}
    Image.fromarray(TWELVE.astype(np.uint16)).save(tmp_path / "a.png", **keys)
    found = Decoder(max_value=4095).decode(str(tmp_path / "a.png"))[..., 0]
    expected = scaled(TWELVE, 4095)
    if write_key:
        expected[TWELVE == 2047] = 255
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("values", "max_value", "words"),
    [
        (TWELVE.astype(np.uint16), 4000, "max_value must be .* got 4000 .*0 to 4095"),
        (TWELVE.astype(np.float32), None, "max_value must say which value is white"),
        (np.int32(-TWELVE), 4095, "max_value must be .*-4095 to 0"),
        (np.int32(TWELVE * 100), None, "max_value must say .*409500"),
        (np.float32(TWELVE * np.nan), 1.0, "max_value must be .*nan"),
    ],
)
def test_values_out_of_the_range_are_refused(tmp_path, values, max_value, words):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=words):
        Decoder(max_value=max_value).decode(str(tmp_path / "a.tiff"))


@pytest.mark.parametrize("max_value", [0, -1, float("nan"), float("inf")])
def test_a_max_value_that_is_no_number_is_refused(max_value):
    with pytest.raises(ValueError, match=r"^max_value must be a number > 0, got "):
        data.load("digits", batch_size=1, max_value=max_value)


def png_of_16_bit_colors(path, values):
    """Pillow writes none: a PNG of its own, of uint16 [h w 3]."""
    import struct
    import zlib

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    h, w, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"".join(chunk(*pair) for pair in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def test_of_16_bit_colors_the_loss_is_told_unless_declared(tmp_path):
    values = np.arange(2 * 3 * 3).reshape(2, 3, 3) * 3000
    png_of_16_bit_colors(tmp_path / "a.png", values)
    file = str(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"16 bits a channel; the upper 8 bits"):
        found = Decoder().decode(file)
    np.testing.assert_array_equal(found, values >> 8)
    np.testing.assert_array_equal(Decoder(max_value=65535).decode(file), values >> 8)
    with pytest.raises(ValueError, match=r"max_value must be 65535 for 16-bit colors"):
        Decoder(max_value=4095).decode(file)


def test_arrays_of_more_than_8_bits_need_a_declared_range(tmp_path):
    images = np.broadcast_to(TWELVE[..., None], (3, 2, 4, 1)).astype(np.uint16)
    np.savez(tmp_path / "x.npz", images=images)
    options = dict(path=tmp_path / "x.npz", batch_size=2)
    found = data.load("npz", "all", max_value=4095, **options).images
    np.testing.assert_array_equal(found, scaled(images, 4095))
    with pytest.raises(
        ValueError, match=r"images of .* must be uint8.* got uint16.*max_value"
    ):
        data.load("npz", "all", **options)


# Sizes and layouts


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels_shrink_channel_by_channel(channels):
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5, channels), np.uint8)
    large = blocks.repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(fit(large, (3, 5)), blocks)


@pytest.mark.parametrize("size", [(2, 6), (6, 2), (4, 4), 4])
def test_an_image_is_resized_until_it_covers_the_size_and_cropped_at_its_center(size):
    column = 10 * np.arange(12, dtype=np.uint8)
    image = np.broadcast_to(column[None, :, None], (12, 12, 1))
    h, w = (size, size) if isinstance(size, int) else size
    found = fit(image, size)
    assert found.shape == (h, w, 1)
    width = max(h, w)  # after resizing
    centers = (np.arange(w) + (width - w) // 2 + 0.5) * 12 / width - 0.5
    np.testing.assert_allclose(found[0, :, 0], 10 * centers, atol=6)  # at the border


@pytest.mark.parametrize("size", [(4,), (4, 8, 3), (0, 4), (4, -1), 0])
def test_an_image_size_that_is_none_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match=r"^image_size must be .*got "):
        data.load("synthetic", batch_size=1, image_size=size)


def test_readers_take_a_height_and_a_width(tmp_path):
    wide = data.load("synthetic", batch_size=1, image_size=(8, 16))
    square = data.load("synthetic", batch_size=1, image_size=[8, 8])
    assert wide.image_shape == (8, 16, 3)
    same = data.load("synthetic", batch_size=1, image_size=8)
    np.testing.assert_array_equal(square.images, same.images)
    np.savez(tmp_path / "x.npz", images=wide.images[:20])
    options = dict(path=tmp_path / "x.npz", batch_size=1)
    assert data.load("npz", image_size=(8, 16), **options).image_shape == (8, 16, 3)
    with pytest.raises(ValueError, match=r"image_size of npz must be 8 x 16, got \(16"):
        data.load("npz", image_size=(16, 8), **options)


@pytest.mark.parametrize(
    "shape",
    [
        *[(2, 1, 28, 28), (2, 3, 16, 16), (2, 3, 16, 32), (2, 4, 32, 32), (2, 5, 8, 8)],
        *[(2, 3, 4, 4), (2, 3, 4, 5), (2, 1, 8, 8)],
    ],
)
def test_arrays_with_channels_first_are_refused_with_the_remedy(tmp_path, shape):
    images = np.zeros(shape, np.uint8)
    words = (
        r"must be \[n h w c\], got .*looks like \[n c h w\]; x\.transpose\(0, 2, 3, 1"
    )
    np.savez(tmp_path / "x.npz", images=images)
    for read in (
        lambda: data.from_arrays(images, batch_size=1),
        lambda: data.load("npz", path=tmp_path / "x.npz", batch_size=1),
        lambda: data.open_images(tmp_path / "x.npz"),
    ):
        with pytest.raises(ValueError, match=words):
            read()
    data.from_arrays(images.transpose(0, 2, 3, 1), batch_size=1)


@pytest.mark.parametrize(
    "shape",
    [
        *[(2, 28, 28, 1), (2, 16, 16, 3), (2, 4, 4, 3), (2, 4, 4, 8), (2, 16, 16, 5)],
        *[(2, 1, 1, 3), (2, 3, 5, 3), (2, 2, 2, 4), (2, 1, 8, 1), (2, 4, 32, 3)],
    ],
)
def test_arrays_with_channels_last_are_read(shape):
    images = np.zeros(shape, np.uint8)
    assert data.from_arrays(images, batch_size=1).image_shape == shape[1:]
