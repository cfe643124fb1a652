"""The door: what a config may say, and the sentence that answers when it is wrong."""

import argparse
import pathlib

import pytest

from jax_diffusion import config as settings
from jax_diffusion.diffusion import Objective

SMOKE = "configs/smoke.py"
CONFIGS = sorted(pathlib.Path("configs").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_tells_command_hardware_time_and_result(path):
    config = settings.load_config(str(path))
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    settings.make_model(config.model, objective, 3)
    settings.make_timestep_sampler(config.timesteps, schedule.num_steps)
    head = path.read_text().split('"""')[1]
    assert f"--config configs/{path.name}" in head
    assert all(word in head for word in ("Command:", "Hardware:", "Time:", "Result:"))


def test_overrides_reach_groups_and_keep_types():
    config = settings.load_config(
        SMOKE, ["--config.total_steps=60", "--config.model.multipliers=(1,2,2)"]
    )
    assert config.total_steps == 60 and config.model.multipliers == (1, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.totl_steps=60"], "no field 'totl_steps'"),
        (["--config.model.chanels=8"], "no field 'chanels'"),
        (["--config.total_steps=many"], "many"),
        (["--config.total_steps=0"], "positive integer, got 0"),
        (["--config.log_every=0"], "log_every must be a positive integer"),
        (["--confg.total_steps=1"], "confg.total_steps"),
        (["extra"], "must begin with --, got 'extra'"),
        (["--config.ema_decays=(1.5,)"], "ema_decays"),
    ],
)
def test_bad_overrides_are_named_in_one_sentence(overrides, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        settings.load_config(SMOKE, overrides)
    assert words in str(error.value)


def test_a_missing_config_file_is_named():
    with pytest.raises(ValueError, match="got 'configs/nowhere"):
        settings.load_config("configs/nowhere.py")


def test_a_config_file_with_a_misspelt_field_gets_a_suggestion(tmp_path):
    text = pathlib.Path(SMOKE).read_text().replace("log_every", "log_evry")
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match="'log_evry'; did you mean 'log_every'"):
        settings.load_config(str(tmp_path / "c.py"))


def test_a_config_file_without_a_field_is_told_which(tmp_path):
    text = pathlib.Path(SMOKE).read_text().replace("config.seed = 0", "")
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=r"\['seed'\]"):
        settings.load_config(str(tmp_path / "c.py"))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (dict(name="cosin", num_steps=10), "config.schedule.name must be one of"),
        (dict(name="cosine", num_step=10), "did you mean 'num_steps'"),
        (dict(name="cosine"), "must have the fields"),
        (dict(num_steps=10), "got None"),
        (dict(name="cosine", num_steps=1), "at least 2 steps, got 1"),
        (dict(name="constant", num_steps=10, value=1.5), r"values in \(0, 1\]"),
    ],
)
def test_bad_schedules_are_named(group, words):
    with pytest.raises(ValueError, match=words):
        settings.make_schedule(group)


def test_more_sampling_steps_than_training_steps_are_refused():
    group = dict(name="cosine", num_steps=10)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=rf"\[1, T = 10\], got {steps}"):
            settings.make_schedule(group, steps=steps)
    with pytest.raises(ValueError, match="spacing must be one of"):
        settings.make_schedule(group, steps=5, spacing="leading")


def test_zero_terminal_snr_needs_another_mean_type_than_eps():
    group = dict(name="linear", num_steps=100, zero_terminal_snr=True)
    schedule = settings.make_schedule(group)
    with pytest.raises(ValueError, match="zero signal"):
        settings.make_objective(dict(mean_type="eps"), schedule)
    assert settings.make_objective(dict(mean_type="v"), schedule).mean_type == "v"


@pytest.mark.parametrize("var_type", ["fixed_large", "learned_range"])
def test_the_network_has_as_many_outputs_as_the_objective_reads(var_type):
    objective = Objective(var_type=var_type)
    model = settings.make_model(dict(name="unet", channels=32), objective, 3)
    assert model.out_channels == (6 if objective.learns_variance else 3)


def test_unknown_models_and_fields_are_named():
    with pytest.raises(
        ValueError, match=r"config.model.name must be one of \['annotated', 'encoder'"
    ):
        settings.make_model(dict(name="vit"), Objective(), 3)
    with pytest.raises(ValueError, match="'chanels'; did you mean 'channels'"):
        settings.make_model(dict(name="unet", chanels=3), Objective(), 3)


def test_differences_show_both_values_and_spare_what_may_change():
    old = {"seed": 0, "total_steps": 10, "model": {"channels": 8, "depth": [1, 2]}}
    new = {"seed": 1, "total_steps": 99, "model": {"channels": 8, "depth": (1, 2)}}
    assert settings.differences(old, new) == ["seed: 0 -> 1"]


def test_optional_fields_need_not_be_in_a_config_and_can_be_overridden():
    config = settings.load_config(
        SMOKE, ["--config.microbatches=4", "--config.mesh.fsdp=2"]
    )
    assert config.microbatches == 4 and config.mesh.to_dict() == {"data": -1, "fsdp": 2}
    assert config.keep == settings.OPTIONAL["keep"]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, 2), (FloatingPointError, 1)]
)
def test_programs_end_in_one_sentence_and_a_status(error, status, capsys, monkeypatch):
    # That is for a process.
    monkeypatch.setattr(settings.cpu, "tune", lambda **options: None)

    def main():
        raise error("the rule, and what came.")

    with pytest.raises(SystemExit) as stop:
        settings.run_program(main)
    assert stop.value.code == status
    assert capsys.readouterr().err == "error: the rule, and what came.\n"


def test_what_changes_no_result_may_change_between_two_starts():
    now = {"mesh": {"fsdp": 2}, "microbatches": 4, "data": {"in_memory": False}}
    assert settings.differences({"data": {}}, now) == []
    assert settings.differences({"seed": 0}, {"seed": 1}) == ["seed: 0 -> 1"]


HOW = {"label_dropout": 0.1, "low_res_size": 4}  # a network is told what


@pytest.mark.parametrize("name", HOW)
def test_what_a_network_is_told_may_not_change_between_two_starts(name):
    old, new = settings.OPTIONAL[name], HOW[name]
    assert settings.differences({name: old}, {name: new}) == [f"{name}: {old} -> {new}"]


def test_a_config_that_is_older_than_a_field_has_its_default():
    saved = settings.load_config(SMOKE).to_dict()
    now = {**saved}
    for name in settings.OPTIONAL:
        del saved[name]
    assert settings.differences(saved, now) == settings.differences(now, saved) == []
    assert settings.complete(saved).to_dict() == now
    assert settings.differences(saved, now | HOW) == [
        "label_dropout: 0.0 -> 0.1",
        "low_res_size: 0 -> 4",
    ]


@pytest.mark.parametrize("long", [False, True])
def test_only_long_programs_are_compiled_anew_for_onednn(long, monkeypatch):
    asked = []
    monkeypatch.setattr(settings.cpu, "tune", lambda **options: asked.append(options))
    settings.run_program(lambda: asked.append("main"), long=long)
    assert asked == [{"onednn": long}, "main"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_is_alone_keeps_what_it_compiles(processes, monkeypatch):
    kept = []
    monkeypatch.setattr(settings.sharding, "start", lambda *told: None)
    monkeypatch.setattr(settings.jax, "process_count", lambda: processes)
    monkeypatch.setattr(settings.cpu, "keep_compiled", lambda: kept.append(1))
    parser = argparse.ArgumentParser()
    settings.add_hosts(parser)
    settings.start_hosts(parser.parse_args([]))
    assert bool(kept) == (processes == 1)
