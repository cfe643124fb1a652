"""Damaged images: found beforehand, or left out of files whose pixels are known."""

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data
from jax_diffusion.data.damaged import WithoutDamaged
from jax_diffusion.data.examples import InMemory

N = 11


def write(root, damaged=()):
    """Images 0, 1, ... of classes a and b in turn, whose pixels are their numbers."""
    for i in range(N):
        file = root / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(file)
        if i in damaged:
            file.write_bytes(file.read_bytes()[: 40 * (i % 2)])
    return [*range(0, N, 2), *range(1, N, 2)]  # the numbers in stored order


def expected_numbers(order, damaged):
    """By definition: of each row, itself or else the next one that is whole."""
    twice = order + order
    return [next(n for n in twice[i:] if n not in damaged) for i in range(N)]


def options(root, **more):
    return dict(path=root, image_size=2, split="all", **more)


@pytest.mark.parametrize("damaged", [(), (4,), (0, 2, 7), (10, 9), range(1, N)])
def test_a_damaged_image_is_replaced_by_the_next_whole_one_and_its_label(
    tmp_path, damaged
):
    numbers = expected_numbers(write(tmp_path, damaged), damaged)
    how = options(tmp_path, batch_size=N, train=False, on_error="skip")
    for in_memory in (True, False):
        batches = data.load("folder", in_memory=in_memory, **how)
        batch = batches.batch(0)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], numbers)
        np.testing.assert_array_equal(batch["label"], np.array(numbers) % 2)
        told = batches.examples.damaged
        assert len(told) == len(damaged) and batches.num_examples == N
        for number in damaged:
            assert any(f"{number:02}.png must be a whole" in t for t in told.values())


def test_batches_with_damaged_images_depend_on_seed_and_step_alone(tmp_path):
    write(tmp_path, (3, 4, 8))
    how = options(tmp_path, batch_size=4, seed=5, flip=True, on_error="skip")
    known = data.load("folder", in_memory=True, **how)
    for step in (9, 2, 5):
        fresh = data.load("folder", in_memory=False, **how)
        for name, array in known.batch(step).items():
            np.testing.assert_array_equal(fresh.batch(step)[name], array)
            rows = fresh.batch(step, [1, 3])[name]
            np.testing.assert_array_equal(rows, array[[1, 3]])


def test_without_skip_the_file_is_named(tmp_path):
    write(tmp_path, (4,))
    batches = data.load("folder", in_memory=False, **options(tmp_path, batch_size=N))
    with pytest.raises(data.DamagedImageError, match=r"04\.png must be a whole image"):
        batches.batch(0)
    with pytest.raises(data.DamagedImageError, match=r"04\.png must be a whole image"):
        data.load("folder", in_memory=True, **options(tmp_path, batch_size=N))


def test_data_without_a_whole_image_are_refused(tmp_path):
    write(tmp_path, range(N))
    how = options(tmp_path, batch_size=2, on_error="skip")
    with pytest.raises(ValueError, match=r"must have a whole image, got none: .*png"):
        data.load("folder", in_memory=False, **how).batch(0)


def test_errors_that_are_no_damage_are_not_skipped(tmp_path):
    write(tmp_path)
    Image.fromarray(np.full((2, 2), 5000, np.uint16)).save(tmp_path / "a" / "99.png")
    how = options(tmp_path, batch_size=2, on_error="skip", max_value=4095)
    with pytest.raises(ValueError, match=r"max_value must be .*99\.png"):
        data.load("folder", **how)


def test_a_disk_that_fails_now_and_then_is_told_and_no_loop_without_end():
    class Failing(InMemory):
        def read(self, rows):
            if len(rows) > 1:
                raise data.DamagedImageError("images.png must be whole.")
            return super().read(rows)

    examples = Failing(np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"images\.png must be whole"):
        WithoutDamaged(examples).read(np.arange(2))


def test_check_names_every_damaged_file_and_nothing_else(tmp_path, capsys):
    damaged = (0, 7, 9)
    write(tmp_path, damaged)
    found = data.check("folder", path=tmp_path, image_size=2)
    assert [text.split(" ")[0] for text in sorted(found)] == [
        str(tmp_path / "ab"[i % 2] / f"{i:02}.png") for i in damaged
    ]
    write(tmp_path / "whole")
    assert data.check("folder", path=tmp_path / "whole", image_size=2) == []


def test_an_on_error_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"^on_error must be one of "):
        data.load("digits", batch_size=1, on_error="ignore")
