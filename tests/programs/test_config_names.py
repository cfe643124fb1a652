"""Sample configs by name, `--config digits`: in a clone and where a wheel puts them."""

import importlib
import pathlib
import shutil
import sys

import pytest
from support.programs import convert, run_main, train

import jax_diffusion as jd
from jax_diffusion.config import reading
from jax_diffusion.runtime import checkpoint, logs

NAMES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py"))


def take_modules():
    """Removes modules called configs, of this repository or of a test; returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def no_configs():
    """No module called configs is loaded; those of the session are, afterwards."""
    before = take_modules()
    yield
    take_modules()
    sys.modules.update(before)


@pytest.fixture(params=["clone", "wheel"])
def elsewhere(request, tmp_path, monkeypatch, no_configs):
    """An empty current folder, which is not importable, and a layout of the package."""
    if request.param == "wheel":
        package = tmp_path / "site-packages" / "jax_diffusion"
        shutil.copytree(reading.configs_folder(), package / "configs")
        monkeypatch.setattr(reading, "PACKAGE", package)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    # The test session has this repository on the path. The new list is the test's own,
    # which syspath_prepend would copy into the old one.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not is_repository(p)])
    importlib.invalidate_caches()
    return tmp_path / "mine"


def is_repository(entry):
    return (pathlib.Path(entry) / "configs").is_dir()


def digits_of(seed):
    """The text of digits.py with another seed, by which one knows it again."""
    text = (reading.configs_folder() / "digits.py").read_text()
    return text.replace("config.seed = 0", f"config.seed = {seed}")


@pytest.mark.parametrize("name", NAMES)
def test_every_sample_config_has_a_name(name, elsewhere):
    path, modules = [*sys.path], {*sys.modules}
    by_name = jd.load_config(name, ["--config.total_steps=3"])
    assert by_name.total_steps == 3
    by_path = jd.load_config(reading.configs_folder() / f"{name}.py")
    by_path.total_steps = 3
    assert by_name.to_dict() == by_path.to_dict()
    left = {n for n in {*sys.modules} - modules if n.partition(".")[0] == "configs"}
    assert sys.path == path and not left


def test_modules_of_the_package_are_not_importable_by_their_bare_names(elsewhere):
    folder, before = reading.configs_folder().resolve(), [*sys.path]
    with reading.neighbors_importable(folder / "digits.py"):
        added = sys.path[: len(sys.path) - len(before)]
    in_package = folder.parent == reading.PACKAGE.resolve()
    assert added == [str(folder)] + ([] if in_package else [str(folder.parent)])


def test_a_file_without_suffix_comes_before_the_name_with_a_warning(elsewhere):
    (elsewhere / "digits").write_text(digits_of(7))
    with pytest.warns(UserWarning, match="^config 'digits' is the file of this name"):
        assert jd.load_config("digits").seed == 7
    assert jd.load_config(pathlib.Path("digits")).seed == 7  # a path is no name


def test_a_folder_is_no_config_and_leaves_the_name(elsewhere):
    (elsewhere / "digits").mkdir()
    assert jd.load_config("digits").seed == 0
    with pytest.raises(
        ValueError, match=r"config file or .*, got 'digits', which is no"
    ):
        jd.load_config(pathlib.Path("digits"))


def test_a_file_beside_it_is_a_path_only_with_its_suffix(elsewhere):
    (elsewhere / "digits.py").write_text(digits_of(7))
    assert jd.load_config("digits").seed == 0
    assert jd.load_config("digits.py").seed == 7


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("digts", "got 'digts', where nothing is; did you mean 'digits'?"),
        ("", "got ''."),
        ("configs/digits.py", "got 'configs/digits.py', where nothing is; the sample"),
        ("digits/", "got 'digits/', where nothing is; the sample config is just the"),
        (pathlib.Path("digits"), "the sample config is just the string 'digits'."),
        ("x" * 300, "got 'xxx"),  # which no file can be called
        ("x/" * 3000, "got 'x/x/x"),
        ("dig\0its", r"got 'dig\x00its', where nothing is; did you mean 'digits'?"),
        ("/", "got '/', which is no file."),
    ],
)
def test_what_is_neither_path_nor_name_is_told_in_a_short_sentence(
    given, end, elsewhere
):
    with pytest.raises(ValueError) as info:
        jd.load_config(given)
    text = str(info.value)
    assert text.startswith("config must be the path of a config file or ")
    assert end in text and len(text) <= 300


@pytest.mark.parametrize("given", ["xyzzy", "z" * 90])
def test_a_name_like_none_is_told_as_many_names_as_fit(given, elsewhere):
    with pytest.raises(ValueError) as info:
        jd.load_config(given)
    rule = "config must be the path of a config file or one of "
    told = str(info.value).removeprefix(rule)
    names, got, _ = told.partition(f", got {given!r}, where nothing is.")
    assert len(str(info.value)) <= 300 and got
    shown = names.removesuffix(" ...").rstrip(",").split(", ")
    assert shown == NAMES[: len(shown)] and len(shown) > 5


@pytest.mark.parametrize(
    "text",
    [f"raise KeyError('x' * {n})" for n in (10, 10_000)]
    + ["x = (" * 9000, "\0", "é ="],
)
def test_a_config_that_fails_is_told_in_a_short_sentence(text, elsewhere):
    path = elsewhere / "my config é.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="must be a config file that runs") as info:
        jd.load_config(path.name)
    assert len(str(info.value)) <= 300


@pytest.mark.parametrize(
    "name", ["my config.py", "é.py", "a'b.py", "-x.py", "a.b", "digits.txt", "100%"]
)
def test_a_config_file_may_have_any_name(name, elsewhere):
    (elsewhere / name).write_text(digits_of(7))
    assert jd.load_config(name).seed == 7
    assert jd.load_config(elsewhere / name).seed == 7


def test_private_files_have_no_names(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("__init__", "_base", "one"):
        (folder / f"{name}.py").write_text(digits_of(1))
    monkeypatch.setattr(reading, "PACKAGE", tmp_path)
    assert jd.load_config("one").seed == 1
    for name in ("__init__", "_base"):
        with pytest.raises(ValueError, match=r"or one of one, got"):
            jd.load_config(name)


# What else is called configs


def write_configs(folder, init):
    """A folder `configs` with a digits.py of another seed, perhaps a package."""
    (folder / "configs").mkdir()
    (folder / "configs" / "digits.py").write_text(digits_of(7))
    if init:
        (folder / "configs" / "__init__.py").write_text("read_by = []\n")


@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_sample_configs_import_each_other_beside_a_users_configs(
    init, loaded, elsewhere, monkeypatch
):
    write_configs(elsewhere, init)
    sys.path.insert(0, str(elsewhere))
    if loaded:
        importlib.import_module("configs.digits")
    mine = {n: m for n, m in sys.modules.items() if n.startswith("configs")}
    assert jd.load_config("digits_edm").seed == 0  # it imports digits
    assert jd.load_config("configs/digits.py").seed == 7
    after = {n: m for n, m in sys.modules.items() if n.startswith("configs")}
    assert mine == after and bool(mine) == loaded


def test_sample_configs_import_each_other_beside_a_module_configs(
    elsewhere, monkeypatch
):
    (elsewhere / "configs.py").write_text("digits = None\n")
    sys.path.insert(0, str(elsewhere))
    module = importlib.import_module("configs")
    assert jd.load_config("digits_edm").objective.weighting == "edm"
    assert sys.modules["configs"] is module


def test_a_package_configs_that_is_loaded_keeps_its_name_for_its_own_files(
    elsewhere, monkeypatch
):
    write_configs(elsewhere, True)
    text = "from configs import digits, read_by\n\nread_by.append('other')\n"
    text += "get_config = digits.get_config\n"
    (elsewhere / "configs" / "other.py").write_text(text)
    sys.path.insert(0, str(elsewhere))
    module = importlib.import_module("configs")
    assert jd.load_config("configs/other.py").seed == 7
    assert sys.modules["configs"] is module and module.read_by == ["other"]


@pytest.mark.parametrize("folder", [".", "configs"])
def test_a_config_of_ones_own_begins_with_a_sample_config(folder, elsewhere):
    (elsewhere / folder).mkdir(exist_ok=True)
    path = elsewhere / folder / "mine.py"
    path.write_text(
        "import jax_diffusion as jd\n\n\ndef get_config():\n"
        "    config = jd.load_config('digits_edm')\n    config.seed = 9\n"
        "    config.model.dtype = 'bfloat16'\n    return config\n"
    )
    config = jd.load_config(path, ["--config.total_steps=3"])
    assert (config.seed, config.total_steps, config.model.dtype) == (9, 3, "bfloat16")
    assert config.objective.weighting == "edm"


def test_a_config_inside_a_clone_imports_configs(tmp_path, no_configs):
    clone = tmp_path / "clone"
    shutil.copytree(reading.configs_folder(), clone / "configs")
    (clone / "configs" / "digits.py").write_text(digits_of(7))  # edited there
    (clone / "experiments").mkdir()
    path = clone / "experiments" / "mine.py"
    path.write_text("from configs import digits\n\nget_config = digits.get_config\n")
    assert jd.load_config(path).seed == 7
    assert jd.load_config(clone / "configs" / "digits_edm.py").seed == 7


# Programs


def test_convert_takes_the_name_of_a_config(tmp_path, monkeypatch):
    told = ["--checkpoint", "x.pt", "--workdir", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=r"x\.pt"):  # the config is found before
        run_main(monkeypatch, convert, *told, "--config", "digits")
    with pytest.raises(ValueError, match=r"^--config must be .* did you mean 'digits'"):
        run_main(monkeypatch, convert, *told, "--config", "digts")


def test_a_run_of_a_name_is_resumed_by_the_path(tmp_path, monkeypatch):
    package, workdir = tmp_path / "jax_diffusion", tmp_path / "run"
    shutil.copytree(reading.configs_folder(), package / "configs")
    path = package / "configs" / "short.py"
    path.write_text("from support.tiny import get_config as get_config\n")
    monkeypatch.setattr(reading, "PACKAGE", package)
    for steps, given in enumerate(("short", path), start=1):
        flags = ("--config", given, "--workdir", workdir)
        run_main(monkeypatch, train, *flags, f"--config.total_steps={steps}")
        assert checkpoint.latest_step(workdir) == steps
    starts = [start["config"] for start in logs.read_descriptions(workdir)]
    assert [config.pop("total_steps") for config in starts] == [1, 2]
    assert starts[0] == starts[1]
    other = ("--config.seed=5", "--config.total_steps=3")
    with pytest.raises(ValueError, match="seed: 0 -> 5"):
        run_main(monkeypatch, train, *flags, *other)
