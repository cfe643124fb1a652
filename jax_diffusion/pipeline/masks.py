"""Which pixels `inpaint` knows: half of an image, a picture, or an array."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks, data

HALVES: dict[str, Callable[[int, int], Any]] = {  # names of masks: the known half
    "left": lambda h, w: np.s_[:, : w // 2],
    "right": lambda h, w: np.s_[:, w // 2 :],
    "top": lambda h, w: np.s_[: h // 2, :],
    "bottom": lambda h, w: np.s_[h // 2 :, :],
}


def read_mask(mask: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Returns a mask as float32 [h, w, 1], 1 where pixels are known.

    Args:
        mask: "left", "right", "top" or "bottom", the known half. Or a picture file:
            known is what is lighter than half of white, and not transparent. Or an
            array [h, w] or [h, w, 1]: of bool, or of 0 and 1, which is known; or uint8
            with values above 1, which is read as a gray picture.
        image_shape: (h, w, c).

    Raises:
        ValueError: if the mask cannot be read or has other values, is not as large as
            the images, hides nothing or shows nothing.
    """
    h, w, _ = image_shape
    known = np.zeros((h, w, 1), np.float32)
    if isinstance(mask, str) and mask in HALVES:
        known[HALVES[mask](h, w)] = 1
        white = known[..., 0] > 0
    elif isinstance(mask, np.ndarray | jax.Array):
        white = known_pixels(np.asarray(mask))
        white = white[..., 0] if white.shape == (h, w, 1) else white
    else:
        rule = f"of {sorted(HALVES)}, a file or an array"
        checks.path("mask", mask, rule)
        if not Path(mask).is_file():
            raise ValueError(f"mask must be {rule}, got {os.fspath(mask)!r}.")
        try:  # half of white, of a deep one as of 65535, is gray
            decoder = data.Decoder(background="black", max_value=65535)
            pixels = decoder.decode(os.fspath(mask))
        except ValueError as error:
            raise ValueError(f"mask must be a whole image, got: {error}") from error
        gray = [299, 587, 114] if pixels.shape[-1] == 3 else [1000]  # ITU-R 601
        white = pixels @ gray > 127_499
    if white.shape != (h, w):
        raise ValueError(f"mask must be {h} x {w}, as the images, got {white.shape}.")
    if white.all() or not white.any():
        found = "all are known" if white.all() else "none is known"
        name = f" in {mask}" if isinstance(mask, str | os.PathLike) else ""
        raise ValueError(f"mask must have known and unknown pixels, {found}{name}.")
    known[white] = 1
    return known


def known_pixels(mask: np.ndarray) -> np.ndarray:
    """Returns which pixels of an array are known, bool of its shape; see `read_mask`.

    Raises:
        ValueError: if it has values that could mean several things.
    """
    rule = "mask must be of bool, of 0 and 1, or a uint8 picture"
    if mask.dtype == np.uint8 and mask.max(initial=0) > 1:
        return mask > 127
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.number):
        raise ValueError(f"{rule}, got {checks.shown(mask)}.")
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size:
        raise ValueError(f"{rule}, got {mask.dtype} with {wrong.flat[0]}.")
    return mask == 1
