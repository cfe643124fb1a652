"""Pixels: uint8 as stored, float32 in [-1, 1] as networks see them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_diffusion import checks

ROUNDINGS = ("floor", "round")  # what `to_uint8` offers


def from_uint8(images: Any) -> Any:
    """Scales uint8 pixels to float32 in [-1, 1]: x / 127.5 - 1.

    Args:
        images: uint8 array of any shape, of NumPy or JAX.

    Returns:
        A float32 array of the same shape, of the same library.

    Raises:
        ValueError: if `images` is not uint8.

    >>> from_uint8(np.array([0, 51, 255], np.uint8)).round(3).tolist()
    [-1.0, -0.6000000238418579, 1.0]
    """
    checks.array("images", images, "uint8")
    return images.astype(np.float32) / 127.5 - 1


def to_uint8(x: Any, rounding: str = "floor") -> np.ndarray:
    """Scales [-1, 1] to uint8 pixels: (x + 1) * 127.5, clipped to [0, 255].

    "round" is the exact inverse of `from_uint8`. "floor" is not: in float32 it takes
    the levels 1 to 63 to 0 to 62, so compare samples with real images as they are
    stored, not with real images that were scaled there and back.

    Args:
        x: array of any shape, of NumPy or JAX; values outside [-1, 1] are clipped.
        rounding: "floor" truncates, as the code of Ho et al. and of OpenAI does;
            "round" takes the nearest level, as DDIM's code does.

    Returns:
        A uint8 array of NumPy of the same shape.

    Raises:
        ValueError: if `x` has no numbers, or `rounding` is not in `ROUNDINGS`.

    >>> x = np.array([-1.0, 0.0, 0.999, 7.0])
    >>> to_uint8(x).tolist(), to_uint8(x, "round").tolist()
    ([0, 127, 254, 255], [0, 128, 255, 255])
    """
    checks.choice("rounding", rounding, ROUNDINGS)
    half = 0.5 if rounding == "round" else 0.0
    found = np.asarray(x)
    if found.dtype != bool and not jnp.issubdtype(found.dtype, jnp.number):
        raise ValueError(f"x must be an array of numbers, got {checks.shown(x)}.")
    scaled = (found.astype(np.float32) + 1) * 127.5 + half
    return scaled.clip(0, 255).astype(np.uint8)
