"""Writes PNGs of images in a grid, GIFs of denoising, and PNGs of curves.

Images are uint8 [n, h, w, c]. Pillow and matplotlib are
imported when they are needed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jax_diffusion import checks
from jax_diffusion.runtime import files


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Lays images out row by row on gray, with gaps around and between them.

    Args:
        images: uint8 [n, h, w, c]; channels of other numbers than 1 and 3 stand side by
            side, as gray images.
        columns: images in a row; by default, the grid is as square as can be.
        gap: width of the gaps in pixels.

    Returns:
        One image, uint8 [rows * (h + gap) + gap, columns * (w + gap) + gap, c], with c
        1 or 3.

    Raises:
        ValueError: if an argument is not as described.

    >>> grid(np.zeros((6, 8, 8, 3), np.uint8), columns=3).shape
    (19, 28, 3)
    """
    checks.array("images", images, "uint8", ("n", "h", "w", "c"))
    if columns is not None:
        checks.integer("columns", columns, at_least=1)
    checks.integer("gap", gap, at_least=0)
    if images.shape[-1] not in (1, 3):
        images = np.concatenate(np.moveaxis(images, -1, 0), axis=2)[..., None]
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(n**0.5))
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 128)
    sheet = sheet.astype(np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = row * (h + gap) + gap, column * (w + gap) + gap
        sheet[top : top + h, left : left + w] = image
    return sheet


def save_png(path: str | Path, image: np.ndarray, *, min_size: int = 0) -> None:
    """Writes one image as a PNG, whole or not at all; its folder is made.

    Args:
        path: the file to write.
        image: uint8 [h, w, c] with c 1 or 3.
        min_size: an image whose longer side is below this many pixels is enlarged by
            the least whole number that makes it so long.
    """
    picture = _to_pillow(image, min_size)
    _write(path, functools.partial(picture.save, format="PNG"))


def save_gif(
    path: str | Path, frames: Sequence[np.ndarray], *, min_size: int = 256
) -> None:
    """Writes images as an endless GIF that rests on the last one; its folder is made.

    Args:
        path: the file to write.
        frames: images uint8 [h, w, c], at least one.
        min_size: as in `save_png`.
    """
    first, *rest = [_to_pillow(frame, min_size) for frame in frames]
    durations = [120] * len(rest) + [1500]  # milliseconds
    options: dict[str, Any] = dict(save_all=True, append_images=rest, loop=0)
    options |= dict(format="GIF", duration=durations)
    _write(path, functools.partial(first.save, **options))


def _write(path: str | Path, content: Callable[[BinaryIO], Any]) -> None:
    """Writes a picture under another name first: a kill leaves no half of one."""
    checks.path("path", path, "a string or an os.PathLike")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, content, sync=False)


def _to_pillow(image: np.ndarray, min_size: int) -> Any:
    from PIL import Image

    checks.array("image", image, "uint8", ("h", "w", "c"))
    factor = max(1, -(-min_size // max(image.shape[:2])))
    image = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_loss_curve(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the training loss against the step, and the loss of each quartile of t.

    Args:
        path: the PNG to write; its folder is made.
        rows: lines of metrics.jsonl, with "step" and perhaps "loss", "loss_q0" to
            "loss_q3"; what is missing or None leaves a gap.
    """
    names = ["loss", *(f"loss_q{q}" for q in range(4))]
    curves = {
        name: ([r["step"] for r in rows], [r.get(name, np.nan) for r in rows])
        for name in names
    }
    _save_curves(path, curves, xlabel="step", ylabel="loss")


def save_vlb_curve(path: str | Path, terms: Mapping[str, np.ndarray]) -> None:
    """Draws terms of the variational bound against t.

    Args:
        path: the PNG to write; its folder is made.
        terms: by name, each [T] in bits/dim, such as "vlb".
    """
    curves = {name: (np.arange(len(y)), y) for name, y in terms.items()}
    _save_curves(path, curves, xlabel="t", ylabel="bits/dim")


def save_rate_distortion(
    path: str | Path, rate: np.ndarray, distortion: np.ndarray
) -> None:
    """Draws rate and distortion of progressive coding (Ho et al. 2020, fig. 5).

    Three plots: distortion against rate, and both against the reverse steps taken.

    Args:
        path: the PNG to write; its folder is made.
        rate: [T] bits/dim paid until x_t is known, t ascending.
        distortion: [T] root mean squared error of the x_0 predicted from x_t, on the
            scale 0 to 255.
    """
    steps = np.arange(len(rate))[::-1]  # reverse steps from x_T to x_t
    figure = _figure((12, 4))
    for axes, x, y, xlabel, ylabel in zip(
        figure.subplots(1, 3),
        (rate, steps, steps),
        (distortion, distortion, rate),
        ("rate (bits/dim)", "reverse steps", "reverse steps"),
        ("distortion (RMSE)", "distortion (RMSE)", "rate (bits/dim)"),
        strict=True,
    ):
        axes.plot(x, np.asarray(y, float), linewidth=1)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
    _write(path, functools.partial(figure.savefig, dpi=120, format="png"))


def _save_curves(
    path: str | Path, curves: Mapping[str, tuple[Any, Any]], *, xlabel: str, ylabel: str
) -> None:
    """Draws curves (x, y) by name in one plot, y on a logarithmic scale."""
    figure = _figure((7, 4))
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, np.asarray(y, float), label=name, linewidth=1)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    _write(path, functools.partial(figure.savefig, dpi=120, format="png"))


def _figure(size: tuple[int, int]) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no state, no display

    return Figure(figsize=size, layout="constrained")
