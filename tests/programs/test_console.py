"""`jax-diffusion PROGRAM` and `python -m jax_diffusion PROGRAM`: the parser, --help."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import programs

import jax_diffusion
from jax_diffusion import __main__ as console
from jax_diffusion import cli
from jax_diffusion.runtime import logs

SCRIPT = "/somewhere/bin/jax-diffusion"
MODULE = "/somewhere/jax_diffusion/__main__.py"
STARTED = {SCRIPT: "jax-diffusion", MODULE: "python -m jax_diffusion"}


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """The options of this process and its path stay as they are."""
    monkeypatch.setattr(cli.cpu, "tune", lambda: None)
    monkeypatch.setattr(sys, "path", [*sys.path])


def outcome(monkeypatch, capsys, *argv):
    """Exit status, stdout and stderr of a command line; 0 if it returns."""
    monkeypatch.setattr(sys, "argv", [*argv])
    status = 0
    try:
        console.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_installed_script_is_main():
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert list(scripts) == [console.SCRIPT]
    module, _, function = scripts[console.SCRIPT].partition(":")
    assert getattr(importlib.import_module(module), function) is console.main


@pytest.mark.parametrize(("argv0", "called"), STARTED.items())
@pytest.mark.parametrize("flags", [(), ("-h",), ("--help",)])
def test_help_lists_the_programs(argv0, called, flags, monkeypatch, capsys):
    status, out, _ = outcome(monkeypatch, capsys, argv0, *flags)
    assert status == 0 and out.startswith(f"usage: {called} PROGRAM [flags]\n")
    joint = " " if argv0 == SCRIPT else "."
    for name, what in console.PROGRAMS.items():
        (line,) = [line for line in out.splitlines() if line.endswith(what)]
        assert line.split("  ")[2] == f"{called}{joint}{name}"


@pytest.mark.parametrize(("argv0", "called"), STARTED.items())
@pytest.mark.parametrize("name", console.PROGRAMS)
def test_help_of_a_program_names_how_it_was_started(
    name, argv0, called, monkeypatch, capsys
):
    status, out, _ = outcome(monkeypatch, capsys, argv0, name, "--help")
    assert status == 0 and out.startswith(f"usage: {called} {name} [flags]\n")
    first_line = importlib.import_module(f"jax_diffusion.{name}").__doc__.split("\n")[0]
    assert first_line in out and "--workdir" in out
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        getattr(programs, name).main()
    usage = f"usage: python -m jax_diffusion.{name} [flags]\n"
    assert capsys.readouterr().out == out.replace(out.splitlines(True)[0], usage)


@pytest.mark.parametrize("flags", [(), *([name] for name in console.PROGRAMS)])
def test_version_is_that_of_the_package(flags, monkeypatch, capsys):
    status, out, _ = outcome(monkeypatch, capsys, SCRIPT, *flags, "--version")
    assert (status, out) == (0, f"jax_diffusion {jax_diffusion.__version__}\n")


@pytest.mark.parametrize("argv0", STARTED)
@pytest.mark.parametrize(
    ("flags", "end"),
    [
        (("trian", "--workdir", "x"), "got 'trian'; did you mean 'train'?"),
        (("digits",), "got 'digits'."),
        (("--workdir", "x", "train"), "got '--workdir'."),
        (("jax_diffusion.sample",), "got 'jax_diffusion.sample'."),
        (("",), "got ''."),
    ],
)
def test_an_unknown_program_is_one_sentence(flags, end, argv0, monkeypatch, capsys):
    status, out, err = outcome(monkeypatch, capsys, argv0, *flags)
    rule = f"error: the first argument must be one of {sorted(console.PROGRAMS)}, "
    assert (status, out, err) == (2, "", f"{rule}{end}\n")


def test_an_unknown_program_is_told_without_loading_the_libraries_of_training():
    code = (
        "import sys\nfrom jax_diffusion import __main__\n"
        "sys.argv = ['jax-diffusion', 'trian']\n"
        "try:\n    __main__.main()\nexcept SystemExit as stop:\n"
        "    print(stop.code, 'flax' in sys.modules, 'orbax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "2 False False\n", done.stderr


@pytest.mark.parametrize("argv0", STARTED)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("train", "--config"), "--config: expected one argument"),
        (("train", "--workdir", "x"), "arguments are required: --config"),
        (("train", "--config", "no", "--workdir", "x"), "--config must be the path"),
        (("sample", "--workdir", "no", "--n", "x"), "--n must be an integer >= 1"),
        (
            ("sample", "--workdir", "x", "--stepz", "3"),
            "no flag '--stepz'; did you mean '--steps'?",
        ),
        (("evaluate",), "--workdir must be given, or both --images and --reference"),
        (("convert", "--workdir", "x"), "one of --checkpoint and --to must be given"),
    ],
)
def test_errors_of_programs_are_theirs(
    flags, sentence, argv0, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    status, _, err = outcome(monkeypatch, capsys, argv0, *flags)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err


def test_a_config_imports_from_the_current_folder_as_under_python_m(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "imported_from_here.py").write_text("from configs.digits import *\n")
    deep = tmp_path / "far" / "away"  # not beside what it imports, nor one above
    deep.mkdir(parents=True)
    (deep / "mine.py").write_text("from imported_from_here import get_config\n")
    flags = ("train", "--config", "far/away/mine.py", "--check-data")
    status, out, err = outcome(monkeypatch, capsys, SCRIPT, *flags)
    assert (status, err) == (0, "") and out.endswith("All images can be read.\n")


@pytest.mark.parametrize(
    ("typed", "command"),
    [
        (["python", SCRIPT, "train", "my run"], "jax-diffusion train 'my run'"),
        (["python", "-m", "jax_diffusion", "sample"], "python -m jax_diffusion sample"),
        (["python"], "python"),
    ],
)
def test_run_json_has_the_command_as_one_would_type_it(typed, command, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert logs.describe({})["command"] == command
