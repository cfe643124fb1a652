"""The programs, from the command line's side: train, resume, stop, sample, score."""

import functools
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image
from support import tiny
from support.jobs import lines_of
from support.oracles import F32
from support.programs import evaluate, failure, sample, train

from jax_diffusion import config as settings
from jax_diffusion import data, pipeline, training
from jax_diffusion.runtime import checkpoint, logs
from jax_diffusion.training import consistency, setup


def smoke_of(*overrides):
    return settings.load_config("configs/smoke.py", [*tiny.SMALL, *overrides])


def config_of(*overrides):
    """A run that is traced in a moment, for tests of what stands around a network."""
    common = ("--config.log_every=4", "--config.save_every=6", "--config.keep=3")
    common += ("--config.log_to=('tensorboard',)",)
    return settings.load_config(tiny.CONFIG, [*common, *overrides])


def command(program, *args):
    return [sys.executable, "-m", f"jax_diffusion.{program}", *map(str, args)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped: its workdir and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.device_get(train.train(config_of(), workdir))


def assert_same_run(workdir, state, whole):
    equal = jax.tree.map(np.array_equal, jax.device_get(state), whole[1])
    assert all(jax.tree.leaves(equal))
    assert lines_of(workdir) == lines_of(whole[0])


@pytest.mark.parametrize(
    ("step", "number"),
    [(3, signal.SIGTERM), pytest.param(8, signal.SIGINT, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_stopped_and_resumed_run_is_bit_identical(
    whole, tmp_path, monkeypatch, capsys, step, number
):
    batch = data.Batches.batch

    def signalling_batch(self, i, rows=None):
        if i == step:
            os.kill(os.getpid(), number)
        return batch(self, i, rows)

    monkeypatch.setattr(data.Batches, "batch", signalling_batch)
    stopped = train.train(config_of(), tmp_path)
    assert int(stopped.step) == step + 1 == checkpoint.latest_step(tmp_path)
    assert f"saved step {step + 1}" in capsys.readouterr().out
    monkeypatch.undo()
    state = train.train(config_of(), tmp_path)
    assert_same_run(tmp_path, state, whole)


@pytest.mark.slow
def test_a_run_cut_off_after_its_last_checkpoint_repeats_the_lost_lines(
    whole, tmp_path
):
    state = train.train(config_of("--config.total_steps=6"), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:  # what a killed run leaves
        file.write('{"step": 8, "loss": 1.0}\n{"step": 12, "lo')
    state = train.train(config_of(), tmp_path)
    rows = [r for r in lines_of(tmp_path) if r["step"] != 6]  # the short run's last
    assert rows == lines_of(whole[0])
    equal = jax.tree.map(np.array_equal, jax.device_get(state), whole[1])
    assert all(jax.tree.leaves(equal))


def test_a_finished_run_is_left_alone_after_a_line_about_the_device(whole, capsys):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    train.train(config_of(), whole[0])
    compiling, first, last = capsys.readouterr().out.splitlines()
    assert compiling == "compiling the train step"
    assert "has made its 12 steps already" in last
    assert "cpu" in first and "parameters" in first
    assert "MiB" in first and "compiled in" in first
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_the_log_has_terms_norms_and_quartiles(whole):
    rows = lines_of(whole[0])
    assert [r["step"] for r in rows] == [4, 8, 12]
    wanted = {"loss", "mse", "vlb", "grad_norm", "param_norm", "update_norm", "lr"}
    assert wanted <= rows[0].keys()
    assert {"loss_q0", "mse_q3", "vlb_q1"} <= set().union(*rows)
    assert list((whole[0] / "tensorboard").iterdir())


def test_the_run_ends_in_a_picture(whole):
    for name in ("samples/000012.png", "loss.png"):
        with Image.open(whole[0] / name) as picture:
            assert np.asarray(picture).std() > 0


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(whole):
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.002 -> 0.1"):
        train.train(config_of("--config.optimizer.lr=0.1"), whole[0])


def same_state(a, b):
    leaves = (jax.tree.leaves(jax.device_get(x)) for x in (a, b))
    return all(map(np.array_equal, *leaves))


MUON = dict(name="optax.contrib:muon", learning_rate=1e-3, beta=0.9, grad_clip=1.0)


def muon_config(steps):
    """Muon, whose state is a tree of its own, on a mesh that splits it."""
    overrides = ["--config.mesh.fsdp=4", f"--config.total_steps={steps}"]
    config = settings.load_config(tiny.CONFIG, overrides)
    config.model = dict(name="support.networks:Tiny", channels=8)
    config.optimizer = MUON
    return config


@pytest.mark.slow
def test_an_optimizer_of_optax_trains_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_diffusion.runtime.sharding.MIN_SPLIT", 1)
    whole = train.train(muon_config(4), tmp_path / "whole")
    half = train.train(muon_config(2), tmp_path / "run")
    assert not same_state(whole.params, half.params)
    params = jax.tree.leaves(whole.params)
    assert any(not a.sharding.is_fully_replicated for a in params)
    assert same_state(train.train(muon_config(4), tmp_path / "run"), whole)
    # The same as an object of optax, given to `train`.
    tx, _ = training.make_optimizer(**MUON, total_steps=2)
    workdir = tmp_path / "given"
    assert same_state(train.train(muon_config(2), workdir, optimizer=tx), half)
    assert "lr" not in logs.read_metrics(workdir)[-1]
    with pytest.raises(ValueError, match=r"optimizer\.name: given to train"):
        train.train(muon_config(2), workdir)


class Watch:
    """A compiled step that looks at how the loop treats it."""

    def __init__(self, program, reads):
        self.step, self.reads, self.made = program.step, reads, 0

    def __call__(self, key, state, batch):
        self.made += 1
        with jax.transfer_guard("disallow"):  # all that it needs is on the devices
            out = self.step(key, state, batch)
        given_away = [a.is_deleted() for a in jax.tree.leaves(state)]
        # On the CPU, the save after step 6 is of the very memory.
        assert all(given_away) or self.made == 7
        return out


@pytest.mark.slow
def test_the_loop_waits_at_lines_of_the_log_and_saves_alone(tmp_path, monkeypatch):
    watches, reads = [], []

    def compile_step(setup, *, fresh):
        program = compile_(setup, fresh=fresh)
        watches.append(Watch(program, reads))
        return program._replace(step=watches[0])

    def value(array):  # what any read of a number goes through
        reads.append(watches[0].made if watches else 0)
        return value_.__get__(array)

    compile_ = train.compile_step
    value_ = type(jax.numpy.ones(1))._value
    monkeypatch.setattr(train, "compile_step", compile_step)
    monkeypatch.setattr(type(jax.numpy.ones(1)), "_value", property(value))
    train.train(config_of("--config.sample_every=1000"), tmp_path)
    assert watches[0].made == 12
    assert {4, 8, 12} <= set(reads) <= {0, 4, 6, 8, 12}  # lines at 4s, a save at 6


def poison(monkeypatch, steps):
    """Labels that the network has no embedding for, and is not a number with."""
    batch = data.Batches.batch

    def poisoned(self, i, rows=None):
        found = batch(self, i, rows)
        return dict(found, label=found["label"] + 99) if i in steps else found

    monkeypatch.setattr(data.Batches, "batch", poisoned)


@pytest.mark.slow
def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, [5])
    state = train.train(config_of(), tmp_path)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.params))
    rows = logs.read_metrics(tmp_path)
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    assert all(row["loss"] > 0 for row in rows)
    assert int(state.step) == 12 and int(state.skipped) == 0


@pytest.mark.slow
def test_batches_that_are_never_finite_end_the_run_in_a_sentence(tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 1000))
    config = config_of("--config.max_skipped=3", "--config.total_steps=100")
    with pytest.raises(FloatingPointError, match=r"3 updates in a row.*optimizer\.lr"):
        train.train(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 8
    params = checkpoint.load_params(tmp_path, ema=None)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(params))
    monkeypatch.undo()  # the data are mended, and the run goes on
    state = train.train(config_of("--config.max_skipped=3"), tmp_path)
    assert int(state.step) == 12 and int(state.skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 5], ids=["while it goes on", "until it ends"])
def test_a_few_steps_are_traced_for_perfetto(tmp_path, steps):
    overrides = [f"--config.profile_steps={steps}", "--config.sample_every=0"]
    config = settings.load_config(tiny.CONFIG, overrides)
    config.model = dict(name="support.networks:Tiny")  # with few events to write
    train.train(config, tmp_path)
    assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))


def test_each_start_describes_itself(whole):
    starts = json.loads((whole[0] / "run.json").read_text())["starts"]
    assert starts[0]["config"]["total_steps"] == 12
    assert starts[0]["versions"]["jax"] == jax.__version__
    assert starts[0]["hardware"]["devices"] == 8


def test_samples_colours_stand_beside_those_of_the_data(whole):
    last = lines_of(whole[0])[-1]
    assert -1 <= last["samples_mean_0"] <= 1 and last["data_std_0"] > 0


def bad(*overrides):
    return ["--config", "configs/smoke.py", *tiny.SMALL, *overrides]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.data.name=cifar"], "config.data.name must be one of"),
        (
            ["--config.data.batch_size=4000"],
            "config.data.batch_size must be an integer in",
        ),
        (["--config.model.multipliers=(1,1,1,1,1)"], "divisible by"),
        (["--config.model.channels=6"], "channels must be divisible"),
        (["--config.model.num_classes=3"], "labels must be below"),
        (["--config.sampling.sampler=euler"], "sampler must be one of"),
        (["--config.sampling.steps=11"], "steps must be in"),
        (["--config.sampling.spacing=leading"], "spacing must be one of"),
        (
            ["--config.schedule.num_steps=1"],
            "config.schedule.num_steps must be an integer in",
        ),
        (["--config.objective.loss=l3"], "loss must be one of"),
        (["--config.objective.loss=l2"], "config.objective.loss must be one of"),
        (["--config.timesteps.name=by_importance"], "config.timesteps.name must be"),
        (["--config.optimizer.decay=step"], "decay must be one of"),
    ],
    ids=lambda v: v[0].removeprefix("--config.") if isinstance(v, list) else "",
)
def test_bad_input_is_refused_before_anything_is_written(overrides, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train.train(smoke_of(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("flat", "workdir must not be, hold or lie in config.data.path, got "),
        ("flat/new", "workdir must not be, hold or lie in config.data.path, got "),
        (".", "workdir must not be, hold or lie in config.data.path, got "),
        ("cases", "workdir must be a new or empty folder, or that of a run, got "),
    ],
)
def test_a_workdir_with_anything_of_others_in_it_is_left_as_it_is(
    workdir, words, tmp_path, monkeypatch
):
    config = smoke_of()
    monkeypatch.chdir(tmp_path)
    for name in ("flat", "cases"):
        (tmp_path / name).mkdir()
        for i in range(20):
            pixels = np.full((8, 8), i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    config.data = dict(name="folder", path="flat", image_size=8, batch_size=16)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"^{words}"):
        train.train(config, workdir)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "num_classes", "words"),
    [
        (
            ("cat", "dog"),
            10,
            r"must be 2, as the data have classes \(cat, dog\), got 10",
        ),
        (("a", "b", "c"), 2, r"must be 3, as the data have classes \(a, b, c\), got 2"),
        (
            ("photos",),
            10,
            r"must have labels .*num_classes = 10, .* all in 'photos'\.$",
        ),
        (
            (".",),
            2,
            r"must have labels .*num_classes = 2, got images without labels\.$",
        ),
    ],
)
def test_a_new_network_has_as_many_classes_as_its_data_name(
    names, num_classes, words, tmp_path
):
    for name, i in itertools.product(names, range(20)):
        (tmp_path / "own" / name).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "own" / name / f"{i}.png"
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(file)
    config = smoke_of(f"--config.model.num_classes={num_classes}")
    path = str(tmp_path / "own")
    config.data = dict(name="folder", path=path, image_size=8, batch_size=16)
    for init_from in (None, "runs/none"):
        with pytest.raises(ValueError, match=words):
            train.train(config, tmp_path / "run", init_from=init_from)
    if num_classes > len(names) > 1:  # a run that began so goes on so
        batches = data.load(**config.data)
        model = settings.build(config, 1).model
        consistency.check_fit(config, model, batches, fresh=False)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("smoke", ["label_dropout=1.0"], r"must be a number in \[0, 1\), got 1\.0"),
        ("smoke", ["label_dropout=-0.1"], r"must be a number in \[0, 1\), got -0\.1"),
        ("digits", ["label_dropout=0.1"], "0 for a network that takes no labels"),
        ("digits_classifier", ["label_dropout=0.1"], "network that takes no labels"),
        (
            "digits_labels",
            ["model.num_classes=9"],
            "below config.model.num_classes = 9, got 9",
        ),
        ("smoke", ["model.num_classes=9"], "below config.model.num_classes = 9, got 9"),
        ("digits_upsample", ["low_res_size=0"], "for a model with low_res .* got 0"),
        ("digits_upsample", ["model.low_res=False"], "and for no other, got 4"),
        ("digits", ["low_res_size=4"], "and for no other, got 4"),
        ("digits_upsample", ["low_res_size=3"], r"divide images \(8, 8, 1\), got 3"),
        ("digits_upsample", ["low_res_size=16"], r"divide images .*, got 16"),
        ("digits_upsample", ["low_res_size=-4"], "low_res_size must be .*, got -4"),
    ],
)
def test_what_a_network_cannot_be_told_is_refused_before_anything_is_written(
    name, overrides, words, tmp_path
):
    overrides = [f"--config.{o}" for o in (*overrides, "total_steps=1")]
    with pytest.raises(ValueError, match=words) as error:
        config = settings.load_config(f"configs/{name}.py", overrides)
        train.train(config, tmp_path / "run")
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


HIDES = ("--config.label_dropout=0.5", "--config.model.num_classes=10")


def enlarging():
    """The config of a network that sees 2 x 2 pixels too."""
    config = smoke_of("--config.low_res_size=2")
    with config.unlocked():
        config.model.low_res = True
    return config


def test_a_run_without_sample_grids_prepares_none():
    assert setup.make_setup(smoke_of("--config.sample_every=0")).preview is None


@pytest.mark.parametrize("config", [smoke_of(*HIDES), enlarging()], ids=["hide", "2"])
def test_pictures_are_of_all_labels_but_the_hidden_one_or_of_the_first_images(
    config, monkeypatch
):
    seen, images = [], np.zeros((1, 4, 8, 8, 1), np.uint8)

    def batches(bound, n, **options):
        seen.append(bound.rows)
        return [(images, None)]

    monkeypatch.setattr(pipeline.BoundSampler, "batches", batches)
    made = setup.make_setup(config)
    made.preview(types.SimpleNamespace(ema_params={"0.99": None}))
    (rows,) = seen
    if not config.low_res_size:
        np.testing.assert_array_equal(rows["label"], np.arange(10))
        return
    first = made.batches.batch(0)
    blocks = first["image"].reshape(16, 2, 4, 2, 4, 1) / 127.5 - 1
    np.testing.assert_allclose(rows["low_res"], blocks.mean(axis=(2, 4)), **F32)
    np.testing.assert_array_equal(rows["label"], first["label"])


@pytest.mark.slow
def test_a_run_that_hides_labels_and_enlarges_trains_and_draws(tmp_path):
    few = ("--config.total_steps=2", "--config.sample_every=2")
    config = smoke_of("--config.low_res_size=2", "--config.label_dropout=0.5", *few)
    config.model = dict(name="support.networks:Tiny", num_classes=11, low_res=True)
    state = train.train(config, tmp_path)
    assert int(state.step) == 2 and int(state.skipped) == 0
    assert np.isfinite(lines_of(tmp_path)[-1]["loss"])
    with Image.open(tmp_path / "samples" / "000002.png") as picture:
        assert np.asarray(picture).std() > 0


@pytest.mark.slow
def test_a_run_that_is_older_than_a_field_goes_on(whole, capsys, monkeypatch):
    record = checkpoint.load_record(whole[0])
    for name in ("label_dropout", "low_res_size"):
        del record["config"][name]
    monkeypatch.setattr(checkpoint, "load_record", lambda workdir: record)
    train.train(config_of(), whole[0])
    assert "has made its 12 steps already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"label_dropout: 0\.0 -> 0\.5\."):
        train.train(config_of("--config.label_dropout=0.5"), whole[0])


@pytest.mark.slow
def test_the_command_line_prints_one_sentence_and_exits_with_2(
    whole, tmp_path, monkeypatch, capsys
):
    workdir = ("--workdir", tmp_path / "run")
    wrong = command("train", *bad("--config.totl=1"), *workdir)
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "'totl'" in lines[0] and not (tmp_path / "run").exists()
    fails = functools.partial(failure, monkeypatch, capsys)
    out = ("--out", tmp_path / "out")
    assert "holds none" in fails(sample, *workdir, *out)
    here = ("--workdir", whole[0])
    assert "T = 10" in fails(sample, *here, *out, "--steps", 11)
    assert "holds none" in fails(evaluate, *workdir)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--sampler", "euler"], "--sampler must be one of"),
        (["--eta", "2"], "--eta must be in"),
        (["--eta", "0.5", "--sampler", "ddpm"], "--eta is for the samplers"),
        (["--ema", "0.5"], "ema must be one of"),
        (["--n", "0"], "--n must be an integer >= 1, got 0"),
        (["--steps", "0"], "steps must be in"),
        (["--spacing", "leading", "--steps", "5"], "spacing must be one of"),
    ],
)
def test_bad_sampling_options_are_named(whole, tmp_path, args, words, monkeypatch):
    argv = ["sample", "--workdir", str(whole[0]), "--out", str(tmp_path / "o"), *args]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError, match=words):
        sample.main()
    assert not (tmp_path / "o").exists()


def run_sample(monkeypatch, workdir, out, *args):
    argv = ["sample", "--workdir", workdir, "--out", out, "--steps", "4", *args]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    sample.main()


@pytest.mark.slow
def test_image_i_is_the_same_for_any_batch_size(whole, tmp_path, monkeypatch):
    options = ("--n", "7", "--eta", "1", "--seed", "3")
    run_sample(monkeypatch, whole[0], tmp_path / "a.npz", *options)
    run_sample(monkeypatch, whole[0], tmp_path / "b.npz", *options, "--batch-size", "3")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a["arr_0"].shape == (7, 8, 8, 1) and a["arr_0"].dtype == np.uint8
        # Other matrix shapes round differently: a grey level at a boundary may tip.
        difference = a["arr_0"].astype(int) - b["arr_0"].astype(int)
        assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 0.01
        np.testing.assert_array_equal(a["arr_1"], np.arange(7))


@pytest.mark.slow
def test_a_folder_gets_pngs_a_grid_and_the_denoising(whole, tmp_path, monkeypatch):
    for sampler in ("ddim", "ddpm"):
        out = tmp_path / sampler
        run_sample(monkeypatch, whole[0], out, "--n", "5", "--sampler", sampler)
        names = {p.name for p in out.iterdir()}
        assert {"00000.png", "00004.png", "sheets", "record.json"} <= names
        with Image.open(out / "sheets" / "denoising.gif") as gif:
            assert gif.n_frames == 4


@pytest.mark.slow
def test_the_gif_shows_any_number_of_steps(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "GIF_FRAMES", 2)
    run_sample(monkeypatch, whole[0], tmp_path, "--steps", "3", "--n", "2")
    with Image.open(tmp_path / "sheets" / "denoising.gif") as gif:
        assert gif.n_frames == 2


@pytest.mark.slow
def test_sigterm_from_outside_saves_and_ends_well(tmp_path):
    log = tmp_path / "out"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(
                "train",
                *("--config", tiny.CONFIG, "--workdir", tmp_path / "run"),
                "--config.total_steps=1000000",
            ),
            env=os.environ | {"PYTHONPATH": "tests"},  # of the network
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not metrics.exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, log.read_text()
    assert f"SIGTERM: saved step {checkpoint.latest_step(tmp_path / 'run')}" in (
        log.read_text()
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10", 35_746_307),
        pytest.param("cifar10_hybrid", 52_546_438, marks=pytest.mark.slow),
    ],
)
def test_the_published_networks_have_the_published_size(name, count):
    config = settings.load_config(f"configs/{name}.py")
    schedule = settings.make_schedule(config.schedule)
    objective = settings.make_objective(config.objective, schedule)
    model = settings.make_model(config.model, objective, 3)
    x, t = (
        jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32),
        jax.ShapeDtypeStruct((1,), np.float32),
    )
    params = jax.eval_shape(model.init, jax.random.key(0), x, t)
    assert sum(a.size for a in jax.tree.leaves(params)) == count


def test_workdirs_survive_a_relative_path(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(whole[0].parent)
    assert checkpoint.latest_step(pathlib.Path(whole[0].name)) == 12
