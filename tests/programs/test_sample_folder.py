"""Folders of samples: what readers take for samples, and what is not written over."""

import numpy as np
import pytest
from PIL import Image
from support import tiny_runs
from support.programs import evaluate, sample

import jax_diffusion as jd
from jax_diffusion import data
from jax_diffusion.pipeline import sample_folder

JOB = {"seed": 0, "n": 2}


def png(path, value=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


@pytest.mark.parametrize("job", [JOB, None])
def test_a_new_an_empty_or_the_same_folder_may_be_written(tmp_path, job):
    sample_folder.check_folder(tmp_path / "new", JOB, overwrite=False)
    (tmp_path / ".lock").write_text("hidden")
    sample_folder.check_folder(tmp_path, JOB, overwrite=False)
    sample_folder.begin(tmp_path, JOB)
    png(tmp_path / "00000.png")
    sample_folder.check_folder(tmp_path, JOB, overwrite=False)
    sample_folder.begin(tmp_path, JOB)
    assert (tmp_path / "00000.png").exists()  # which the same job makes again


OURS = ["00000.png", "123456.png", "grid.png", "denoising.gif", "sheets/grid.png"]


@pytest.mark.parametrize("name", [*OURS, "mine.png", "notes.txt", "cat/1.png"])
def test_an_occupied_folder_is_refused_or_cleared_of_samples_on_request(tmp_path, name):
    png(tmp_path / "a.png")
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "a.png").rename(tmp_path / "out" / name)
    out = tmp_path / "out"
    for job in (JOB, JOB | {"n": 3}):
        with pytest.raises(ValueError, match=r"^out must be a new .* --overwrite"):
            sample_folder.check_folder(out, job, overwrite=False)
    if name in OURS:
        sample_folder.check_folder(out, JOB, overwrite=True)
        sample_folder.begin(out, JOB)
        assert [path.name for path in out.iterdir()] == ["record.json"]
    else:
        with pytest.raises(ValueError, match="overwrite removes only what sample has"):
            sample_folder.check_folder(out, JOB, overwrite=True)
    assert (out / name).exists() == (name not in OURS)


@pytest.mark.slow
def test_evaluate_scores_the_folder_that_sample_writes(tmp_path, monkeypatch, capsys):
    workdir = tiny_runs.make_run(tmp_path / "run", shape=(4, 8, 3))
    out = tmp_path / "out"

    def run(program, *args):
        monkeypatch.setattr("sys.argv", ["program", *map(str, args)])
        return program.main()

    options = ("--workdir", workdir, "--steps", 2, "--out", out)
    run(sample, *options, "--n", 4)
    first = data.open_images(out).read(np.arange(4))
    drawn = jd.sample_images(jd.load_run(workdir), 4, steps=2)
    np.testing.assert_array_equal(first, drawn)
    run(sample, *options, "--n", 4)  # the same job again
    with pytest.raises(ValueError, match=r"^--out must be a new .* --overwrite"):
        run(sample, *options, "--n", 2)
    run(sample, *options, "--n", 2, "--overwrite")
    assert len(data.open_images(out)) == 2  # nothing stale is left
    np.testing.assert_array_equal(data.open_images(out).read(np.arange(2)), first[:2])
    for old in ("grid.png", "denoising.gif"):  # where version 0.1 wrote them
        (out / "sheets" / old).rename(out / old)
    assert len(data.open_images(out)) == 2
    with pytest.raises(ValueError, match="--overwrite is for a folder, got --out"):
        run(sample, *options, "--out", tmp_path / "x.npz", "--overwrite")
    run(sample, *options, "--n", 150, "--overwrite")
    args = ("--images", out, "--reference", out, "--metrics", "pixel_distance")
    scores = run(evaluate, *args)
    assert scores[0].images == 150
    np.testing.assert_allclose(scores[0].value, 0, atol=1e-3)
