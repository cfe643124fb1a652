"""What a run leaves behind: numbers without doubles, its origin, its use of time."""

import datetime
import importlib.machinery
import json
import math
import os
import platform
import struct
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

import jax_diffusion
from jax_diffusion.runtime import logs


def run(workdir, steps, *, start=0, **options):
    """A run that had made `start` updates before."""
    writer = logs.MetricWriter(workdir, start, **options)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    writer.close()


def logged(workdir):
    return [row["step"] for row in logs.read_metrics(workdir)]


def events(workdir):
    """What TensorBoard would read, of all files in order."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, event, its checksum
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(workdir):
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
    ]


def test_every_write_is_one_line_of_json_at_once(tmp_path):
    workdir = tmp_path / "new" / "run"
    writer = logs.MetricWriter(workdir, 0)
    for step, metrics in [(1, {"loss": 0.5, "lr": 1e-3}), (2, {"loss": 0.25})]:
        writer.write(step, metrics)
        *_, last = (workdir / "metrics.jsonl").read_text().splitlines()
        assert json.loads(last) == {"step": step} | metrics
    writer.close()
    assert logged(workdir) == [1, 2]


def test_numbers_are_kept_to_the_last_bit(tmp_path):
    run(tmp_path, [3])
    assert logs.read_metrics(tmp_path) == [{"step": 3, "loss": 1 / 3}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(tmp_path, value):
    writer = logs.MetricWriter(tmp_path, 0)
    writer.write(1, {"loss": value, "lr": 0.5})
    writer.close()
    line = '{"step": 1, "loss": null, "lr": 0.5}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_resumed_run_drops_later_lines_and_doubles_nothing(tmp_path):
    run(tmp_path, [1, 2, 3, 4, 5])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logs.MetricWriter(tmp_path, 3).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:3]
    run(tmp_path, [4, 5, 6], start=3)
    assert logged(tmp_path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("cut", ["{", '{"step": 3', '{"step": 3, "loss": 1.0}'])
def test_resumed_run_drops_a_last_line_that_was_cut_off(tmp_path, cut):
    run(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    run(tmp_path, [4], start=3)
    assert logged(tmp_path) == [1, 2, 4]


def test_new_run_in_an_old_folder_starts_from_nothing(tmp_path):
    run(tmp_path, [1, 2])
    run(tmp_path, [1])
    assert logged(tmp_path) == [1]


def test_reading_says_where_metrics_are_missing(tmp_path):
    with pytest.raises(
        ValueError, match=r"^workdir must hold metrics\.jsonl, and .* is"
    ):
        logs.read_metrics(tmp_path)


def test_tensorboard_holds_every_number(tmp_path):
    run(tmp_path, [1, 2, 4], writers=["tensorboard"])
    assert scalars(tmp_path) == [(1, "loss", 1), (2, "loss", 0.5), (4, "loss", 0.25)]


def test_tensorboard_is_told_to_forget_what_a_resumed_run_writes_again(tmp_path):
    run(tmp_path, [1, 2, 4], writers=["tensorboard"])
    run(tmp_path, [4], start=3, writers=["tensorboard"])
    starts = [
        event.step
        for event in events(tmp_path)
        if event.session_log.status == SessionLog.START
    ]
    assert starts[-1] == 4


class FakeWandb(types.ModuleType):
    """Of the W&B package what we call; `runs` are those that were started, in order."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
        self.Error = type("Error", (Exception,), {})
        self.runs = []

    def init(self, *, dir, id, resume, config):
        settings = dict(dir=dir, id=id, resume=resume, config=config)
        run = types.SimpleNamespace(**settings, rows=[], finished=False)
        run.log = lambda data, *, step: run.rows.append((step, data))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_every_number_and_the_config(tmp_path, wandb):
    run(tmp_path, [1, 2], writers=["wandb"], config={"seed": 3})
    (ours,) = wandb.runs
    assert ours.rows == [(1, {"loss": 1}), (2, {"loss": 0.5})]
    assert (ours.dir, ours.resume) == (str(tmp_path), "allow")
    assert ours.config == {"seed": 3} and ours.finished


def test_resumed_run_continues_its_wandb_run_and_a_new_one_does_not(tmp_path, wandb):
    run(tmp_path, [1, 2], writers=["wandb"])
    run(tmp_path, [2, 3], start=1, writers=["wandb"])
    run(tmp_path, [1], writers=["wandb"])
    run(tmp_path / "other", [1], writers=["wandb"])
    first, resumed, again, other = (run.id for run in wandb.runs)
    assert first == resumed and len({first, again, other}) == 3


def test_wandb_can_be_asked_for_when_a_run_is_resumed(tmp_path, wandb):
    run(tmp_path, [1])
    run(tmp_path, [2], start=1, writers=["wandb"])
    run(tmp_path, [3], start=2, writers=["wandb"])
    assert wandb.runs[0].id == wandb.runs[1].id != ""


def test_writers_that_are_installed_are_not_used_unless_asked_for(tmp_path, wandb):
    run(tmp_path, [1, 2])
    assert logged(tmp_path) == [1, 2] and wandb.runs == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_all_writers_write_side_by_side(tmp_path, wandb):
    run(tmp_path, [1], writers=("wandb", "tensorboard"))
    assert logged(tmp_path) == [1]
    assert len(scalars(tmp_path)) == len(wandb.runs[0].rows) == 1


def test_wandb_that_cannot_start_says_why_in_one_sentence(tmp_path, wandb, monkeypatch):
    def init(**settings):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    message = r"^writer 'wandb' could not start: No API key configured\.$"
    with pytest.raises(ValueError, match=message):
        logs.MetricWriter(tmp_path, 0, writers=["wandb"])


@pytest.mark.parametrize("name", sorted(logs.WRITERS))
def test_missing_writer_says_what_to_install_and_leaves_no_trace(
    tmp_path, monkeypatch, name
):
    package = logs.WRITERS[name]
    monkeypatch.setitem(sys.modules, package, None)  # Python's own sign of absence
    message = rf"^writer '{name}' must be installed .*: pip install {package}\.$"
    with pytest.raises(ValueError, match=message):
        logs.check_writers([name])
    with pytest.raises(ValueError, match=message):
        logs.MetricWriter(tmp_path / "run", 0, writers=[name])
    assert not (tmp_path / "run").exists()


def test_folder_of_wandb_files_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install wandb"):
        logs.check_writers(["wandb"])


def test_unknown_writer_is_named(tmp_path):
    message = r"^log_to must be some of \['tensorboard', 'wandb'\], got 'mlflow'\.$"
    with pytest.raises(ValueError, match=message):
        logs.MetricWriter(tmp_path / "run", 0, writers=["mlflow"])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Runs git in an empty repository that looks as if our source were in it."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME"):  # no settings of the user
        monkeypatch.setenv(name, str(tmp_path))
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "logs.py").write_text("1")
    monkeypatch.setattr(logs, "__file__", str(folder / "logs.py"))

    def git(*arguments):
        user = ["-c", "user.name=us", "-c", "user.email=us@here"]
        return subprocess.run(
            ["git", *user, *arguments],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "--quiet")
    return git


def test_description_survives_json_and_holds_the_config():
    config = {"seed": 3, "model": {"channels": 8, "dropout": None}}
    record = logs.describe(config)
    assert record == json.loads(json.dumps(record)) and record["config"] == config


def test_start_is_told_in_utc():
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    started = datetime.datetime.fromisoformat(logs.describe({})["started"])
    assert started.utcoffset() == datetime.timedelta(0)
    assert before <= started <= datetime.datetime.now(datetime.UTC)


def test_command_is_told_as_one_would_type_it(monkeypatch):
    arguments = ["-m", "jax_diffusion.train", "--workdir", "my runs/a"]
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *arguments])
    command = logs.describe({})["command"]
    assert command == "python -m jax_diffusion.train --workdir 'my runs/a'"


def test_versions_are_those_of_what_runs():
    versions = logs.describe({})["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["jax_diffusion"] == jax_diffusion.__version__
    assert (versions["jax"], versions["numpy"]) == (jax.__version__, np.__version__)
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint"} < versions.keys()
    assert None not in versions.values()


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(logs, "LIBRARIES", ("numpy", "no-such-library"))
    versions = logs.versions()
    assert (versions["numpy"], versions["no-such-library"]) == (np.__version__, None)


def test_hardware_is_told_with_its_devices_and_its_memory():
    hardware = logs.describe({})["hardware"]
    devices = jax.devices()
    assert (hardware["platform"], hardware["devices"]) == ("cpu", len(devices))
    assert hardware["device_kind"] == devices[0].device_kind
    assert hardware["processes"] == 1 and hardware["cpu_cores"] >= 1
    assert hardware["cpu"] and hardware["memory_gib"] > 0.1


def test_commit_is_told_and_whether_tracked_files_differ_from_it(git, tmp_path):
    git("add", "logs.py")
    assert logs.describe({})["git"] is None  # no commit yet
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert logs.describe({})["git"] == {"commit": commit, "changed": False}
    (tmp_path / "checkout" / "notes").write_text("not tracked")
    assert logs.describe({})["git"] == {"commit": commit, "changed": False}
    (tmp_path / "checkout" / "logs.py").write_text("2")
    assert logs.describe({})["git"] == {"commit": commit, "changed": True}


def test_commit_of_a_repository_that_only_surrounds_the_package_is_not_ours(git):
    git("commit", "--quiet", "--allow-empty", "-m", "of someone else")
    assert logs.describe({})["git"] is None


def test_repository_of_a_git_hook_is_not_taken_for_ours(git, tmp_path, monkeypatch):
    git("add", "logs.py")
    git("commit", "--quiet", "-m", "one")
    expected = logs.describe({})["git"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert expected is not None and logs.describe({})["git"] == expected


def test_source_without_a_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "__file__", str(tmp_path / "logs.py"))
    assert logs.describe({})["git"] is None


def test_missing_git_is_no_error(git, tmp_path, monkeypatch):
    git("add", "logs.py")
    git("commit", "--quiet", "-m", "one")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert logs.describe({})["git"] is None


def test_description_holds_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "sesame-4711")
    assert "sesame-4711" not in json.dumps(logs.describe({}))


def test_every_start_of_a_run_adds_an_entry(tmp_path):
    workdir = tmp_path / "new" / "run"
    for record in ({"started": "1"}, {"started": "2", "git": None}):
        logs.write_description(workdir, record)
    content = json.loads((workdir / "run.json").read_text())
    assert content == {"starts": [{"started": "1"}, {"started": "2", "git": None}]}
    assert logs.read_descriptions(workdir) == content["starts"]
    assert [path.name for path in workdir.iterdir()] == ["run.json"]


def test_kill_while_describing_leaves_the_old_description(tmp_path, monkeypatch):
    logs.write_description(tmp_path, {"started": "1"})
    before = (tmp_path / "run.json").read_bytes()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        logs.write_description(tmp_path, {"started": "2"})
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"starts": 1}'])
def test_description_that_is_something_else_is_kept_and_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"^run\.json must be an object .*run\.json\.$"
    ):
        logs.write_description(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == text


def test_description_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^workdir must hold run\.json, .*missing\.$"):
        logs.read_descriptions(tmp_path)
