"""Image files: decoding, resizing and cropping them, on all cores."""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from jax_diffusion import checks
from jax_diffusion.data.examples import DamagedImageError

MAX_SIDE = 16_384  # pixels: larger ones are mistakes, and would not fit in memory
MAX_TEXT = 64 * 2**20  # bytes of a text in a file: more would not fit in memory
CHUNK = 32  # images that a thread decodes at a time

T = TypeVar("T")
Color = str | Sequence[int]  # a name that Pillow knows, or (r, g, b) in [0, 255]


@contextlib.contextmanager
def reading(rule: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Turns any error of a decoder into a ValueError: "RULE, got ERROR."

    Decoders document none of what they raise, hence any error.
    """
    try:
        yield
    except Exception as error:
        raise kind(f"{rule}, got {error!r}.") from error


class Decoder:
    """Makes opaque uint8 pixels of image files, and of arrays that are more than that.

    Args:
        background: the color behind transparent pixels: a name that Pillow knows, such
            as "black" or "#ff8800", or (r, g, b) in [0, 255]. None: white for files,
            while the last of two or four channels of an array stays a channel.
        max_value: the value that is white in images of more than 8 bits a channel: 4095
            for 12 bits, 1.0 for floats from 0 to 1. A value v becomes
            round(v / max_value * 255), as PNG's specification scales. None: of 16 bits
            the upper 8 are kept, and the first such file is told in a warning.

    Raises:
        ValueError: if an argument is not as described.
    """

    def __init__(
        self, background: Color | None = None, max_value: int | float | None = None
    ):
        if max_value is not None:
            checks.number("max_value", max_value, above=0)
        self._given = background is not None
        self._background = parse_color(
            (255, 255, 255) if background is None else background
        )
        self._max_value = max_value
        self._warned = threading.Lock()  # taken by the first deep file, for good

    def is_gray(self, file: str) -> bool:
        """Tells, by the header of a file, whether `decode` returns a single channel.

        Raises:
            DamagedImageError: if there is no header that can be read.
        """
        with opened(file) as image:
            gray = _is_gray(image)
            return gray and (self._is_gray or not image.has_transparency_data)

    def decode(self, file: str) -> np.ndarray:
        """Decodes an image file; of an animation, the first frame counts.

        The image is turned upright by its EXIF orientation, and transparent pixels are
        composited on the background.

        Returns:
            uint8 [h w c], with c = 1 if the file is gray, and the background too where
            that shows; else 3.

        Raises:
            DamagedImageError: if the file cannot be decoded.
            ValueError: if it has values beyond `max_value`, or if that must be given.
        """
        from PIL import ImageOps

        with opened(file) as stored:
            deep = stored.mode[0] in "IF" or ";16" in str(stored.tile[:1])
            pixels, alpha = _channels(ImageOps.exif_transpose(stored), deep=deep)
        if pixels.dtype != np.uint8:
            pixels = self._to_8_bits(pixels, file)
        elif deep and self._max_value is None:
            self._warn(
                f"{file} has 16 bits a channel; the upper 8 bits are kept, which is "
                "all that Pillow reads of colors. max_value=65535 says so, too."
            )
        elif deep and self._max_value != 65535:
            raise ValueError(
                "max_value must be 65535 for 16-bit colors, of which the upper 8 bits "
                f"are read, got {self._max_value} for {file}."
            )
        return pixels if alpha is None else self._composite(pixels, alpha)

    def convert(self, images: np.ndarray, where: str = "the array") -> np.ndarray:
        """Converts images that are arrays already, [... h w c].

        Deeper ones than uint8 are scaled by `max_value`, if that is given. Two or four
        channels are composited on the background, if one is given. `where` they are is
        for errors.

        Raises:
            ValueError: if there are values beyond `max_value`.
        """
        if images.dtype != np.uint8 and self._max_value is not None:
            images = self._to_8_bits(images, where)
        if (
            self._given
            and images.dtype == np.uint8
            and images.shape[-1:] in ((2,), (4,))
        ):
            images = self._composite(images[..., :-1], images[..., -1:])
        return images

    @property
    def _is_gray(self) -> bool:
        return len({*self._background}) == 1

    def _composite(self, pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        """Lays uint8 [... c] with alpha uint8 [... 1] over the background, rounded."""
        gray = self._is_gray and pixels.shape[-1] == 1
        below = np.array(self._background[:1] if gray else self._background, np.uint32)
        a = alpha.astype(np.uint32)
        return ((pixels * a + below * (255 - a) + 127) // 255).astype(np.uint8)

    def _to_8_bits(self, values: np.ndarray, where: str) -> np.ndarray:
        """Scales numbers of any type to uint8; `where` they are, for errors."""
        low, high, most = values.min(), values.max(), self._max_value
        if most is not None:
            if not (low >= 0 and high <= most):
                raise ValueError(
                    f"max_value must be the largest value there is, got {most} where "
                    f"{where} has values from {low} to {high}."
                )
            if values.dtype == np.uint16:  # a table takes a fourth of the memory
                return _scale(np.arange(int(high) + 1), most)[values]
            return _scale(values, most)
        if values.dtype.kind not in "iu" or low < 0 or high > 65535:
            raise ValueError(
                f"max_value must say which value is white, got none where {where} has "
                f"{values.dtype} from {low} to {high}."
            )
        kept = values >> 8
        before, after = len(np.unique(values)), len(np.unique(kept))
        power = 2 ** int(high).bit_length() - 1
        levels = "gray level becomes" if before == 1 else "gray levels become"
        self._warn(
            f"{where} has 16 bits a pixel and values up to {high}; the upper 8 bits "
            f"are kept, so that {before} {levels} {after}. data.load takes "
            f"the value that is white as max_value, such as {power}."
        )
        return kept.astype(np.uint8)

    def _warn(self, text: str) -> None:
        if self._warned.acquire(blocking=False):
            warnings.warn(text, stacklevel=4)


def _scale(values: np.ndarray, most: int | float) -> np.ndarray:
    return np.floor(values.astype(np.float64) / most * 255 + 0.5).astype(np.uint8)


_limits: list[int] = []  # of texts, before each file that is open now
_limits_lock = threading.Lock()


@contextlib.contextmanager
def opened(file: str) -> Iterator[Any]:
    """Opens an image file with Pillow, which may be done in many threads.

    Pillow refuses a PNG with a compressed text, or a color profile, above 1 MiB.
    Programs that generate images write longer ones: here the limit is `MAX_TEXT`.

    Raises:
        DamagedImageError: instead of anything that is raised while the file is open.
    """
    from PIL import Image, PngImagePlugin

    with reading(f"{file} must be a whole image", DamagedImageError):
        with _limits_lock:
            _limits.append(PngImagePlugin.MAX_TEXT_CHUNK)
            PngImagePlugin.MAX_TEXT_CHUNK = max(_limits[0], MAX_TEXT)
        try:
            with Image.open(file) as image:
                yield image
        finally:
            with _limits_lock:  # the first one's is the last to come back
                PngImagePlugin.MAX_TEXT_CHUNK = _limits.pop()


def _is_gray(image: Any) -> bool:
    """Whether an image of Pillow has a channel of brightness, besides alpha."""
    return image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF"


def _channels(image: Any, *, deep: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels [h w c] of an image of Pillow, and its alpha uint8 [h w 1], if it has one.

    Args:
        image: of any mode.
        deep: whether the file has more than 8 bits a channel; they are returned of
            images with one channel only.
    """
    key = image.info.get("transparency")
    if image.mode[0] in "IF":
        values = np.asarray(image)[..., None]
        return values, None if key is None else np.uint8(255) * (values != key)
    if not image.has_transparency_data:
        pixels = np.asarray(image.convert("L" if _is_gray(image) else "RGB"))
        return pixels.reshape(*pixels.shape[:2], -1), None
    if deep and isinstance(key, tuple):  # of which Pillow compares the lower 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    pixels = np.asarray(image.convert("RGBA"))
    return pixels[..., : 1 if _is_gray(image) else 3], pixels[..., 3:]


def parse_color(color: Color) -> tuple[int, ...]:
    """Returns (r, g, b) in [0, 255] of a color.

    Args:
        color: a name that Pillow knows, such as "black" or "#ff8800", or (r, g, b).

    Raises:
        ValueError: if it is no such color.

    >>> parse_color("white"), parse_color("#ff8800"), parse_color([1, 2, 3])
    ((255, 255, 255), (255, 136, 0), (1, 2, 3))
    """
    rule = (
        "background must be the name of a color, or (r, g, b) of integers in [0, 255]"
    )
    found: Any = color
    if isinstance(color, str):
        from PIL import ImageColor

        with reading(rule):
            found = ImageColor.getrgb(color)
    numbers = tuple(found) if isinstance(found, Sequence) else ()
    if len(numbers) != 3 or any(
        not isinstance(x, int) or isinstance(x, bool) or not 0 <= x <= 255
        for x in numbers
    ):
        raise ValueError(f"{rule}, got {color!r}.")
    return numbers


def fit(array: np.ndarray, size: int | Sequence[int]) -> np.ndarray:
    """Resizes an image until it just covers a size, and crops the center.

    The same filters in the same order as improved-diffusion's `image_datasets.py`:
    halving by box filters, then bicubic.

    Args:
        array: uint8 [h w c] of any number of channels.
        size: (h, w) of the result in pixels, or the side of a square.

    Returns:
        uint8 [h w c].
    """
    from PIL import Image

    if array.shape[-1] not in (1, 3):  # Pillow would take some of them for alpha
        channels = [fit(array[..., i, None], size) for i in range(array.shape[-1])]
        return np.concatenate(channels, axis=-1)
    h, w = height_and_width(size)
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    while image.width >= 2 * w and image.height >= 2 * h:
        image = image.resize([x // 2 for x in image.size], Image.Resampling.BOX)
    scale = max(w / image.width, h / image.height)
    width, height = (round(x * scale) for x in image.size)
    left, top = (width - w) // 2, (height - h) // 2
    array = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return array[top : top + h, left : left + w].reshape(h, w, -1)


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (h, w) of an image size, which is one number if images are square.

    Raises:
        ValueError: if it is neither an integer in [1, `MAX_SIDE`] nor two of them.
    """
    sizes: Any = image_size
    if not isinstance(image_size, list | tuple):
        sizes = [image_size] * 2
    if len(sizes) != 2:
        raise ValueError(
            f"image_size must be one integer or (h, w), got {image_size!r}."
        )
    for size in sizes:
        checks.integer("image_size", size, at_least=1, at_most=MAX_SIDE)
    h, w = sizes
    return int(h), int(w)


def in_threads(function: Callable[[list[int]], T], rows: np.ndarray) -> list[T]:
    """Calls `function` on chunks of `rows` int [n], on all cores.

    Returns:
        One result for each chunk of at most `CHUNK` rows, in order.
    """
    chunks = [rows[i : i + CHUNK].tolist() for i in range(0, len(rows), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # no thread outlives the call
        return [*pool.map(function, chunks)]
