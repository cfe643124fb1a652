"""What the README says can be done, can be done."""

import importlib
import pathlib
import re

import numpy as np
import pytest
from support.tiny_runs import make_run

from jax_diffusion import data, models, samplers, schedules, spacing, timesteps
from jax_diffusion.evaluation import METRICS, NETWORK_METRICS

README = pathlib.Path("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
PAGES = ("README.md", "CONTRIBUTING.md", "tests/benchmarks/README.md")


def run_block(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_readme_is_short():
    assert README.count("\n") <= 180


@pytest.mark.slow
def test_python_block_of_a_run_samples_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits = dict(name="digits", split="train", batch_size=64)
    schedule = dict(name="cosine", num_steps=50)
    workdir = pathlib.Path("runs/digits")
    make_run(workdir, shape=(8, 8, 1), data=digits, schedule=schedule)
    block = next(block for block in BLOCKS if "runs/digits" in block)
    names = run_block(block)
    assert names["images"].shape == (100, 8, 8, 1) and names["images"].dtype == np.uint8
    assert {"pixel_distance", "bits_per_dim"} <= {x.metric for x in names["results"]}
    out = capsys.readouterr().out.split()
    assert out.count("pixel_distance") >= 2 and "bits_per_dim" in out


def test_python_block_of_the_core_draws_images():
    (block,) = [block for block in BLOCKS if "runs/digits" not in block]
    names = run_block(block)
    assert names["images"].shape == (4, 8, 8, 1)
    assert np.isfinite(names["images"]).all()
    assert names["terms"].loss.shape == (4,)


def test_start_has_two_blocks_of_one_command_line_each():
    section = README.split("## Start")[1].split("\n## ")[0]
    assert "git clone" in section.split("```")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert "jax_diffusion.train" in blocks[0] and "pytest" in blocks[1]
    assert all(block.startswith("python3 -m venv .venv && ") for block in blocks)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    text, folder = pathlib.Path(page).read_text(), pathlib.Path(page).parent
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link
    for link in re.findall(r"`((?:configs|tests|jax_diffusion)/[\w/.]+)`", text):
        assert pathlib.Path(link).exists(), link


def test_table_of_results_has_every_config():
    section = README.split("## Results")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(\w+\.py)`", section))
    assert listed == {path.name for path in pathlib.Path("configs").glob("*.py")}


def test_table_of_methods_names_what_exists():
    section = README.split("## Methods")[1].split("\n## ")[0]
    tables = [samplers.SAMPLERS, schedules.BETAS, spacing.SPACINGS, models.MODELS]
    tables += [timesteps.TIMESTEP_SAMPLERS, timesteps.LEVEL_SAMPLERS]
    tables += [METRICS, NETWORK_METRICS, data.DATASETS]
    listed = set().union(*tables)
    rows = [line.split("|") for line in section.splitlines() if line[:2] == "| "][2:]
    assert rows
    for *_, where, _ in rows:
        for part in where.split(";"):
            path, *names = re.findall(r"`([^`]+)`", part)
            link = re.match(r" ?\[`[^`]+`\]\(([^)]+)\)", part)
            assert link and link[1] == f"jax_diffusion/{path}", path
            assert pathlib.Path(link[1]).exists(), path
            module = path.removesuffix(".py").strip("/").replace("/", ".")
            known = listed | set(
                dir(importlib.import_module(f"jax_diffusion.{module}"))
            )
            assert names and set(names) <= known, (path, names)


def test_every_module_of_the_package_is_linked_to_its_source():
    section = README.split("## Methods")[1].split("\n## ")[0]
    linked = {
        pathlib.Path(link).parts[1] for link in re.findall(r"\]\((.+?)\)", section)
    }
    package = pathlib.Path("jax_diffusion")
    modules = {path.name for path in package.iterdir() if path.suffix == ".py"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert linked == modules - {"__init__.py", "__main__.py"}


def test_table_of_methods_has_every_sampler_and_network():
    section = README.split("## Methods")[1].split("\n## ")[0]
    old_names = {"encoder"}
    for name in {*samplers.SAMPLERS, *models.MODELS} - old_names:
        assert f"`{name}`" in section, name
