"""Fine-tuning: a run that begins with the weights of another run or of a file."""

import shutil
import sys

import jax
import numpy as np
import pytest
from support.features import refuses
from support.programs import train
from support.tiny_runs import (
    COSINE,
    ENCODER,
    UNET,
    make_run,
    tiny_config,
    write_images,
)

import jax_diffusion as jd
from jax_diffusion import config as configs
from jax_diffusion import data
from jax_diffusion.interop.exporting import export_run
from jax_diffusion.runtime import checkpoint, logs, sharding
from jax_diffusion.training import fine_tuning
from jax_diffusion.training.setup import make_setup

LABELED = dict(model=dict(num_classes=4))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    write_images(path, channels=1)
    return path


@pytest.fixture(scope="module")
def source(images, tmp_path_factory):
    """A trained run, whose two averages and parameters all differ."""
    workdir = tmp_path_factory.mktemp("source")
    config = tiny_config(images, ema_decays=(0.9, 0.5), ema_warmup=False, **LABELED)
    train.train(config, workdir)
    return workdir


def same(a, b):
    equal = jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b))
    return all(jax.tree.leaves(equal))


def begin(config, source):
    """The state that a training begins with, and the report."""
    setup = make_setup(config)
    weights = fine_tuning.load_weights(source, config, setup)
    shapes = jax.eval_shape(setup.init)
    shardings = sharding.state_sharding(setup.mesh, shapes)
    return fine_tuning.make_init(weights.params, setup, shardings)(), weights


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("ema", ["", ":0.5", ":none"])
def test_weights_are_kept_bit_for_bit_and_all_else_begins_anew(
    images, source, ema, fsdp, monkeypatch
):
    monkeypatch.setattr("jax_diffusion.runtime.sharding.MIN_SPLIT", 1)
    config = tiny_config(
        images, mesh=dict(fsdp=fsdp), ema_decays=(0.99, 0.7), **LABELED
    )
    state, weights = begin(config, f"{source}{ema}")
    name = {"": "0.9", ":0.5": "0.5", ":none": None}[ema]
    params = checkpoint.load_params(source, ema=name)
    assert same(state.params, params)
    assert all(same(average, params) for average in state.ema_params.values())
    assert state.ema_params.keys() == {"0.99", "0.7"} and int(state.step) == 0
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert moments and not any(np.any(a) for a in moments)
    kernels = [a for a in jax.tree.leaves(state.params) if a.ndim == 2]
    assert any(not a.sharding.is_fully_replicated for a in kernels) == (fsdp > 1)
    assert not weights.params  # the host has let go of them
    told = weights.record
    assert told["kept"] == told["parameters"] and not told["anew"]
    assert told["ema"] == (name or "none") and told["step"] == 2


@pytest.mark.slow
def test_training_begins_with_the_loss_of_the_source_and_not_with_that_of_chance(
    images, source, tmp_path
):
    config = tiny_config(images, total_steps=1, seed=3, **LABELED)
    train.train(config, tmp_path / "tuned", init_from=source)
    train.train(config, tmp_path / "random")
    setup = make_setup(config)
    params = checkpoint.load_params(source, ema="0.9")
    batch = setup.place(setup.batches.batch(0, setup.rows))
    _, metrics = jax.jit(setup.train_step)(setup.key, setup.start(params), batch)
    tuned, chance = (
        logs.read_metrics(tmp_path / name)[0]["loss"] for name in ("tuned", "random")
    )
    np.testing.assert_allclose(tuned, metrics["loss"], rtol=1e-5)
    assert abs(tuned - chance) > 0.01 * chance


@pytest.mark.slow
def test_a_fine_tuned_run_goes_on_without_its_source_and_says_where_it_came_from(
    images, source, tmp_path, capsys
):
    gone, workdir = tmp_path / "gone", tmp_path / "run"
    shutil.copytree(source, gone)
    config = tiny_config(images, total_steps=1, init_from=str(gone), **LABELED)
    train.train(config, workdir)
    assert f"init_from {gone}: EMA 0.9, step 2" in capsys.readouterr().out
    whole = train.train(
        tiny_config(images, total_steps=3, init_from=str(gone), **LABELED),
        tmp_path / "whole",
    )
    shutil.rmtree(gone)
    for steps, init_from in ((2, str(gone)), (3, "")):
        config = tiny_config(images, total_steps=steps, init_from=init_from, **LABELED)
        state = train.train(config, workdir)
        assert int(state.step) == steps
        record = checkpoint.load_record(workdir)
        assert record["init_from"]["source"] == record["config"]["init_from"]
        assert record["init_from"]["source"] == str(gone)
    assert same(state, whole)
    starts = logs.read_descriptions(workdir)
    assert [start["init_from"]["step"] for start in starts] == [2, 2, 2]
    config = tiny_config(images, total_steps=9, init_from=str(source), **LABELED)
    sentence = refuses(train.train, config, workdir)
    assert sentence.startswith(f"init_from must be left out or {str(gone)!r}, as then")
    sentence = refuses(train.train, config, source)
    assert sentence.startswith("init_from must be left out, since")
    assert checkpoint.latest_step(workdir) == 3


def classes(names=None, count=4, hidden=False):
    keys = [*range(count)]
    keys[: len(names or ())] = names or ()
    return fine_tuning.Classes({"label/embedding": 0}, keys + ["(hidden)"] * hidden)


@pytest.mark.parametrize(
    ("ours", "theirs", "rows"),
    [
        (classes(), classes(), {0: 0, 1: 1, 2: 2, 3: 3}),
        (classes(count=5), classes(), {}),  # nobody knows which is which
        (classes(hidden=True), classes(), {0: 0, 1: 1, 2: 2, 3: 3}),
        (classes(), classes(hidden=True), {0: 0, 1: 1, 2: 2, 3: 3}),
        (classes(count=5, hidden=True), classes(hidden=True), {5: 4}),
        (classes(["b", "a"], 2), classes(["a", "b"], 2), {0: 1, 1: 0}),
        (classes(["b", "new"], 3), classes(["a", "b", "c"], 3), {0: 1}),
        (classes(["b"], 1, True), classes(["a", "b"], 2, True), {0: 1, 1: 2}),
        (classes(["a", "b"], 2), classes(count=2), {0: 0, 1: 1}),
        (classes(["a", "b"], 2), classes(count=3), {}),
        (classes(["1", "2", "3"], 3), classes(count=3), {0: 1, 1: 2}),
        (classes(count=3), classes(["1", "2", "3"], 3), {1: 0, 2: 1}),
        (
            classes(["0", "1"], 2, True),
            classes(count=2, hidden=True),
            {0: 0, 1: 1, 2: 2},
        ),
    ],
)
def test_rows_of_classes_are_matched_by_name_or_by_number(ours, theirs, rows):
    assert fine_tuning.match_rows(ours, theirs) == rows


@pytest.mark.parametrize(
    ("changes", "anew", "left_out"),
    [
        (dict(model=dict(num_classes=6)), "label/embedding of 0, 1, 2, 3, 4, 5", []),
        (LABELED | dict(label_dropout=0.1), "label/embedding of (hidden)", []),
        ({}, None, ["label/embedding"]),
    ],
)
def test_another_number_of_classes_keeps_all_else_and_says_what_begins_anew(
    images, source, changes, anew, left_out
):
    config = tiny_config(images, **changes)
    state, weights = begin(config, str(source))
    chance = make_setup(config).init().params
    params = checkpoint.load_params(source, ema="0.9")
    table = params.pop("label")["embedding"]
    assert same({k: state.params[k] for k in params}, params)
    assert weights.record["left_out"] == left_out
    assert weights.record["anew"] == ([anew] if anew else [])
    if anew:
        kept = 4 if "label_dropout" in changes else 0
        now, drawn = (p["label"]["embedding"] for p in (state.params, chance))
        assert same(now[:kept], table[:kept]) and same(now[kept:], drawn[kept:])
        assert f"begin anew: {anew}" in weights.report()
        lost = now.size - 4 * kept
        assert weights.record["kept"] == weights.record["parameters"] - lost


def test_rows_go_to_the_class_of_the_same_name(images, source, monkeypatch):
    ours, theirs = ("ant", "cat", "dog", "yak"), ("cat", "dog", "cow", "ant")
    monkeypatch.setattr(data.Batches, "class_names", ours, raising=False)
    run = jd.load_run(source)
    object.__setattr__(run, "class_names", theirs)
    state, weights = begin(tiny_config(images, **LABELED), run)
    table, old = state.params["label"]["embedding"], run.params["label"]["embedding"]
    for name in {*ours} & {*theirs}:
        assert same(table[ours.index(name)], old[theirs.index(name)])
    assert weights.record["anew"] == ["label/embedding of yak"]
    assert not any(same(table[3], row) for row in old)


def test_rows_of_version_0_1_go_to_the_names_of_its_own_folder(
    images, source, monkeypatch
):
    """That version sorted 2, 10, 9, 1 as text."""
    monkeypatch.setattr(data.Batches, "class_names", ("1", "2", "9", "10"))
    run = jd.load_run(source)
    old = run.params["label"]["embedding"]
    for then, rows in (
        (("1", "10", "2", "9"), [0, 2, 3, 1]),
        ((), []),  # the folder is not there any more
    ):
        monkeypatch.setattr(fine_tuning, "old_names", lambda run, then=then: then)
        state, weights = begin(tiny_config(images, **LABELED), run)
        table = state.params["label"]["embedding"]
        assert bool(weights.record["anew"]) == (not rows)
        for ours, theirs in enumerate(rows):
            assert same(table[ours], old[theirs])
        assert rows or not any(same(a, b) for a in table for b in old)


@pytest.mark.slow
def test_a_network_without_labels_gets_them(images, source, tmp_path):
    train.train(tiny_config(images, total_steps=1), tmp_path / "plain")
    state, weights = begin(tiny_config(images, **LABELED), str(tmp_path / "plain"))
    params = checkpoint.load_params(tmp_path / "plain", ema="0.9")
    assert same({k: state.params[k] for k in params}, params)
    assert weights.record["anew"] == ["label/embedding of 0, 1, 2, 3"]


def test_what_the_source_had_otherwise_is_told(images, source):
    config = tiny_config(images, objective=dict(mean_type="v"), **LABELED)
    _, weights = begin(config, str(source))
    assert weights.record["differs"] == ["objective.mean_type: eps -> v"]
    assert "differs from it: objective.mean_type: eps -> v" in weights.report()


@pytest.mark.parametrize(
    ("model", "axes"),
    [
        (UNET | dict(num_classes=5), {"label/embedding": 0}),
        (UNET, {}),
        (
            ENCODER | dict(pool="adaptive"),
            {"conv_logits/kernel": 1, "conv_logits/bias": 0},
        ),
        (
            ENCODER | dict(pool="attention"),
            {"pool/c_proj/kernel": 1, "pool/c_proj/bias": 0},
        ),
        (ENCODER | dict(pool="spatial_v2"), {"logits/kernel": 1, "logits/bias": 0}),
    ],
)
def test_the_arrays_with_a_row_for_each_class_are_found(model, axes):
    config = dict(schedule=COSINE, objective=None, model=model, label_dropout=0.0)
    if "num_labels" not in model:
        config["objective"] = dict(mean_type="eps")
    network = configs.build(config, 1).model
    found = fine_tuning.classes_of(network, (8, 8, 1), 0.0, ["a"])
    assert found.axes == axes
    count = model.get("num_labels", model.get("num_classes"))
    assert found.keys == (["a", *range(1, count)] if count else [])


def test_a_converted_run_is_a_source(tmp_path, images):
    model = dict(name="support.networks:Tiny", num_classes=4)
    eps = dict(mean_type="eps", var_type="fixed_small", loss="l2")
    workdir = make_run(
        tmp_path / "converted", shape=(8, 8, 1), model=model, objective=eps
    )
    state, weights = begin(tiny_config(images, **LABELED), str(workdir))
    assert same(state.params, checkpoint.load_params(workdir, ema=None))
    assert f"init_from {workdir}: step 0" in weights.report()


def test_our_file_and_a_loaded_run_are_as_good_as_the_workdir(images, source, tmp_path):
    run, file = jd.load_run(source), tmp_path / "run.safetensors"
    export_run(run, "safetensors", file)
    config = tiny_config(images, **LABELED)
    states = [begin(config, start)[0] for start in (str(source), str(file), run)]
    assert same(states[0], states[1]) and same(states[0], states[2])


def test_a_file_of_another_code_is_read_by_the_names_of_its_tensors(tmp_path):
    eps = dict(objective=dict(mean_type="eps", var_type="fixed_small", loss="l2"))
    model = UNET | dict(channels=32, num_groups=32, num_res_blocks=1)  # their layout
    workdir = make_run(tmp_path / "run", shape=(8, 8, 1), model=model, **eps)
    export_run(jd.load_run(workdir), "openai", tmp_path / "mine.pt")
    write_images(tmp_path / "images.npz", channels=1)
    config = tiny_config(tmp_path / "images.npz", **eps)
    config.model = model
    run = fine_tuning.load_source(str(tmp_path / "mine.pt"), config)
    assert same(run.params, checkpoint.load_params(workdir, ema=None))


@pytest.mark.slow
def test_the_command_line_begins_goes_on_and_changes_in_words_of_its_flags(
    images, source, tmp_path, monkeypatch, capsys
):
    file, workdir = tmp_path / "config.py", tmp_path / "run"
    file.write_text(
        "from support.tiny_runs import tiny_config\n"
        "def get_config():\n"
        f"    return tiny_config({str(images)!r}, model=dict(num_classes=4))\n"
    )

    def run(*args):
        argv = ["train", "--config", file, "--workdir", workdir, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        train.main()

    faster = "--config.optimizer.lr=0.5"
    sentences = [
        refuses(run, "--init-from", tmp_path / "none"),
        refuses(run, "--init-from", source, "--allow-change", "optimizer.rl"),
    ]
    assert not workdir.exists()
    run("--init-from", f"{source}:0.5")
    assert f"init_from {source}:0.5: EMA 0.5, step 2" in capsys.readouterr().out
    sentences.append(refuses(run, "--init-from", source))
    longer = "--config.total_steps=3"
    assert "--allow-change optimizer.lr; " in refuses(run, longer, faster)
    run(longer, faster, "--config.log_every=3", "--allow-change", "optimizer.lr,seed")
    assert "from step 2 on: optimizer.lr: 0.01 -> 0.5" in capsys.readouterr().out
    sentences.append(refuses(run, "--allow-change", "init_from"))
    heads = ("--init-from must", "--allow-change must")
    assert all(sentence.startswith(heads) for sentence in sentences), sentences
    assert checkpoint.load_record(workdir)["init_from"]["ema"] == "0.5"


@pytest.mark.parametrize(
    ("start", "changes", "words"),
    [
        ("{source}x", {}, "source0x', which is not there."),
        ("{source}:0.3", {}, "ema must be one of ['0.5', '0.9', 'none'], got '0.3'"),
        ("{source}/run.json", {}, "run.json must be"),
        ("{source}/samples", {}, "config.json must be"),
        ("{source}:", {}, "ema must be"),
        (
            "{source}",
            dict(model=dict(channels=8, num_classes=4)),
            "6 arrays of 7 that do not fit: inside/bias (4,) -> (8,); ",
        ),
        (
            "{source}",
            dict(model=dict(channels=8, num_classes=4)),
            "model.channels: (none) -> 8.",
        ),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_before_anything_is_written(
    images, source, tmp_path, start, changes, words
):
    changes = {**LABELED, **changes}
    config = tiny_config(images, init_from=start.format(source=source), **changes)
    sentence = refuses(train.train, config, tmp_path / "run")
    assert sentence.startswith("config.init_from must ") and words in sentence
    assert not (tmp_path / "run").exists()
