"""Published results of the models that configs reproduce, for `--compare paper`.

They are transcribed: most tables were read in public copies of the papers' text, so
look at the paper before you quote one. Nothing here was computed by this package.
Numbers that a source does not give are not guessed: where `samples` is None, the source
does not state it.

DDPM is Ho et al. 2020, DDIM Song et al. 2021, Improved DDPM Nichol & Dhariwal 2021, and
guided diffusion Dhariwal & Nichol 2021.
"""

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple


class Row(NamedTuple):
    """Numbers that were measured together.

    Attributes:
        source: paper and table.
        setting: how the network was trained and sampled.
        values: the numbers by metric, with the names that `evaluate` prints.
        samples: how many samples they are computed from; None if that is not stated, or
            if they are not about samples.
    """

    source: str
    setting: str
    values: dict[str, float]
    samples: int | None = None


DDPM = "DDPM, arXiv:2006.11239, {}, transcribed"
DDIM = "DDIM, arXiv:2010.02502, {}, transcribed"
IMPROVED = "Improved DDPM, arXiv:2102.09672, {}, transcribed"
GUIDED = "README of openai/guided-diffusion, transcribed"


def _ddim(setting: str, fids: Mapping[int, float], table: str) -> tuple[Row, ...]:
    """Rows of FIDs by number of steps; the released code draws 50,000 samples."""
    return tuple(
        Row(DDIM.format(table), setting.format(steps), {"fid": fid}, 50_000)
        for steps, fid in fids.items()
    )


def _improved(
    setting: str, table: str, bits: float, fid: float, samples: int
) -> tuple[Row, ...]:
    """Rows of bits/dim and FID, about which the table says no more than this."""
    source, setting = IMPROVED.format(table), f"{setting}, cosine, T 4000, EMA 0.9999"
    return (
        Row(source, setting, {"fid": fid}, samples),
        Row(source, setting, {"bits_per_dim": bits}),
    )


def _guided(
    setting: str, fid: float, precision: float, recall: float
) -> tuple[Row, ...]:
    # evaluations/README.md: 50,000 samples, and 10,000 images for precision and recall.
    values = dict(fid=fid, precision=precision, recall=recall)
    return (Row(GUIDED, setting, values, 50_000),)


# A key is what a config has as `reproduces`.
PAPERS: dict[str, tuple[Row, ...]] = {
    "ddpm_cifar10": (
        Row(
            DDPM.format("Table 1"),
            "L_simple, 1000 steps, EMA 0.9999, against the training set",
            {"fid": 3.17, "inception_score": 9.46},
            50_000,
        ),
        Row(
            DDPM.format("Table 1"),
            "L_simple, at most, on the test set; 3.72 on the training set",
            {"bits_per_dim": 3.75},
        ),
        Row(
            DDPM.format("Section 4.1"),
            "L_simple, 1000 steps, EMA 0.9999, against the test set",
            {"fid": 5.24},
            50_000,
        ),
        Row(
            DDPM.format("Section 4.3"),
            "L_simple, rate and distortion of the whole code",
            {"kl": 1.78, "decoder": 1.97, "rmse": 0.95},
        ),
        *_ddim(  # Appendix D.2: quadratic steps on CIFAR-10, else linear ones
            "network of DDPM, DDIM in {} quadratic steps",
            {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04},
            "Table 1",
        ),
    ),
    "ddim_celeba64": _ddim(
        "CelebA 64 x 64, DDIM in {} linear steps",
        {10: 17.33, 20: 13.73, 50: 9.17, 100: 6.53, 1000: 3.51},
        "Table 1",
    ),
    "ddpm_lsun_bedroom": (
        Row(DDIM.format("Table 3, of DDPM"), "1000 steps", {"fid": 6.36}),
        *_ddim(
            "network of DDPM, DDIM in {} linear steps",
            {10: 16.95, 20: 8.89, 50: 6.75, 100: 6.62},
            "Table 3",
        ),
    ),
    "ddpm_lsun_church": (
        Row(DDIM.format("Table 3, of DDPM"), "1000 steps", {"fid": 7.89}),
        *_ddim(
            "network of DDPM, DDIM in {} linear steps",
            {10: 19.45, 20: 12.47, 50: 10.84, 100: 10.58},
            "Table 3",
        ),
    ),
    "iddpm_cifar10_hybrid": _improved(
        "L_hybrid, 500,000 iterations", "Table 2", 3.17, 3.19, 50_000
    ),
    "iddpm_cifar10_vlb": _improved(
        "L_vlb, 500,000 iterations", "Table 2", 2.94, 11.47, 50_000
    ),
    "iddpm_imagenet64_hybrid": _improved(
        "L_hybrid, 1,500,000 iterations", "Table 1", 3.57, 19.2, 10_000
    ),
    "iddpm_imagenet64_vlb": _improved(
        "L_vlb, 1,500,000 iterations", "Table 1", 3.53, 40.1, 10_000
    ),
    "iddpm_imagenet64_labels": (
        Row(
            IMPROVED.format("Table 4"),
            "270M parameters, with labels, 250 steps",
            {"fid": 2.92, "precision": 0.82, "recall": 0.71},
            50_000,
        ),
    ),
    # "Pure guided diffusion models" and, of LSUN, unguided ones.
    "guided_imagenet64": _guided("ImageNet 64 x 64, guided", 2.07, 0.74, 0.63),
    "guided_imagenet128": _guided("ImageNet 128 x 128, guided", 2.97, 0.78, 0.59),
    "guided_imagenet256": _guided("ImageNet 256 x 256, guided", 4.59, 0.82, 0.52),
    "guided_imagenet512": _guided("ImageNet 512 x 512, guided", 7.72, 0.87, 0.42),
    "guided_lsun_bedroom": _guided("unguided", 1.90, 0.66, 0.51),
    "guided_lsun_cat": _guided("unguided", 5.57, 0.63, 0.52),
    "guided_lsun_horse": _guided("unguided", 2.57, 0.71, 0.55),
}


def comparison(name: str, ours: Mapping[str, float | None]) -> str:
    """Formats a table of our scores beside the paper's, with the paper's settings.

    A score of few samples, such as "fid_n2000", keeps its name: it is another quantity
    than the paper's, whose number of samples stands beside it. Metrics that we have not
    computed show "-"; metrics that the paper does not report are left out.

    Args:
        name: a key of `PAPERS`.
        ours: scores by metric; None for one that is not finite.

    Returns:
        The table, in plain text.

    Raises:
        ValueError: for another name.
    """
    if name not in PAPERS:
        raise ValueError(f"reproduces must be one of {tuple(PAPERS)}, got {name!r}.")
    head = ("metric", "ours", "paper", "samples", "setting of the paper")
    table = []
    for row in PAPERS[name]:
        samples = "-" if row.samples is None else f"{row.samples:,}"
        for metric, value in row.values.items():
            found = [k for k in ours if re.fullmatch(rf"{metric}(_n\d+)?", k)]
            for k in found or [metric]:
                own = "-" if ours.get(k) is None else f"{ours[k]:.4g}"
                cells = (k, own, f"{value:g}", samples, row.setting)
                table.append((row.source, cells))
    columns = zip(head, *(line for _, line in table), strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = [f"{name}, ours beside what is reported:", _line(head, widths)]
    for source, group in itertools.groupby(table, lambda pair: pair[0]):
        lines += [f"{source}:", *(_line(cells, widths) for _, cells in group)]
    return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers, setting = cells
    first, *inner, _ = widths
    middle = (f"{cell:>{w}}" for cell, w in zip(numbers, inner, strict=True))
    return "  ".join([f"{name:<{first}}", *middle, setting])
