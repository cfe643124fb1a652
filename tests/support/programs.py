"""The programs as modules: `jax_diffusion.train` and `.evaluate` are functions."""

import importlib
import sys

import pytest

from jax_diffusion import cli

convert = importlib.import_module("jax_diffusion.convert")
evaluate = importlib.import_module("jax_diffusion.evaluate")
sample = importlib.import_module("jax_diffusion.sample")
train = importlib.import_module("jax_diffusion.train")


def run_main(monkeypatch, program, *args):
    """Runs a program with arguments, in this process."""
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, args)])
    program.main()


def failure(monkeypatch, capsys, program, *args):
    """Runs a program that must print one sentence and exit with 2; returns it."""
    with pytest.raises(SystemExit) as info:
        cli.run_program(lambda: run_main(monkeypatch, program, *args))
    error = capsys.readouterr().err
    assert info.value.code == 2
    assert error.startswith("error: ") and error.endswith(".\n")
    assert error.count("\n") == 1
    return error
