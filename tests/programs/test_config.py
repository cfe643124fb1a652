"""Configs: what they may say, and the sentence that answers when they are wrong."""

import json
import pathlib
import sys

import pytest
from support.programs import convert

from jax_diffusion import config as configs
from jax_diffusion.diffusion import Objective

SMOKE = "configs/smoke.py"
CONFIGS = sorted(pathlib.Path("configs").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_tells_command_hardware_time_and_result(path):
    config = configs.load_config(str(path))
    built = configs.build(config, 3)
    configs.make_timestep_sampler(config.timesteps, *built[:2])
    head = path.read_text().split('"""')[1]
    assert f"--config configs/{path.name}" in head
    assert all(word in head for word in ("Command:", "Hardware:", "Time:", "Result:"))


def test_overrides_reach_groups_and_keep_types():
    config = configs.load_config(
        SMOKE, ["--config.total_steps=60", "--config.model.multipliers=(1,2,2)"]
    )
    assert config.total_steps == 60 and config.model.multipliers == (1, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.totl_steps=60"], "no field 'totl_steps'"),
        (["--config.model.chanels=8"], "no field 'chanels'"),
        (["--config.total_steps=many"], "many"),
        (
            ["--config.total_steps=0"],
            "config.total_steps must be an integer in [1, 2147483647], got 0",
        ),
        (["--config.log_every=0"], "log_every must be an integer >= 1, got 0"),
        (["--confg.total_steps=1"], "confg.total_steps"),
        (["extra"], "must begin with --, got 'extra'"),
        (["--config.ema_decays=(1.5,)"], "ema_decays"),
    ],
)
def test_bad_overrides_are_named_in_one_sentence(overrides, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        configs.load_config(SMOKE, overrides)
    assert words in str(error.value)


def test_a_missing_config_file_is_named():
    words = "^config must be .*, got 'configs/nowhere.py', where nothing is"
    with pytest.raises(ValueError, match=words):
        configs.load_config("configs/nowhere.py")


def test_convert_names_the_flag_of_a_missing_config_file(tmp_path, monkeypatch):
    told = ["--checkpoint", "x.pt", "--workdir", str(tmp_path / "new")]
    for name, words in (("missing.py", ".*missing.py', where nothing is"), ("", ".*")):
        monkeypatch.setattr("sys.argv", ["convert", *told, "--config", name])
        with pytest.raises(ValueError, match=f"^--config must be the path{words}"):
            convert.main()


def test_a_config_file_with_a_misspelt_field_gets_a_suggestion(tmp_path):
    text = pathlib.Path(SMOKE).read_text().replace("log_every", "log_evry")
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match="'log_evry'; did you mean 'log_every'"):
        configs.load_config(str(tmp_path / "c.py"))


def test_a_config_file_without_a_field_is_told_which(tmp_path):
    text = pathlib.Path(SMOKE).read_text().replace("config.seed = 0", "")
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=r"\['seed'\]"):
        configs.load_config(str(tmp_path / "c.py"))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (dict(name="cosin", num_steps=10), "config.schedule.name must be one of"),
        (dict(name="cosine", num_step=10), "did you mean 'num_steps'"),
        (dict(name="cosine"), "lacks the fields"),
        (dict(num_steps=10), "got None"),
        (
            dict(name="cosine", num_steps=1),
            r"config.schedule.num_steps must be an integer in \[2, .* got 1",
        ),
        (
            dict(name="constant", num_steps=10, value=1.5),
            r"config.schedule.value must be a number in \(0, 1\)",
        ),
    ],
)
def test_bad_schedules_are_named(group, words):
    with pytest.raises(ValueError, match=words):
        configs.make_schedule(group)


def test_more_sampling_steps_than_training_steps_are_refused():
    group = dict(name="cosine", num_steps=10)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=rf"\[1, T = 10\], got {steps}"):
            configs.make_schedule(group, steps=steps)
    with pytest.raises(ValueError, match="spacing must be one of"):
        configs.make_schedule(group, steps=5, spacing="leading")


def test_zero_terminal_snr_needs_another_mean_type_than_eps():
    group = dict(name="linear", num_steps=100, zero_terminal_snr=True)
    schedule = configs.make_schedule(group)
    with pytest.raises(ValueError, match="zero signal"):
        configs.make_objective(dict(mean_type="eps"), schedule)
    assert configs.make_objective(dict(mean_type="v"), schedule).mean_type == "v"


@pytest.mark.parametrize("var_type", ["fixed_large", "learned_range"])
def test_the_network_has_as_many_outputs_as_the_objective_reads(var_type):
    objective = Objective(var_type=var_type)
    model = configs.make_model(dict(name="unet", channels=32), objective, 3)
    assert model.out_channels == (6 if objective.learns_variance else 3)


def test_unknown_models_and_fields_are_named():
    with pytest.raises(
        ValueError, match=r"config.model.name must be one of \['annotated', 'dit'"
    ):
        configs.make_model(dict(name="vit"), Objective(), 3)
    with pytest.raises(ValueError, match="'chanels'; did you mean 'channels'"):
        configs.make_model(dict(name="unet", chanels=3), Objective(), 3)


def test_differences_show_both_values_and_spare_what_may_change():
    old = {"seed": 0, "total_steps": 10, "model": {"channels": 8, "depth": [1, 2]}}
    new = {"seed": 1, "total_steps": 99, "model": {"channels": 8, "depth": (1, 2)}}
    assert configs.differences(old, new) == ["seed: 0 -> 1"]


def test_optional_fields_need_not_be_in_a_config_and_can_be_overridden():
    config = configs.load_config(
        SMOKE, ["--config.microbatches=4", "--config.mesh.fsdp=2"]
    )
    assert config.microbatches == 4 and config.mesh.to_dict() == {"data": -1, "fsdp": 2}
    assert config.keep == configs.FIELDS["keep"].default


def test_what_changes_no_result_may_change_between_two_starts():
    now = {"mesh": {"fsdp": 2}, "microbatches": 4, "data": {"in_memory": False}}
    assert configs.differences({"data": {}}, now) == []
    assert configs.differences({"seed": 0}, {"seed": 1}) == ["seed: 0 -> 1"]


OPTIONAL = [*configs.DEFAULTS]
HOW = {"label_dropout": 0.1, "low_res_size": 4}  # a network is told what


@pytest.mark.parametrize("name", HOW)
def test_what_a_network_is_told_may_not_change_between_two_starts(name):
    old, new = configs.FIELDS[name].default, HOW[name]
    assert configs.differences({name: old}, {name: new}) == [f"{name}: {old} -> {new}"]


def test_a_config_that_is_older_than_a_field_has_its_default():
    saved = configs.load_config(SMOKE).to_dict()
    now = {**saved}
    for name in OPTIONAL:
        del saved[name]
    assert configs.differences(saved, now) == configs.differences(now, saved) == []
    assert configs.complete(saved).to_dict() == now
    assert configs.differences(saved, now | HOW) == [
        "label_dropout: 0.0 -> 0.1",
        "low_res_size: 0 -> 4",
    ]


# Records of checkpoints


def record_of(num_classes, **changes):
    config = {"label_dropout": 0.1, "model": {"num_classes": num_classes}}
    return {"config": config, "image_shape": [8, 8, 1], **changes}


def test_an_old_record_counts_the_class_of_hidden_labels_and_a_new_one_does_not():
    for record in (record_of(11), record_of(10, format=2)):
        found = configs.upgrade(record)
        assert found == record_of(10, format=2)
        assert configs.upgrade(found) == found
    never = record_of(11)
    never["config"]["label_dropout"] = 0.0
    assert configs.upgrade(never)["config"] == never["config"]


def test_build_adds_a_class_for_hidden_labels_to_num_classes():
    config = configs.load_config(SMOKE)
    assert configs.build(config, 1).model.num_classes == 10
    config.label_dropout = 0.1
    assert configs.build(config, 1).model.num_classes == 11


# Functions from outside


OUTSIDE = """
import numpy as np

from jax_diffusion.models.unet import UNet


def flat_betas(num_steps, *, value=0.1):
    return np.full(num_steps, value)


class SmallUNet(UNet):
    channels: int = 8
    num_groups: int = 4
    multipliers: tuple = (1,)
    num_res_blocks: int = 1
"""


def test_schedule_and_network_may_be_functions_from_outside(tmp_path, monkeypatch):
    (tmp_path / "outside_of_config.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    config = configs.load_config(SMOKE)
    name = "outside_of_config:flat_betas"
    config.schedule = dict(name=name, num_steps=5, value=0.2)
    config.model = dict(name="outside_of_config:SmallUNet", num_classes=3)
    configs.check_config(config)
    schedule, _, model = configs.build(config, 1)
    assert schedule.betas.tolist() == pytest.approx([0.2] * 5)
    assert (type(model).__name__, model.out_channels) == ("SmallUNet", 2)
    config.schedule = dict(name=name, num_steps=5, valu=0.2)
    with pytest.raises(ValueError, match=r"config.schedule has no field 'valu'; did"):
        configs.build(config, 1)
    config.schedule = dict(name="outside_of_config:none", num_steps=5)
    with pytest.raises(
        ValueError, match=r"config.schedule.name must be one of .* or an import"
    ):
        configs.build(config, 1)


# Types, ranges and arguments that a file leaves out


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("data.image_size=8", "data.image_size", 8),
        ("data.image_size=(8,8)", "data.image_size", (8, 8)),
        ("data.path=123", "data.path", "123"),
        ("model.dtype=bfloat16", "model.dtype", "bfloat16"),
        ("model.head_channels=4", "model.head_channels", 4),
        ("model.head_channels=None", "model.head_channels", None),
        ("model.scale_shift=false", "model.scale_shift", False),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay", 0.1),
        ("optimizer.weight_decay=1", "optimizer.weight_decay", 1.0),
        ("schedule.max_beta=0.5", "schedule.max_beta", 0.5),
        ("schedule.zero_terminal_snr=True", "schedule.zero_terminal_snr", True),
        ("objective.vlb_scale=0.5", "objective.vlb_scale", 0.5),
        ("sampling.label=0,1", "sampling.label", (0, 1)),
        ("sampling.guidance_interval=0.1,2", "sampling.guidance_interval", (0.1, 2)),
        ("evaluation.eta=1", "evaluation.eta", 1.0),
        ("log_to=('tensorboard',)", "log_to", ("tensorboard",)),
    ],
)
def test_any_argument_of_a_groups_function_can_be_set(override, field, value):
    config = configs.load_config(SMOKE, [f"--config.{override}"])
    group, _, name = field.rpartition(".")
    found = config[group][name] if group else config[name]
    assert found == value and type(found) is type(value)
    switched = configs.load_config(SMOKE, ["--config.model.low_res"])
    assert switched.model.low_res is True


def test_another_name_has_its_own_arguments_and_loses_those_of_the_old():
    overrides = ["--config.model.head_dim=8", "--config.model.name=lucidrains"]
    lost = "not take attention_resolutions, num_classes, num_groups, num_res_blocks"
    with pytest.warns(UserWarning, match=lost):
        config = configs.load_config(SMOKE, overrides)
    model = configs.build(config, 1).model
    assert (type(model).__name__, model.head_dim) == ("LucidrainsUNet", 8)
    assert (model.channels, model.multipliers) == (8, (1, 2))  # both networks have them
    with pytest.raises(ValueError, match=r"config.model has no field 'head_dim'"):
        configs.load_config(SMOKE, overrides[:1])


def test_numpy_dtypes_and_paths_in_a_config_file_become_plain_values(tmp_path):
    text = (
        pathlib.Path(SMOKE)
        .read_text()
        .replace(
            "    return config",
            "    import jax.numpy as jnp, numpy as np, pathlib\n"
            "    config.model.dtype = jnp.bfloat16\n"
            "    config.model = dict(config.model, channels=np.int64(8))\n"
            "    config.optimizer = dict(lr=np.float32(0.5))\n"
            "    config.data.path = pathlib.Path('photos')\n"
            "    config.schedule = dict(name='given', num_steps=3)\n"
            "    config.schedule.betas = np.full(3, 0.5)\n"
            "    return config",
        )
    )
    (tmp_path / "c.py").write_text(text)
    config = configs.load_config(tmp_path / "c.py")
    assert config.model.dtype == "bfloat16" and config.data.path == "photos"
    assert type(config.model.channels) is int and config.optimizer.lr == 0.5
    assert json.loads(config.to_json())["schedule"]["betas"] == [0.5] * 3
    assert configs.build(config, 1).schedule.num_steps == 3


def test_functions_without_hints_may_be_given_anything_but_infinity(
    tmp_path, monkeypatch
):
    text = "import numpy as np\n\n\ndef flat(num_steps, value=0.1, *, note=[1]):\n"
    (tmp_path / "no_hints.py").write_text(
        f"{text}    return np.full(num_steps, value)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    group = dict(name="no_hints:flat", num_steps=3, value=0.2, note="any")
    assert configs.make_schedule(group).num_steps == 3
    with pytest.raises(ValueError, match=r"config.schedule.value must be finite"):
        configs.make_schedule(group | dict(value=float("inf")))


# Neighbors of a config


def write_neighbors(folder, seed):
    """configs/mine.py, which imports its neighbor `other` in three ways."""
    configs_folder = folder / "configs"
    configs_folder.mkdir(parents=True)
    smoke = pathlib.Path(SMOKE).read_text()
    other = smoke.replace("config.seed = 0", f"config.seed = {seed}")
    (configs_folder / "other.py").write_text(other)
    path = configs_folder / "mine.py"
    path.write_text(
        "import other\nfrom configs import other as same\n"
        "from configs.other import get_config as made\n\n\n"
        "def get_config():\n"
        "    seeds = {m() for m in (lambda: other.get_config().seed,\n"
        "             lambda: same.get_config().seed, lambda: made().seed)}\n"
        "    assert len(seeds) == 1\n"
        "    return made()\n"
    )
    return path


def test_a_config_imports_its_neighbors_from_any_folder(tmp_path, monkeypatch):
    paths = [write_neighbors(tmp_path / str(seed), seed) for seed in (3, 4)]
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    modules, path = dict(sys.modules), [*sys.path]
    # Twice, as the second folder has modules of the same names.
    assert [configs.load_config(p).seed for p in paths] == [3, 4]
    assert sys.path == path
    left = {*sys.modules} ^ {*modules}
    assert not {name for name in left if name.startswith(("configs", "other", "mine"))}


def test_a_neighbor_wins_over_a_module_that_is_already_loaded(tmp_path):
    from configs import smoke  # this repository's

    path = write_neighbors(tmp_path, 5)
    assert configs.load_config(path).seed == 5
    assert sys.modules["configs.smoke"] is smoke
