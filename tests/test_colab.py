"""Notebooks run from top to bottom on small budgets, and their claims hold."""

import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import nbformat
import pytest
from support import notebooks

from jax_diffusion.runtime import cpu


class Notebook(NamedTuple):
    """How a notebook is run here.

    Attributes:
        budgets: what its cell of budgets is replaced by.
        claims: bounds of the values of expressions, with the notebook's names, in the
            end. They must hold on these budgets, and fail if what is taught is wrong.
    """

    budgets: dict[str, int]
    claims: dict[str, tuple[float, float]]


ANY = float("inf")
NOTEBOOKS = {
    "quickstart": Notebook(
        budgets=dict(NUM_STEPS=60, RUN_STEPS=60, CHANNELS=8, NUM_LEVELS=1)
        | dict(NUM_IMAGES=64, NUM_SCORED=65, NUM_HELD_OUT=16),
        claims={  # untrained networks need about 8 bits/dim, and the prior is none
            "total": (1, 7.5),
            "scores['bits_per_dim']": (1, 7.5),
            "np.mean(bits.prior)": (0, 1e-3),
            "images.std() / run_data.std()": (0.5, 2),
        },
    ),
    "ddpm_from_scratch": Notebook(
        budgets=dict(NUM_STEPS=80, CHANNELS=8, NUM_IMAGES=12, NUM_HELD_OUT=16),
        claims={
            "float32_error": (1.6e-4, 1.7e-4),
            "left['T = 200, as in the tutorial'][-1] ** 2": (0.1321, 0.1322),
            "bayes_error": (0, 1e-3),
            "lowest": (348, 348),
            "published": (2_996_315, 2_996_315),  # parameters of the tutorial's network
            "difference": (0, 1e-3),  # of our sampler and the library's, pixel by pixel
            "spreads['multiplied']": (0, 0.02),
            "spreads['clipped'] / spreads['data']": (0.5, 2),
            "total": (1, 7.5),
            "changed[1000]": (13, 13),
            "changed[4000]": (296, 296),
        },
    ),
    "improved_ddpm": Notebook(
        budgets=dict(NUM_STEPS=80, CHANNELS=8, NUM_LEVELS=1)
        | dict(NUM_IMAGES=80, NUM_HELD_OUT=16),
        claims={
            "impossible": (496, 496),  # betas of the misprint
            "max(map(abs, extra['best']))": (0, 1e-9),  # no bits above the least
            "extra['large'][0]": (0.05, ANY),
            "extra['small'][0]": (0.1, ANY),
            "max(gradient_errors)": (0, 1e-6),
            "spread['uniform'] / spread['importance']": (1.5, ANY),
            "abs(off)": (0, 5),  # standard errors
            "max(totals.values())": (1, 8),
            "late['vlb, uniform'].std() / late['vlb'].std()": (2, ANY),
        },
    ),
    "samplers": Notebook(
        budgets=dict(NUM_POINTS=1024, NUM_STEPS=60, CHANNELS=8, NUM_LEVELS=1)
        | dict(NUM_IMAGES=6, NUM_INVERTED=16),
        claims={
            "crossings['DDIM, eta = 0']": (0, 0),
            "crossings['DDPM']": (5, ANY),
            "orders['ddim']": (0.9, 1.1),
            "orders['dpmpp_2m']": (1.8, 2.2),
            "orders['heun']": (1.8, 2.2),
            "widths[0.5]['DDPM, right'][0]": (0.89, 1.11),  # five standard errors
            "widths[0.1]['DDPM, large'][0]": (3.4, 4.4),
            "widths[0.1]['DDIM, eta = 0'][0]": (0.31, 0.4),
            "widths[0.1]['DDIM, eta = 1'][1] / widths[0.1]['DDPM, small'][1]": (
                0.999,
                1.001,
            ),
            "reconstruction[0] / reconstruction[-1]": (100, ANY),
            "distances['ddim'][-1] / distances['dpmpp_2m'][-1]": (3, ANY),
            "norms['slerp'] / norms['straight']": (1.2, 1.6),  # the root of 2
        },
    ),
    "guidance_and_editing": Notebook(
        budgets=dict(NUM_STEPS=60, NUM_CLASSIFIER_STEPS=60, CHANNELS=8)
        | dict(SAMPLING_STEPS=5, EDITING_STEPS=20, NUM_IMAGES=40, NUM_EDITED=24),
        claims={
            "off_nowhere": (0, 2),
            "contrasts[0.0][-1] - contrasts[1.0][-1]": (0.005, 1),
            "off_known": (0, 1),
            "hues_off['RePaint'] / hues_off['replaced']": (0, 1),
            "away[-1] / away[0]": (1.2, 99),
            "off_gray": (0, 4),
            "misfit['DPS'] / misfit['not guided']": (0, 0.5),
            "off_label": (0, 1),
            "off_unguided": (0, 2),
            "np.abs(by_classifier[10] / 255 - by_classifier[0] / 255).mean()": (
                0.02,
                1,
            ),
        },
    ),
    "evaluation": Notebook(
        budgets=dict(NUM_STEPS=80, CHANNELS=8, NUM_FEATURE_STEPS=100, NUM_SAMPLES=200)
        | dict(NUM_REPEATS=4, NUM_LIKELIHOODS=8, ODE_STEPS=60),
        claims={
            "growth": (1.5, 4),  # with a half or a third of the images
            "kid_of_real": (0, 0.3),
            "by_method['pixels']['bilinear'] / by_method['pixels']['untouched']": (
                2,
                ANY,
            ),
            "by_method['pixels']['half mirrored'] / by_method['pixels']['untouched']": (
                4,
                ANY,
            ),
            "by_split['pixels']['test'] / by_split['pixels']['train']": (1.2, ANY),
            "by_split['pixels']['matched'] / by_split['pixels']['test']": (0.8, 1.3),
            "of_copies['copycat'] / of_copies['real']": (0, 0.6),
            "np.median(near['copycat']) / np.median(near['test'])": (0, 0.6),
            "of_moments / of_model": (0, 0.7),
            "table['Gaussian']['classifier'] / table['real images']['classifier']": (
                2,
                ANY,
            ),
            "table['digits 0 to 4']['recall'] / table['real images']['recall']": (
                0,
                0.7,
            ),
            "table['blurred']['precision'] / table['real images']['precision']": (
                0,
                0.85,
            ),
            "total": (1, 8),
            "by_ode": (1, 10),  # hundreds where the flow is not finite
            "flow.step_error.mean()": (0, 0.1),
            "correlation": (0.2, 1),
            "np.diff(rate).max()": (-1, 1e-6),
            "rate[0] + bits.vlb[:, 0].mean() - total": (-1e-4, 1e-4),
        },
    ),
    "your_own_images": Notebook(
        budgets=dict(NUM_DRAWN=20, IMAGE_SIZE=8, CHANNELS=8)
        | dict(NUM_FIRST=5, NUM_STEPS=80, NUM_SAMPLES=2),
        claims={
            "images.num_examples": (60, 60),
            "len(complaints)": (1, 1),
            "resumed.step": (10, 10),
            "differing": (0, 0),
            "run.step": (80, 80),
            "log[-1]['loss'] / log[0]['loss']": (0, 0.9),
            "copy_distance": (0.5, ANY),
        },
    ),
    "released_checkpoints": Notebook(
        budgets=dict(CHANNELS=32, NUM_RES_BLOCKS=1, NUM_STEPS=20, NUM_IMAGES=4),
        claims={
            "counted == COUNTS['cifar10_uncond_50M_500K']": (1, 1),
            "sum(same) / len(stand_in)": (1, 1),
            "len(again) - len(stand_in)": (0, 0),
            "np.mean(noise != digits)": (0.2, 1),
            "np.array_equal(digits, redrawn)": (1, 1),
            "np.array_equal(digits, by_file)": (1, 1),
            "len(refusals)": (4, 4),
            "Path('owned.txt').exists()": (0, 0),
        },
    ),
    "research": Notebook(
        budgets=dict(NUM_UPDATES=300, NUM_PARTICLES=400, NUM_REWARDS=10, NUM_PATHS=64),
        claims={
            "off_samples / off_noise": (0, 0.5),
            "estimate / evidence": (0.7, 1.3),
            "share['twisted SMC'] - share['exact']": (-0.15, 0.15),
            "spread['DPS'] / spread['exact']": (0, 0.7),
            "slope / by_difference": (0.95, 1.05),
            "sides['after'] - sides['before']": (0.05, 1),
            "min((off[:, 0] / off[:, -1]).min() for off in errors.values())": (1.5, 99),
            "off_alone": (0, 1e-3),
            "len(x.sharding.device_set)": (8, 8),
            "off_devices": (0, 1e-3),
            "together['loss'] / alone['loss']": (0.9999, 1.0001),
        },
    ),
}
REPOSITORY = "OWNER/REPO"  # until the project has a public address

every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def code_cells(name):
    cells = notebooks.read(name).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_every_notebook_is_run():
    assert {path.stem for path in notebooks.FOLDER.glob("*.ipynb")} == {*NOTEBOOKS}


@every_notebook
def test_notebooks_are_valid_and_stripped(name):
    nbformat.validate(notebooks.read(name))
    for cell in code_cells(name):
        assert not cell.outputs and cell.execution_count is None, "commit it stripped"


@every_notebook
def test_notebooks_begin_with_a_title_a_badge_and_the_cell_that_installs(name):
    first, second, *_ = notebooks.read(name).cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    badge = notebooks.BADGE.search(first.source)
    assert badge is not None and badge["name"] == name
    assert badge["repository"] == REPOSITORY
    assert second == notebooks.begun_by(notebooks.read("quickstart"), notebooks.INSTALL)


@every_notebook
def test_words_stand_between_cells_of_code(name):
    kinds = [cell.cell_type for cell in notebooks.read(name).cells]
    assert ("code", "code") not in [*itertools.pairwise(kinds)]


@every_notebook
def test_budgets_are_those_of_the_notebook_and_smaller(name):
    notebook, small = notebooks.read(name), NOTEBOOKS[name].budgets
    written = notebooks.budgets(notebook)
    assert written.keys() == small.keys()
    assert all(small[key] <= written[key] for key in small)
    assert small.keys() <= notebooks.names_read(notebook), "a budget of nothing"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the kernel's client is not ours
@every_notebook
def test_notebook_runs_its_claims_hold_and_its_plots_have_titles(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", f"{notebooks.ROOT}:{notebooks.ROOT / 'tests'}")
    monkeypatch.setenv("MPLBACKEND", "agg")  # figures stay open, to be looked at
    small, claims = NOTEBOOKS[name]
    values, figures = notebooks.run(notebooks.read(name), small, claims, tmp_path)
    print(values)
    assert claims and figures
    for text, (low, high) in claims.items():
        assert low <= values[text] <= high, text
    assert [lacking for lacking in figures.values() if lacking] == []


def test_badges_get_the_address_of_a_fork_by_the_command_of_contributing(tmp_path):
    text = Path("CONTRIBUTING.md").read_text()
    (command,) = re.findall(r"sed -i .* colab/\*\.ipynb", text)
    assert f"s#{REPOSITORY}#" in command
    shutil.copytree(notebooks.FOLDER, tmp_path / "colab")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    for path in (tmp_path / "colab").glob("*.ipynb"):
        assert notebooks.BADGE.search(path.read_text())["repository"] != REPOSITORY
        assert REPOSITORY not in path.read_text()


class Installing:
    """The cell that installs, run here, where nothing is installed in truth."""

    def __init__(self, monkeypatch, *, missing=(), gpu=False):
        from IPython.core.inputtransformer2 import TransformerManager

        cell = notebooks.begun_by(notebooks.read("quickstart"), notebooks.INSTALL)
        self.source = TransformerManager().transform_cell(cell.source)
        self.commands, self.calls = [], []
        find, which = importlib.util.find_spec, shutil.which
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: None if n in missing else find(n)
        )
        monkeypatch.setattr(
            shutil, "which", lambda n: gpu or None if n == "nvidia-smi" else which(n)
        )
        monkeypatch.setattr(cpu, "tune", lambda: self.calls.append("tune"))
        monkeypatch.setattr(jax, "devices", lambda: self.calls.append("devices") or [1])

    def run_line_magic(self, name, line):
        """Stands in for IPython's, which writes names of the notebook into a line."""
        self.commands.append(f"{name} {line.format(**self.names)}")

    def __call__(self, source=None):
        self.names = {"get_ipython": lambda: self}
        code = self.source
        if source is not None:
            code = re.sub("^SOURCE = .*", f"SOURCE = {source!r}", code, flags=re.M)
        exec(compile(code, "install", "exec"), self.names)
        assert self.calls == ["tune", "devices"]
        return self.commands


def test_installing_does_nothing_where_the_package_can_be_imported(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Installing(monkeypatch)() == []
    assert "No accelerator" not in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["jax_diffusion", "optax"])
@pytest.mark.parametrize("folder", [notebooks.ROOT, notebooks.FOLDER])
def test_installing_takes_the_clone_that_the_notebook_lies_in(
    folder, missing, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    commands = Installing(monkeypatch, missing={missing})()
    assert commands == [f'pip install -q "{notebooks.ROOT}"']
    assert "No accelerator" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", [False, True])
def test_installing_takes_an_address_or_a_folder_and_the_extra_of_a_gpu(
    gpu, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    address, extra = "git+https://example.org/x/y", "[cuda]" if gpu else ""
    install = Installing(monkeypatch, missing={"jax_diffusion"}, gpu=gpu)
    # Without an extra, pip gets what was given: an old one refuses `@ git+file:///...`.
    package = f"jax_diffusion{extra} @ {address}" if gpu else address
    assert install(address) == [f'pip install -q "{package}"']
    install = Installing(monkeypatch, missing={"jax_diffusion"}, gpu=gpu)
    assert install(str(notebooks.ROOT)) == [f'pip install -q "{notebooks.ROOT}{extra}"']


@pytest.mark.parametrize("source", [None, "nowhere"])
def test_installing_says_what_to_set_where_there_is_no_clone(
    source, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="SOURCE must be the address"):
        Installing(monkeypatch, missing={"jax_diffusion"})(source)
