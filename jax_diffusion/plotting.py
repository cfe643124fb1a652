"""Pictures: grids of images, denoising as a GIF, curves.

Images are uint8 [n, h, w, c] with one or three channels. Pillow and matplotlib are
imported when they are needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Lays images out row by row on a grey ground: [n, h, w, c] -> [H, W, c]."""
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
    """Writes one image [h, w, c]; whole-number enlarged if smaller than `min_size`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    _picture(image, min_size).save(path)


def save_gif(
    path: str | Path, frames: Sequence[np.ndarray], *, min_size: int = 256
) -> None:
    """Writes images [h, w, c] as an endless GIF that rests on the last one."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [_picture(frame, min_size) for frame in frames]
    durations = [120] * len(rest) + [1500]  # milliseconds
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _picture(image, min_size):
    from PIL import Image

    factor = max(1, -(-min_size // max(image.shape[:2])))
    image = np.repeat(np.repeat(image, factor, axis=0), factor, axis=1)
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_loss_curve(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the loss, and its quartiles of t, from the lines of metrics.jsonl."""
    names = ["loss", *(f"loss_q{q}" for q in range(4))]
    curves = {
        name: ([r["step"] for r in rows], [r.get(name, np.nan) for r in rows])
        for name in names
    }
    _save_curves(path, curves, xlabel="step", ylabel="loss", ylog=True)


def save_vlb_curve(path: str | Path, terms: Mapping[str, np.ndarray]) -> None:
    """Draws terms of the bound against t, each a vector [T] in bits/dim."""
    curves = {name: (np.arange(len(y)), y) for name, y in terms.items()}
    _save_curves(path, curves, xlabel="t", ylabel="bits/dim", ylog=True)


def save_rate_distortion(
    path: str | Path, rate: np.ndarray, distortion: np.ndarray
) -> None:
    """Draws how an image appears as it is sent (Ho et al. 2020, fig. 5 and table 4).

    Args:
        rate: [T] bits/dim paid for x_t, t ascending; the image itself comes last.
        distortion: [T] root mean squared error of the x_0 predicted there, 0 to 255.
    """
    steps = np.arange(len(rate))[::-1]  # reverse steps from x_T to x_t
    figure = _figure(path, (12, 4))
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
    figure.savefig(path, dpi=120)


def _save_curves(path, curves, *, xlabel, ylabel, ylog):
    figure = _figure(path, (7, 4))
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, np.asarray(y, float), label=name, linewidth=1)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylog else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _figure(path, size):
    from matplotlib.figure import Figure  # no pyplot: no state, no display

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Figure(figsize=size, layout="constrained")
