"""The wheel, the sdist and an editable install, each in an environment of its own.

An environment has what pip has installed into it, and else the libraries of the one
that runs the tests: nothing is downloaded.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

import jax_diffusion

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
PIP = (sys.executable, "-m", "pip")
OFFLINE = ("--no-deps", "--no-index", "--quiet")
TINY = ("--config.model.channels=8", "--config.model.num_res_blocks=0")
TINY += ("--config.model.multipliers=(1,)", "--config.model.attention_resolutions=()")
TINY += ("--config.schedule.num_steps=10", "--config.sampling.steps=2")


def call(*command, cwd):
    """Runs a command without this repository on its path; returns what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source, folder):
    call(
        *(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, source),
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder, *told):
    """Installs what pip is told into a new environment; returns its folder bin."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(call(python, "-c", query, cwd=folder).strip())
    (own / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    # The environment that runs the tests may have the package already.
    install = ("--python", python, "install", "--ignore-installed")
    call(*PIP, *install, *OFFLINE, *told, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def contents(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_wheel_has_the_package_its_types_and_the_sample_configs(wheel):
    files = [p for p in (ROOT / "jax_diffusion").rglob("*") if p.is_file()]
    files = {str(p.relative_to(ROOT)) for p in files if p.parent.name != "__pycache__"}
    wanted = files | {f"jax_diffusion/configs/{name}" for name in CONFIGS}
    assert contents(wheel) == wanted
    for part in ("py.typed", "models/unet.py", "data/folder.py", "metrics/fid.py"):
        assert f"jax_diffusion/{part}" in wanted
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [n for n in opened.namelist() if n.endswith("/METADATA")]
        about = opened.read(name).decode()
    assert f"\nVersion: {jax_diffusion.__version__}\n" in about
    assert "\nClassifier: Typing :: Typed\n" in about


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    call(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "sdist",
        "-d",
        tmp_path,
        cwd=ROOT,
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "CITATION.cff", "configs/digits.py"} <= names
    again = build_wheel(sdist, tmp_path)
    assert again.name == wheel.name and contents(again) == contents(wheel)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder bin of an environment that has the wheel."""
    return make_environment(tmp_path_factory.mktemp("environment"), wheel)


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """The folder bin of an environment that has this repository."""
    folder = tmp_path_factory.mktemp("editable")
    return make_environment(folder, "--no-build-isolation", "-e", ROOT)


@pytest.mark.slow
def test_wheel_trains_resumes_and_samples_a_sample_config(installed, tmp_path):
    flags = ("--config", "digits", "--workdir", "x", *TINY, "--config.total_steps")
    module = ("python", "-m", "jax_diffusion.train")
    for (program, *rest), steps in ((module, 2), (("jax-diffusion", "train"), 3)):
        out = call(installed / program, *rest, *flags, steps, cwd=tmp_path)
        assert (tmp_path / "x" / "samples" / f"{steps:06}.png").exists(), out
    told = ("--workdir", "x", "--out", "pictures.npz", "--n", 4, "--steps", 2)
    call(installed / "jax-diffusion", "sample", *told, cwd=tmp_path)
    with np.load(tmp_path / "pictures.npz") as found:
        images = found["arr_0"]
    assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 4
    starts = re.findall(r'"command": "(.*?) --', (tmp_path / "x/run.json").read_text())
    assert starts == ["python -m jax_diffusion.train", "jax-diffusion train"]


LOAD_ALL = """
import sys, configs, jax_diffusion as jd
from pathlib import Path

print(Path(jd.__file__).parent)
assert configs.mine and len({jd.load_config(name).seed for name in sys.argv[1:]}) == 1
assert jd.load_config("configs/digits.py").seed == 7 and configs.mine
assert not {"train", "digits", "configs.digits"} & {*sys.modules}
try:
    jd.load_config("digts")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["installed", "editable"])
def test_names_work_outside_the_clone_beside_another_package_configs(
    kind, tmp_path, request
):
    folder = request.getfixturevalue(kind)
    digits = (ROOT / "configs" / "digits.py").read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("mine = True\n")
    text = digits.replace("config.seed = 0", "config.seed = 7")
    (tmp_path / "configs" / "digits.py").write_text(text)
    names = [name.removesuffix(".py") for name in CONFIGS]
    out = call(folder / "python", "-c", LOAD_ALL, *names, cwd=tmp_path)
    place, error = out.splitlines()
    inside = ROOT if kind == "editable" else folder.parent
    assert Path(place).is_relative_to(inside)
    assert error.endswith("got 'digts', where nothing is; did you mean 'digits'?")
    version = call(folder / "jax-diffusion", "--version", cwd=tmp_path)
    assert version == f"jax_diffusion {jax_diffusion.__version__}\n"


@pytest.mark.slow
def test_wheel_reads_the_configs_of_a_clone_by_their_paths(installed):
    for name in ("configs/digits_edm.py", "digits_edm"):
        flags = ("--config", name, "--check-data")
        out = call(installed / "jax-diffusion", "train", *flags, cwd=ROOT)
        assert out.endswith("All images can be read.\n")


def test_what_is_said_of_the_package_agrees():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {jax_diffusion.__version__}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    (author,) = project["authors"]
    assert f"  - name: {author['name']}\n" in citation
    minor = [
        text.rpartition(" ")[2]
        for text in project["classifiers"]
        if re.search(r":: 3\.\d", text)
    ]
    assert project["requires-python"] == f">={minor[0]}"
    assert f"Python {' or '.join(minor)}." in (ROOT / "README.md").read_text()
