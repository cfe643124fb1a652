"""Averages by power functions: weights, snapshots, and what is reconstructed."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import convert, evaluate, failure, run_main, sample, train
from support.tiny_runs import tiny_config, write_images

import jax_diffusion as jd
from jax_diffusion import data
from jax_diffusion.runtime import checkpoint, snapshots
from jax_diffusion.runtime.resumable_npz import ResumableNpz
from jax_diffusion.training import averages, post_hoc_ema

WIDTHS = (0.05, 0.1)
FIELDS = dict(ema_decays=(), ema_widths=WIDTHS, total_steps=24, save_every=2)
FIELDS |= dict(log_every=6, optimizer=dict(lr=3e-2))


def kept_averages(trajectory, widths, ema_decays=()):
    """The averages after every update: by name, [updates, ...]."""
    rates = dict(ema_decays=ema_decays, ema_warmup=True, ema_widths=widths)
    names = averages.average_names(ema_decays, widths)

    def update(kept, inputs):
        kept = averages.update(kept, *inputs, **rates)
        return kept, kept

    start = dict.fromkeys(names, jnp.full(trajectory.shape[1:], 7.0))
    steps = jnp.arange(len(trajectory))
    return jax.lax.scan(update, start, (jnp.asarray(trajectory), steps))[1]


def weights_after(width, t):
    """What each of t updates weighs in the average, as it is kept."""
    return np.asarray(
        kept_averages(np.eye(t, dtype=np.float32), [width])[averages.width_name(width)][
            -1
        ]
    )


@pytest.mark.parametrize("width", [0.03, 0.1, 0.28])
def test_an_average_weighs_update_t_in_proportion_to_t_to_the_gamma(width):
    weights, t = weights_after(width, 400), np.arange(1, 401)
    np.testing.assert_allclose(weights.sum(), 1, atol=2e-6)
    gamma = averages.gamma_from_width(width)
    late = t > 200  # where an update is short beside the time before
    profile = weights[late] / (t[late] - 0.5) ** gamma
    np.testing.assert_allclose(profile / profile[-1], 1, rtol=2e-3)


@pytest.mark.parametrize("width", [0.03, 0.1, 0.28])
def test_a_width_is_the_standard_deviation_of_the_weights_over_the_last_update(width):
    weights, t = weights_after(width, 400), np.arange(1, 401) - 0.5
    mean = weights @ t
    std = np.sqrt(weights @ (t - mean) ** 2)
    np.testing.assert_allclose(std / 400, width, rtol=2e-3)


def random_walk(count=480):
    steps = np.random.default_rng(0).normal(size=(count, 16))
    return np.cumsum(steps, axis=0).astype(np.float32)


@pytest.fixture(scope="module")
def walk():
    trajectory = random_walk()
    widths = (*WIDTHS, 0.03, 0.15, 0.2)
    return trajectory, jax.device_get(kept_averages(trajectory, widths))


def snapshots_of(kept, every, until=480):
    return {
        (step, width): {"w": kept[averages.width_name(width)][step - 1]}
        for step in range(every, until + 1, every)
        for width in WIDTHS
    }


def reconstruct(averages, *wanted):
    return post_hoc_ema.average_of_width(averages, averages.get, *wanted)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_that_is_kept_is_reconstructed_as_it_is(walk, width):
    _, kept = walk
    found = reconstruct(snapshots_of(kept, 40), width, 480)["w"]
    expected = kept[averages.width_name(width)][-1]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert found.dtype == np.float32


@pytest.mark.parametrize("at_step", [480, 300])
@pytest.mark.parametrize("width", [0.03, 0.15, 0.2])
def test_another_width_is_as_far_off_as_its_profile_allows(walk, width, at_step):
    """By the inequality of Cauchy and Schwarz, around any constant."""
    trajectory, kept = walk
    places = snapshots_of(kept, 20)
    found = reconstruct(places, width, at_step)["w"]
    direct = kept[averages.width_name(width)][at_step - 1]
    used = sorted(place for place in places if place[0] <= at_step)
    residual = post_hoc_ema.fit_profile(*np.transpose(used), width, at_step)[1]
    size = post_hoc_ema.profile_product(at_step, width, at_step, width)
    path = np.float64(trajectory[:at_step])
    around = np.sum((path - direct) ** 2, axis=0)
    bound = residual * np.sqrt(size * around)
    error = np.abs(found - direct)
    assert (error <= bound + 1e-4).all() and residual < 0.1
    assert error.max() > 0.001 * bound.max()  # it says something
    others = [kept[averages.width_name(w)][at_step - 1] for w in WIDTHS]
    assert error.max() < 0.2 * min(np.abs(direct - one).max() for one in others)


def test_the_average_of_an_earlier_step_needs_no_later_snapshot(walk):
    _, kept = walk
    early, all_of_them = snapshots_of(kept, 20, 240), snapshots_of(kept, 20)
    found = [reconstruct(s, 0.15, 240)["w"] for s in (early, all_of_them)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("width", "every", "words"),
    [
        (0.3, 20, r"ema_width must be a number in \(0, 0\.28\], got 0\.3\."),
        (0.0, 20, "ema_width must be"),
        (float("nan"), 20, "ema_width must be"),
        (0.01, 40, r"ema_width must be one .* got 0\.01, .* \(snapshots 12, widths"),
        (0.28, 40, r"got 0\.28, which is 2\d% off"),
        (0.1, 500, "must be of a run with snapshots .* got 0.1 and none until"),
    ],
)
def test_a_width_that_the_snapshots_do_not_give_is_refused(walk, width, every, words):
    with pytest.raises(ValueError, match=words):
        reconstruct(snapshots_of(walk[1], every), width, 480)


def test_snapshots_that_stay_are_spread_over_the_run():
    taken = []
    for step in range(1, 300):
        taken.append(step)
        if len(taken) > 12:
            taken.remove(snapshots.superfluous(taken))
            gaps = np.diff([0, *taken])
            assert taken[-1] == step and gaps.max() <= 3 * step / 12
    assert len(taken) == 12


def test_decays_are_as_before_beside_widths():
    trajectory = random_walk(20)
    alone = kept_averages(trajectory, (), (0.9, 0.5))
    beside = kept_averages(trajectory, WIDTHS, (0.9, 0.5))
    for name, average in alone.items():
        np.testing.assert_array_equal(average, beside[name])


# Runs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    write_images(path, size=4, channels=1)
    return path


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train.train(tiny_config(images, **FIELDS), workdir)
    return workdir


@pytest.fixture(scope="module")
def others(images, tmp_path_factory):
    """The same run, that keeps other averages."""
    workdir = tmp_path_factory.mktemp("others")
    fields = FIELDS | dict(ema_widths=(0.07, 0.15), ema_decays=(0.9,))
    train.train(tiny_config(images, **fields), workdir)
    return workdir


@pytest.fixture(scope="module")
def thinned(images, tmp_path_factory):
    """The same run with room for six snapshots: after 20 steps, and the whole."""
    workdirs = {n: tmp_path_factory.mktemp(f"thinned_{n}") for n in (20, 24)}
    for n, workdir in workdirs.items():
        fields = FIELDS | dict(total_steps=n, ema_snapshots=6)
        train.train(tiny_config(images, **fields), workdir)
    return workdirs


def trees_of(workdir):
    """All snapshots of a run, by step and name."""
    return {
        (step, name): checkpoint.load_params_at(
            workdir / snapshots.FOLDER, step, ema=name
        )
        for step in snapshots.steps(workdir)
        for name in map(averages.width_name, WIDTHS)
    }


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.mark.slow
def test_a_run_loads_with_the_widths_of_its_config(run):
    first, second = (jd.load_run(run, ema_width=width) for width in WIDTHS)
    assert jd.load_run(run).ema == first.ema == "width=0.05" and first.step == 24
    for loaded, name in ((first, "width=0.05"), (second, "width=0.1")):
        assert_same(loaded.params, checkpoint.load_params(run, ema=name))
        assert_same(loaded.params, jd.load_run(run, name).params)
    assert snapshots.steps(run) == [*range(2, 25, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.07, 0.15])
def test_a_reconstructed_width_is_close_to_one_that_was_kept(run, others, width):
    direct = jd.load_run(others, f"width={width}").params
    found, last = jd.load_run(run, ema_width=width), jd.load_run(run, "none").params
    assert found.ema == f"width={width}" and found.step == 24

    def distance(params):
        parts = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), params, direct)
        return np.sqrt(sum(jax.tree.leaves(parts)))

    assert distance(found.params) < 0.05 * distance(last)
    assert distance(found.params) < 0.2 * distance(jd.load_run(run).params)


@pytest.mark.slow
def test_a_stopped_and_resumed_run_has_the_same_averages_and_snapshots(
    run, images, tmp_path, monkeypatch
):
    batch, config = data.Batches.batch, tiny_config(images, **FIELDS)
    for stop in (3, 8):  # after a step with a snapshot, and after one without

        def signalling_batch(self, i, rows=None, stop=stop):
            if i == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return batch(self, i, rows)

        monkeypatch.setattr(data.Batches, "batch", signalling_batch)
        assert int(train.train(config, tmp_path).step) == stop + 1
        monkeypatch.undo()
    train.train(config, tmp_path)
    assert_same(trees_of(tmp_path), trees_of(run))
    for name in ("width=0.05", "width=0.1"):
        found = [checkpoint.load_params(each, ema=name) for each in (tmp_path, run)]
        assert_same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["checkpoint", "snapshot"])
def test_a_kill_between_snapshot_and_checkpoint_leaves_the_same_snapshots(
    run, thinned, images, tmp_path, lost
):
    workdir = shutil.copytree(thinned[20], tmp_path / "run")
    folder = workdir if lost == "checkpoint" else workdir / snapshots.FOLDER
    shutil.rmtree(folder / "checkpoints" / "20")
    train.train(tiny_config(images, **FIELDS, ema_snapshots=6), workdir)
    assert len(snapshots.steps(workdir)) == 6
    assert_same(trees_of(workdir), trees_of(thinned[24]))
    kept = trees_of(run)
    for place, tree in trees_of(workdir).items():
        assert_same(tree, kept[place])


@pytest.mark.slow
def test_averages_that_are_split_over_devices_are_reconstructed(
    run, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("jax_diffusion.runtime.sharding.MIN_SPLIT", 1)
    config = tiny_config(images, mesh=dict(fsdp=4), **FIELDS)
    state = train.train(config, tmp_path)
    kernels = jax.tree.leaves(state.ema_params["width=0.1"])
    assert any(not a.sharding.is_fully_replicated for a in kernels)
    for width in (0.1, 0.15):
        found, alone = (jd.load_run(w, ema_width=width) for w in (tmp_path, run))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            *(found.params, alone.params),
        )


@pytest.mark.slow
def test_a_run_that_is_older_than_widths_loads_and_goes_on(
    images, tmp_path, monkeypatch
):
    config = tiny_config(images)
    train.train(config, tmp_path)
    record = checkpoint.load_record(tmp_path)
    for name in ("ema_widths", "ema_snapshots"):
        del record["config"][name]
    monkeypatch.setattr(checkpoint, "load_record", lambda workdir: record)
    assert jd.load_run(tmp_path).ema == "0.9"
    assert not (tmp_path / snapshots.FOLDER).exists()
    state = train.train(tiny_config(images, total_steps=3), tmp_path)
    assert int(state.step) == 3
    with pytest.raises(ValueError, match="ema_width must be left out for a run whose"):
        jd.load_run(tmp_path, ema_width=0.1)


@pytest.mark.slow
def test_the_best_average_may_be_one_by_a_power_function(images, tmp_path):
    fields = dict(eval_every=2, evaluation=dict(n=64, steps=2, reference=60))
    train.train(tiny_config(images, **FIELDS | dict(total_steps=4), **fields), tmp_path)
    best = jd.load_run(tmp_path / "best")
    assert best.ema in ("width=0.05", "width=0.1")
    with pytest.raises(ValueError, match=r"ema_width must be one .* \(snapshots 1, "):
        jd.load_run(tmp_path / "best", ema_width=0.2)


@pytest.mark.slow
def test_evaluate_scores_several_widths_and_records_each(run, monkeypatch, capsys):
    flags = ("--workdir", run, "--metrics", "bpd", "--bpd-images", 3)
    run_main(monkeypatch, evaluate, *flags, "--ema-width", "0.05,0.07,0.1")
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].split()[:2] == ["ema_width", "bits_per_dim"]
    assert [row.split()[0] for row in table[1:]] == ["0.05", "0.07", "0.1"]
    records = []
    for width in (0.05, 0.07, 0.1):
        path = run / "evaluation" / f"width={width}" / "scores.json"
        records += json.loads(path.read_text())["evaluations"]
    emas = [record["network"]["ema"] for record in records]
    assert emas == ["width=0.05", "width=0.07", "width=0.1"]
    values = [record["scores"]["bits_per_dim"] for record in records]
    assert [f"{value:.6g}" for value in values] == [r.split()[1] for r in table[1:]]
    assert len({*values}) == 3
    scores = jd.evaluate(jd.load_run(run, "width=0.07"), metrics="bpd", bpd_images=3)
    np.testing.assert_allclose(scores.record["scores"]["bits_per_dim"], values[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*needs more than")
def test_a_killed_evaluation_of_widths_goes_on_where_it_was(
    run, tmp_path, monkeypatch, capsys
):
    """Killed among the samples of the second: the first is not computed again."""
    flags = ("--workdir", run, "--metrics", "pixel_distance", "--steps", 2)
    flags += ("--n", 48, "--batch-size", 16, "--ema-width", "0.05,0.07,0.1", "--out")
    run_main(monkeypatch, evaluate, *flags, tmp_path / "whole")
    add, written = ResumableNpz.add, []

    def counted(self, arrays):
        written.append((self.folder.parent.name, self.out.stem))
        once = "killed" not in written
        if once and written.count(("width=0.07", "samples")) == 2:
            raise KeyboardInterrupt
        add(self, arrays)

    monkeypatch.setattr(ResumableNpz, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, evaluate, *flags, tmp_path / "killed")
    written.append("killed")
    run_main(monkeypatch, evaluate, *flags, tmp_path / "killed")
    after = written[written.index("killed") + 1 :]
    samples = [width for width, what in after if what == "samples"]
    assert samples == ["width=0.07"] * 2 + ["width=0.1"] * 3
    whole, killed = (
        [
            json.loads((tmp_path / out / width / "scores.json").read_text())
            for width in ("width=0.05", "width=0.07", "width=0.1")
        ]
        for out in ("whole", "killed")
    )
    for one, other in zip(whole, killed, strict=True):
        (one,), (other,) = one["evaluations"], other["evaluations"]
        assert one["scores"].keys() == other["scores"].keys()
        for name, value in one["scores"].items():
            np.testing.assert_allclose(other["scores"][name], value, rtol=1e-6)
    assert not (tmp_path / "killed" / "averages.json").exists()


@pytest.mark.slow
def test_sample_convert_and_init_from_take_a_width(
    run, images, tmp_path, monkeypatch, capsys
):
    out = ("--out", tmp_path / "a.npz", "--n", 2, "--steps", 2)
    run_main(monkeypatch, sample, "--workdir", run, *out, "--ema-width", 0.07)
    assert "ema width=0.07" in capsys.readouterr().out
    out = ("--to", "safetensors", "--out", tmp_path / "a.safetensors")
    run_main(monkeypatch, convert, "--workdir", run, *out, "--ema-width", 0.07)
    loaded = jd.load_checkpoint(out[-1], config=tiny_config(images, **FIELDS))
    assert_same(loaded.params, jd.load_run(run, ema_width=0.07).params)
    config = tiny_config(images, init_from=f"{run}:width=0.07", total_steps=1)
    state = train.train(config, tmp_path / "tuned")
    assert int(state.step) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "args", "sentence"),
    [
        (evaluate, ("--ema-width", "0.1,"), "--ema-width must be numbers with commas"),
        (evaluate, ("--ema-width", "0.1,0.10"), "--ema-width must be different widths"),
        (
            evaluate,
            ("--ema-width", "0.1,0.4"),
            "--ema-width must be a number in (0, 0.28]",
        ),
        (evaluate, ("--ema-width", "0.1,0.01"), "--ema-width must be one that"),
        (evaluate, ("--ema-width", "0.1", "--ema", "0.9"), "--ema must be left out"),
        (
            sample,
            ("--out", "x.npz", "--ema-width", "nan"),
            "--ema-width must be a number",
        ),
        (sample, ("--out", "x.npz", "--ema", "width=x"), "--ema must name a width"),
    ],
)
def test_a_wrong_width_is_refused_in_a_sentence(
    run, program, args, sentence, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    error = failure(monkeypatch, capsys, program, "--workdir", run, *args)
    assert error.startswith(f"error: {sentence}"), error
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(ema_widths=(0.3,)),
            r"config\.ema_widths must be a number in \(0, 0\.28\]",
        ),
        (
            dict(ema_widths=(0.1, 0.1)),
            r"config\.ema_widths must differ from each other",
        ),
        (dict(ema_widths=0.1), r"config\.ema_widths must be a list of numbers"),
        (dict(ema_decays=()), r"config\.ema_decays must be at least one number unless"),
        (dict(ema_snapshots=0), r"config\.ema_snapshots must be an integer >= 1"),
    ],
)
def test_wrong_widths_of_a_config_are_refused(images, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        train.train(tiny_config(images, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_damaged_snapshot_is_named(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    folder = workdir / snapshots.FOLDER / "checkpoints" / "20"
    (folder / "record" / "metadata").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoints/20 must be a whole checkpoint"):
        jd.load_run(workdir, ema_width=0.07)
    with pytest.raises(ValueError, match=r"without that folder, the other snapshots"):
        jd.load_run(workdir, ema_width=0.07)
    assert jd.load_run(workdir, ema_width=0.05).step == 24
    shutil.rmtree(folder)
    assert jd.load_run(workdir, ema_width=0.07).ema == "width=0.07"
