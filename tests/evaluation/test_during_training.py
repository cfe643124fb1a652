"""Scores during training: the same as `evaluate` finds; the best average is kept."""

import dataclasses
import json
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from support import tiny
from support.jobs import evaluations, lines_of

import jax_diffusion as jd
from jax_diffusion import config as settings
from jax_diffusion.config import FORMAT
from jax_diffusion.evaluate import main
from jax_diffusion.evaluation import during_training, feature_classifier
from jax_diffusion.evaluation.during_training import current_fields, make_watch
from jax_diffusion.pipeline import load_run
from jax_diffusion.runtime import checkpoint
from jax_diffusion.train import train
from jax_diffusion.training import TrainState
from jax_diffusion.training.reporting import Reporter
from jax_diffusion.training.setup import make_setup

SCORED = [
    *("--config.total_steps=8", "--config.log_every=4", "--config.save_every=2"),
    *("--config.ema_decays=(0.5, 0.9)", "--config.ema_warmup=False"),
    "--config.optimizer.lr=0.003",
    *("--config.eval_every=2", "--config.evaluation.n=70"),
    *("--config.evaluation.steps=3", "--config.evaluation.bpd_images=20"),
]
NAMES = [f"pixel_distance_n70_{ema}" for ema in ("0.5", "0.9")]
BITS = [f"bits_per_dim_n20_{ema}" for ema in ("0.5", "0.9")]


def config_of(*overrides):
    return settings.load_config(tiny.CONFIG, [*SCORED, *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    train(config_of(), workdir)
    return workdir


def scored(workdir):
    """{step: {name: score}}."""
    rows = {row["step"]: row for row in lines_of(workdir)}
    return {s: {k: r[k] for k in (*NAMES, *BITS) if k in r} for s, r in rows.items()}


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: rng.normal(scale=0.1, size=a.shape).astype(np.float32), params
    )


@pytest.mark.slow
def test_every_average_is_scored_as_by_evaluate_and_the_best_is_kept(tmp_path):
    """Without a training: of averages that are random numbers."""
    config = config_of()
    setup = make_setup(config)
    record = {"config": json.loads(config.to_json()), "format": FORMAT, "window": []}
    record["image_shape"] = [*setup.batches.image_shape]
    described = (setup.model, setup.objective, setup.batches, setup.mesh)
    watch = make_watch(config, tmp_path, record, *described)
    state = setup.init()
    emas = {ema: random_like(state.params, i) for i, ema in enumerate(("0.5", "0.9"))}
    state = dataclasses.replace(state, ema_params=emas)
    found = watch(2, state)
    assert found.keys() == {*NAMES, *BITS} and len({*found.values()}) == 4
    name = min(NAMES, key=lambda k: found[k])
    best = load_run(tmp_path / "best")
    assert (best.ema, best.step) == (name.rpartition("_")[2], 2)
    equal = jax.tree.map(np.array_equal, best.params, emas[best.ema])
    assert all(jax.tree.leaves(equal))
    told = {"metric": "pixel_distance_n70", "value": found[name]}
    told |= {"step": 2, "ema": best.ema}
    assert checkpoint.load_record(tmp_path / "best")["best"] == told
    scores = jd.evaluate(
        best, metrics="pixel_distance,bpd", n=70, steps=3, bpd_images=20
    ).record["scores"]
    for ours, theirs in ((name, "pixel_distance"), (bits_of(name), "bits_per_dim")):
        np.testing.assert_allclose(found[ours], scores[theirs], rtol=1e-6)
    # A later state that is worse does not take its place.
    worst = max(NAMES, key=lambda k: found[k]).rpartition("_")[2]
    later = dataclasses.replace(state, ema_params=dict.fromkeys(emas, emas[worst]))
    watch(4, later)
    assert checkpoint.latest_step(tmp_path / "best") == 2


def bits_of(name):
    return BITS[NAMES.index(name)]


@pytest.mark.slow
def test_every_average_has_scores_when_they_are_due(whole):
    found = scored(whole)
    assert [*found] == [2, 4, 6, 8]
    for scores in found.values():
        assert scores.keys() == {*NAMES, *BITS}
        assert all(np.isfinite(v) for v in scores.values())
        assert len({*scores.values()}) == 4


@pytest.mark.slow
def test_scores_are_those_that_evaluate_finds(whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for ema in ("0.5", "0.9"):
        argv = ["evaluate", "--workdir", str(workdir), "--ema", ema]
        argv += ["--metrics", "pixel_distance,bpd", "--n", "70", "--steps", "3"]
        monkeypatch.setattr(sys, "argv", [*argv, "--bpd-images", "20"])
        main()
    for ema, record in zip(("0.5", "0.9"), evaluations(workdir), strict=True):
        at_end = scored(whole)[8]
        for ours, theirs in (
            (f"pixel_distance_n70_{ema}", "pixel_distance"),
            (f"bits_per_dim_n20_{ema}", "bits_per_dim"),
        ):
            np.testing.assert_allclose(
                at_end[ours], record["scores"][theirs], rtol=1e-6
            )


@pytest.mark.slow
def test_the_best_average_is_kept_as_a_run_of_its_own(whole):
    all_scores = {
        (step, name): scores[name]
        for step, scores in scored(whole).items()
        for name in NAMES
    }
    step, name = min(all_scores, key=lambda k: all_scores[k])
    assert checkpoint.latest_step(whole / "best") == step
    best = load_run(whole / "best")
    assert best.ema == name.rpartition("_")[2]
    told = checkpoint.load_record(whole / "best")["best"]
    assert told == {
        **{"metric": "pixel_distance_n70", "value": all_scores[step, name]},
        **{"step": step, "ema": best.ema},
    }
    # All checkpoints are still there: cut off the later ones to read that step's.
    whole_again = whole.parent / "cut"
    shutil.copytree(whole, whole_again)
    for later in range(step + 1, 9):
        shutil.rmtree(whole_again / "checkpoints" / str(later), ignore_errors=True)
    params = load_run(whole_again, best.ema).params
    equal = jax.tree.map(np.array_equal, params, best.params)
    assert all(jax.tree.leaves(equal))


@pytest.mark.slow
def test_a_stopped_and_resumed_run_has_the_same_scores_and_best(
    whole, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    write = Reporter.write

    def stopping(self, step, numbers):
        write(self, step, numbers)
        if step == 6 and not (workdir / "stopped").exists():
            (workdir / "stopped").touch()
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Reporter, "write", stopping)
    train(config_of(), workdir)
    assert checkpoint.latest_step(workdir) == 6
    train(config_of(), workdir)
    assert lines_of(workdir) == lines_of(whole)
    assert (
        checkpoint.load_record(workdir / "best")["best"]
        == (checkpoint.load_record(whole / "best")["best"])
    )


@pytest.mark.slow
def test_other_scores_begin_with_a_new_best(whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for later in (6, 8):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    train(config_of("--config.evaluation.n=80"), workdir)
    assert checkpoint.load_record(whole / "best")["best"]["step"] in (6, 8)
    told = checkpoint.load_record(workdir / "best")["best"]
    rows = {row["step"]: row for row in lines_of(workdir)}
    values = {
        (step, ema): rows[step][f"pixel_distance_n80_{ema}"]
        for step in (6, 8)
        for ema in ("0.5", "0.9")
    }
    assert told["value"] == min(values.values())
    assert values[told["step"], told["ema"]] == told["value"]


@pytest.mark.slow
def test_the_distance_of_a_classifier_needs_no_file(tmp_path, monkeypatch):
    """It is trained when it is wanted first, where `evaluate` finds it."""
    monkeypatch.setattr(feature_classifier, "MIN_STEPS", 60)
    config = config_of(
        "--config.evaluation.metric=classifier_distance",
        "--config.total_steps=2",
        "--config.evaluation.bpd_images=0",
    )
    train(config, tmp_path)
    (row,) = lines_of(tmp_path)
    assert row["cnn_fd_n70_0.9"] > 0
    assert (tmp_path / "evaluation" / "classifier.npz").exists()
    assert checkpoint.latest_step(tmp_path / "best") == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.evaluation.metric=fit"], "config.evaluation.metric must be one of"),
        (["--config.evaluation.n=1"], "config.evaluation.n must be an integer in"),
        (["--config.evaluation.steps=11"], "steps must be in"),
        (["--config.evaluation.sampler=euler"], "must be one of .* got 'euler'"),
        (["--config.eval_every=-1"], "eval_every must be an integer >= 0"),
    ],
)
def test_scores_that_cannot_be_made_stop_the_run_before_it_begins(
    overrides, words, tmp_path
):
    with pytest.raises(ValueError, match=words):
        train(config_of(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_evaluated_where_the_config_does_not_ask_for_it(tmp_path):
    setup = make_setup(config_of("--config.eval_every=0"))
    described = (setup.model, setup.objective, setup.batches, setup.mesh)
    config = config_of("--config.eval_every=0")
    assert make_watch(config, tmp_path, {}, *described) is None


def test_fields_of_config_evaluation_are_read_by_their_old_names():
    old = dict(metric="classifier_distance", bits_images=20, n=70)
    new = dict(metric="cnn_fd", bpd_images=20, n=70)
    assert current_fields(old) == current_fields(new) == new
    both = dict(old, bpd_images=0)  # as a config is completed
    assert current_fields(both) == new
    for wrong, words in (
        (dict(old, bpd_images=30), "bpd_images without bits_images"),
        (None, "config.evaluation must be a group of fields, got None"),
    ):
        with pytest.raises(ValueError, match=words):
            current_fields(wrong)


def test_a_classifier_of_noisy_images_has_no_samples_to_score(tmp_path):
    config = settings.load_config(
        "configs/digits_classifier.py", ["--config.eval_every=10"]
    )
    with pytest.raises(ValueError, match="eval_every must be 0 for a classifier"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def keep_best(workdir, *steps):
    """What a kill between a save and the removal of the one before leaves."""
    record = {"config": {"evaluation": {"metric": "pixel_distance"}}}
    with checkpoint.make_manager(workdir / "best", keep=None) as manager:
        for step in steps:
            best = {"step": step, "value": 1.0 / step}
            checkpoint.save(
                manager, step, {"params": np.ones(2)}, record | {"best": best}
            )
    return record


def bests(workdir):
    return sorted(int(p.name) for p in (workdir / "best" / "checkpoints").iterdir())


def test_one_best_is_kept_after_any_kill(tmp_path):
    record = keep_best(tmp_path, 2, 4)
    assert bests(tmp_path) == [2, 4]
    (tmp_path / "best.removed").mkdir()  # a kill in the midst of removing
    best = during_training.BestCheckpoint(tmp_path, record)
    assert bests(tmp_path) == [4] and best._best["step"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_a_damaged_best_does_not_stop_the_run(tmp_path):
    record = keep_best(tmp_path, 2)
    (tmp_path / "best" / "checkpoints" / "2" / "record" / "metadata").unlink()
    with pytest.warns(UserWarning, match="begins anew"):
        best = during_training.BestCheckpoint(tmp_path, record)
    state = TrainState(6, {}, {"0.9": np.zeros(2)}, {}, {}, 0)
    scores = during_training.PeriodicScores("d", {"0.9": 3.0}, "b", {})
    best.offer(6, state, scores)
    assert bests(tmp_path) == [6]
    assert checkpoint.load_record(tmp_path / "best")["best"]["value"] == 3.0
