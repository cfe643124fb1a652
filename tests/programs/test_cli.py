"""Flags that programs share, and how programs end."""

import argparse
import warnings

import pytest
from support.programs import train

from jax_diffusion import cli
from jax_diffusion.pipeline import SamplingOptions


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, 2), (FloatingPointError, 1)]
)
def test_programs_end_in_one_sentence_and_a_status(error, status, capsys, monkeypatch):
    # That is for a process.
    monkeypatch.setattr(cli.cpu, "tune", lambda **options: None)

    def main():
        raise error("the rule, and what came.")

    with pytest.raises(SystemExit) as stop:
        cli.run_program(main)
    assert stop.value.code == status
    assert capsys.readouterr().err == "error: the rule, and what came.\n"


def test_warnings_are_one_line_each(capsys, monkeypatch):
    monkeypatch.setattr(cli.cpu, "tune", lambda **options: None)

    def main():
        warnings.warn("few\nimages.", stacklevel=1)
        warnings.warn("old name", FutureWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.run_program(main)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: few images."
    assert "FutureWarning: old name" in lines[1] and "test_cli.py" in lines[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_is_alone_keeps_what_it_compiles(processes, monkeypatch):
    kept = []
    monkeypatch.setattr(cli.sharding, "start", lambda *told: None)
    monkeypatch.setattr(cli.jax, "process_count", lambda: processes)
    monkeypatch.setattr(cli.cpu, "keep_compiled", lambda: kept.append(1))
    parser = argparse.ArgumentParser()
    cli.add_host_flags(parser)
    cli.start_hosts(parser.parse_args([]))
    assert bool(kept) == (processes == 1)


def parse(*args):
    parser = cli.make_parser("sample", "Draws.")
    cli.add_sampling_flags(parser)
    parser.add_argument("--n", type=cli.positive, default=3)
    return parser.parse_args([*map(str, args)])


def test_sampling_flags_become_sampling_options():
    assert vars(cli.sampling_options(parse())) == vars(SamplingOptions())
    told = parse(
        *("--sampler", "ddim", "--steps", 5, "--eta", 0.5, "--no-clip", "--label", "1"),
        *("--guidance", 2, "--no-reclip", "--quantize", "round"),
        *("--classifier", "c"),
    )
    options = SamplingOptions(
        *("ddim", 5, None, 0.5, False, None, "round", "1", 2.0),
        classifier="c",
        reclip=False,
    )
    assert vars(cli.sampling_options(told)) == vars(options)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--n", 0), "--n must be an integer >= 1, got 0."),
        (("--n", "x"), "--n must be an integer >= 1, got x."),
        (("--xyzzy=1",), "there is no flag '--xyzzy'."),
        (("file",), "unrecognized arguments: file."),
        (("--steps", "x"), "argument --steps: invalid int value: 'x'."),
        (("--stepz", 3), "there is no flag '--stepz'; did you mean '--steps'?"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(args, sentence):
    with pytest.raises(ValueError) as info:
        parse(*args)
    assert str(info.value) == sentence


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--workdri=a", "there is no flag '--workdri'; did you mean '--workdir'?"),
        ("--total_steps=3", "of the config; did you mean '--config.total_steps'?"),
        ("--total-steps=3", "of the config; did you mean '--config.total_steps'?"),
        ("--keep=3", "of the config; did you mean '--config.keep'?"),
        ("--xyzzy", "there is no flag '--xyzzy'; --help lists flags"),
        (
            "--config.ema_decays=2",
            "config.ema_decays must be a list of numbers, such as (2,), got '2'.",
        ),
        ("--config.ema_decays=x", "must be a list of numbers, got 'x'."),
    ],
)
def test_mistyped_arguments_of_train_get_a_way_out(argument, words, monkeypatch):
    args = ("--config", "configs/smoke.py", "--workdir", "nowhere", argument)
    monkeypatch.setattr("sys.argv", ["train", *args])
    with pytest.raises(ValueError) as info:
        train.main()
    assert words in str(info.value)


def test_errors_of_fields_name_their_flags():
    for error, sentence in (
        ("guidance_rescale must be 1, got 2.", "--guidance-rescale must be 1, got 2."),
        ("clip must be true, got no.", "--no-clip must be true, got no."),
        ("the run must be one.", "the run must be one."),
        (
            "x has none; give `guidance_rescale`.",
            "x has none; give --guidance-rescale.",
        ),
        ("clip needs `clip` and `x`.", "--no-clip needs --no-clip and `x`."),
        ("dataset must be one.", "dataset must be one."),
    ):
        args = argparse.Namespace(guidance_rescale=2.0, no_clip=True)
        with pytest.raises(ValueError) as info, cli.fields_as_flags(args):
            raise ValueError(error)
        assert str(info.value) == sentence


def test_help_shows_defaults_and_an_example_of_each_group(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "ddpm all, ddim 50, dpmpp_2m 20, heun 10",
        "(default: ddim)",
        "Example: --sampler dpmpp_2m --steps 20 --spacing trailing",
        "Example: --label 3,5 --guidance 2",
    ):
        assert words in text


def test_version_is_that_of_the_package(capsys):
    import jax_diffusion

    with pytest.raises(SystemExit) as info:
        parse("--version")
    assert info.value.code == 0
    assert capsys.readouterr().out == f"jax_diffusion {jax_diffusion.__version__}\n"
