"""A damaged picture that training meets: saved, named, skipped; found beforehand."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from support.programs import train as program

from jax_diffusion import config as settings
from jax_diffusion import data
from jax_diffusion.runtime import checkpoint

SMALL = [
    "--config.schedule.num_steps=4",
    "--config.timesteps.history=1",
    "--config.total_steps=5",
    "--config.log_every=100",
    "--config.save_every=100",
    "--config.sample_every=100",
    "--config.sampling.n=1",
    "--config.sampling.steps=1",
]


def write(root):
    root.mkdir()
    for i in range(48):
        Image.fromarray(np.full((4, 4), 5 * i, np.uint8)).save(root / f"{i:02}.png")


def config_of(root, **changes):
    config = settings.load_config("configs/smoke.py", SMALL)
    config.model = dict(name="support.networks:Tiny")
    config.data = dict(name="folder", path=str(root), image_size=4, batch_size=8)
    config.data.update(split="all", in_memory=False)
    config.data.update(changes)
    return config


def file_of_step(root, step):
    """The file of an image that this batch is the first one to show."""
    batches = data.load(**config_of(root).data, seed=0)
    return root / f"{batches.batch(step)['image'][0, 0, 0, 0] // 5:02}.png"


def write_damaged(root, step):
    """`write`, and an image of that step's batch is damaged, which is returned."""
    write(root)
    file = file_of_step(root, step)
    file.write_bytes(b"damaged")
    return file


@pytest.mark.slow
def test_training_saves_before_a_damaged_image_stops_it_and_goes_on_without_it(
    tmp_path,
):
    root = tmp_path / "data"
    file = write_damaged(root, 3)
    words = rf"{file} must be a whole image.*; step 3 is saved; .*on_error=skip"
    with pytest.raises(data.DamagedImageError, match=words):
        program.train(config_of(root), tmp_path / "run")
    assert checkpoint.latest_step(tmp_path / "run") == 3
    skips = config_of(root, on_error="skip")
    resumed = jax.device_get(program.train(skips, tmp_path / "run"))
    skips.data.in_memory = True
    whole = jax.device_get(program.train(skips, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert '"damaged_images": 1' in last


@pytest.mark.slow
def test_a_damaged_image_of_the_first_batch_is_told_with_the_way_out(tmp_path):
    root = tmp_path / "data"
    file = write_damaged(root, 0)
    words = rf"{file} must be a whole image.*; --check-data lists .*on_error=\"skip\""
    with pytest.raises(data.DamagedImageError, match=words):
        program.train(config_of(root), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def run_program(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["train", *map(str, args)])
    program.main()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(background="blu"), "config.data.background must be the name of a color"),
        (dict(max_value=-1), "config.data.max_value must be"),
        (dict(max_value=2), "config.data.max_value must be the largest value there is"),
        ({}, "config.data.max_value, if given"),
    ],
)
def test_check_data_names_fields_of_the_config(fields, words, tmp_path):
    np.savez(tmp_path / "a.npz", np.full((9, 4, 4, 1), 3.0))
    fields = dict(name="npz", path=str(tmp_path / "a.npz"), batch_size=1) | fields
    with pytest.raises(ValueError) as info:
        program.check_data(ConfigDict(dict(data=fields)))
    assert words in str(info.value)


def test_check_data_lists_damaged_files_of_all_splits(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data")
    config = tmp_path / "config.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "import runpy\n"
        "def get_config():\n"
        "    config = runpy.run_path('configs/smoke.py')['get_config']()\n"
        f"    config.data = dict(name='folder', path={str(tmp_path / 'data')!r},\n"
        "        image_size=4, batch_size=4, split='train')\n"
        "    return config\n"
    )
    run_program(monkeypatch, "--config", config, "--check-data")
    assert "All images can be read" in capsys.readouterr().out
    for i in (5, 9):  # of train and of test
        (tmp_path / "data" / f"{i:02}.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="must be of whole images, got 2 damaged"):
        run_program(monkeypatch, "--config", config, "--check-data")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in printed] == [
        str(tmp_path / "data" / name) for name in ("05.png", "09.png")
    ]
    for args, rule in (
        ([], "given without --check-data, got none"),
        (["--check-data", "--workdir", tmp_path / "run"], "left out with --check-data"),
    ):
        with pytest.raises(ValueError, match=f"^--workdir must be {rule}"):
            run_program(monkeypatch, "--config", config, *args)
    assert not (tmp_path / "run").exists()
