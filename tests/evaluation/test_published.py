"""What papers report: relations that they state in words, and the table we print."""

import importlib
import itertools
import re

import pytest

from jax_diffusion.evaluation import published as papers
from jax_diffusion.evaluation.published import PAPERS
from jax_diffusion.interop import released

PLAUSIBLE = {  # lowest and highest
    "fid": (1, 100),
    "inception_score": (1, 300),
    "precision": (0, 1),
    "recall": (0, 1),
    "bits_per_dim": (0, 8),  # 8 bits without any model
    "kl": (0, 8),
    "decoder": (0, 8),
    "rmse": (0, 255),
}
every_paper = pytest.mark.parametrize("name", PAPERS)


def only(name, metric):
    """The one value of a metric that a name has."""
    (value,) = (r.values[metric] for r in PAPERS[name] if metric in r.values)
    return value


@every_paper
def test_every_number_has_a_source_and_could_be_one(name):
    assert PAPERS[name]
    for row in PAPERS[name]:
        assert row.values and row.setting
        assert row.source.endswith("transcribed")
        assert "arXiv:" in row.source or "README" in row.source
        for metric, value in row.values.items():
            low, high = PLAUSIBLE[metric]
            assert low < value < high
        of_samples = {"fid", "inception_score", "precision", "recall"}
        assert row.samples is None or {*row.values} <= of_samples


# Relations that the papers state


def test_the_parts_of_a_code_add_up_to_its_length():
    whole, kl, decoder = (
        only("ddpm_cifar10", k) for k in ("bits_per_dim", "kl", "decoder")
    )
    assert abs(kl + decoder - whole) < 0.015  # of three rounded numbers
    assert (
        decoder > whole / 2
    )  # "more than half ... describe imperceptible distortions"


@pytest.mark.parametrize("data", ["cifar10", "imagenet64"])
def test_the_bound_alone_has_better_bits_and_worse_samples_than_the_hybrid(data):
    hybrid, vlb = f"iddpm_{data}_hybrid", f"iddpm_{data}_vlb"
    assert only(vlb, "bits_per_dim") < only(hybrid, "bits_per_dim")
    assert only(vlb, "fid") > 2 * only(hybrid, "fid")


def test_improved_ddpm_has_better_bits_than_ddpm():
    before = only("ddpm_cifar10", "bits_per_dim")
    assert only("iddpm_cifar10_hybrid", "bits_per_dim") < before


@pytest.mark.parametrize(
    "name", ["ddpm_cifar10", "ddim_celeba64", "ddpm_lsun_bedroom", "ddpm_lsun_church"]
)
def test_ddim_is_better_the_more_steps_it_takes(name):
    rows = [row for row in PAPERS[name] if "DDIM in" in row.setting]
    steps = [int(row.setting.split("DDIM in ")[1].split()[0]) for row in rows]
    fids = [row.values["fid"] for row in rows]
    assert len(rows) >= 4 and steps == sorted(set(steps))
    assert all(a > b for a, b in itertools.pairwise(fids))


def test_ddim_is_marginally_worse_than_ddpm_where_both_take_all_steps():
    ddpm, *_, ddim = (
        r.values["fid"] for r in PAPERS["ddpm_cifar10"] if "fid" in r.values
    )
    assert ddpm < ddim < ddpm + 1


def test_guidance_of_larger_images_trades_recall_for_precision():
    pure = [f"guided_imagenet{size}" for size in (64, 128, 256, 512)]
    precisions = [only(name, "precision") for name in pure]
    recalls = [only(name, "recall") for name in pure]
    assert precisions == sorted(precisions) and recalls == sorted(recalls)[::-1]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("cifar10", "ddpm_cifar10"),
        ("cifar10_hybrid", "iddpm_cifar10_hybrid"),
        ("cifar10_vlb", "iddpm_cifar10_vlb"),
        ("imagenet64", "iddpm_imagenet64_hybrid"),
    ],
)
def test_configs_say_the_same_of_their_papers(config, name):
    text = importlib.import_module(f"configs.{config}").__doc__
    said = text.split("The paper has ")[1]
    fid = re.search(r"FID ([\d.]*\d)", said)[1]
    bits = re.search(r"([\d.]+) bits/dim", said)[1]
    fids = [r.values["fid"] for r in PAPERS[name] if "fid" in r.values]
    assert (float(fid), float(bits)) == (fids[0], only(name, "bits_per_dim"))


# The table


def test_every_metric_of_the_paper_has_a_line_with_ours_or_a_dash():
    text = papers.comparison("iddpm_cifar10_vlb", {"bits_per_dim": 3.14159})
    lines = text.splitlines()
    assert "iddpm_cifar10_vlb" in lines[0]
    assert lines[1].split()[:4] == ["metric", "ours", "paper", "samples"]
    assert lines[2].endswith("transcribed:") and "2102.09672" in lines[2]
    assert [line.split()[:4] for line in lines[3:]] == [
        ["fid", "-", "11.47", "50,000"],
        ["bits_per_dim", "3.142", "2.94", "-"],
    ]
    assert all("L_vlb" in line for line in lines[3:])


def test_a_score_of_few_samples_keeps_its_name_beside_the_papers_number_of_them():
    ours = {"fid_n2000": 30.0, "pixel_distance": 1.0, "sfid_n2000": 2.0, "kid": 3.0}
    lines = papers.comparison("iddpm_imagenet64_hybrid", ours).splitlines()
    assert [line.split()[:4] for line in lines[3:]] == [
        ["fid_n2000", "30", "19.2", "10,000"],
        ["bits_per_dim", "-", "3.57", "-"],
    ]


@every_paper
def test_the_columns_of_a_table_stand_below_each_other(name):
    ours = {"fid_n2000": 123.456, "fid": 3.0}
    head, *lines = papers.comparison(name, ours).splitlines()[1:]
    cells = [line for line in lines if not line.endswith("transcribed:")]
    column = head.index("setting of the paper")
    settings = {row.setting for row in PAPERS[name]}
    assert {line[column:] for line in cells} == settings
    assert {line[column - 2 : column] for line in cells} == {"  "}
    sources = [line.removesuffix(":") for line in lines if line not in cells]
    assert sources == [*dict.fromkeys(row.source for row in PAPERS[name])]


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"one of \('ddpm_cifar10', .* got 'cifar'\.$"):
        papers.comparison("cifar", {})


def test_released_checkpoints_have_their_papers():
    assert set(released.REPRODUCES) <= set(released.RELEASED)
    assert set(released.REPRODUCES.values()) <= set(PAPERS)
