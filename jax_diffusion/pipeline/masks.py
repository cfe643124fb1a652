"""Which pixels `inpaint` knows: half of an image, a picture, or an array."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_diffusion import data

HALVES: dict[str, Callable[[int, int], Any]] = {  # names of masks: the known half
    "left": lambda h, w: np.s_[:, : w // 2],
    "right": lambda h, w: np.s_[:, w // 2 :],
    "top": lambda h, w: np.s_[: h // 2, :],
    "bottom": lambda h, w: np.s_[h // 2 :, :],
}


def read_mask(mask: Any, image_shape: tuple[int, ...]) -> np.ndarray:
    """Returns a mask as float32 [h, w, 1], 1 where pixels are known.

    Args:
        mask: "left", "right", "top", "bottom", an array [h, w], or a picture file:
            known is what is white and not transparent.
        image_shape: (h, w, c).

    Raises:
        ValueError: if the mask cannot be read, is not as large as the images, hides
            nothing or shows nothing.
    """
    h, w, _ = image_shape
    known = np.zeros((h, w, 1), np.float32)
    if isinstance(mask, str) and mask in HALVES:
        known[HALVES[mask](h, w)] = 1
        white = known[..., 0] > 0
    elif isinstance(mask, np.ndarray):
        white = mask[..., 0] > 0 if mask.shape == (h, w, 1) else mask > 0
    else:
        if not isinstance(mask, str | os.PathLike) or not Path(mask).is_file():
            raise ValueError(
                f"mask must be of {sorted(HALVES)} or a file, got {str(mask)!r}."
            )
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
