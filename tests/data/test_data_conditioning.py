"""Vectors and token sequences beside images: .npz, arrays and cond.npz of a folder."""

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data

N = 20
IMAGES = np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1))
IMAGES = IMAGES.astype(np.uint8)
RNG = np.random.default_rng(0)
COND = RNG.normal(size=(N, 3))
TOKENS = RNG.normal(size=(N, 2, 5)).astype(np.float32)
MASK = RNG.integers(0, 2, (N, 2)).astype(bool)


def test_npz_has_conditioning_beside_images_and_every_split_gets_its_rows(tmp_path):
    arrays = dict(images=IMAGES, cond=COND, tokens=TOKENS, tokens_mask=MASK)
    np.savez(tmp_path / "a.npz", **arrays)
    for split, count in (("train", 18), ("test", 2), ("all", N)):
        found = data.load("npz", split, path=tmp_path / "a.npz", batch_size=2)
        assert found.conditioning.keys() == {*data.CONDITIONING}
        for step in range(count // 2):
            batch = found.batch(step)
            rows = batch["image"][:, 0, 0, 0]  # which says its row
            np.testing.assert_array_equal(batch["cond"], COND[rows].astype(np.float32))
            np.testing.assert_array_equal(batch["tokens_mask"], MASK[rows])
            seen = np.where(MASK[rows][:, :, None], TOKENS[rows], 0)
            np.testing.assert_array_equal(batch["tokens"], seen)


def test_masked_tokens_may_be_anything_and_without_a_mask_all_count():
    padded = np.where(MASK[:, :, None], TOKENS, np.nan)
    batches = data.from_arrays(IMAGES, batch_size=4, tokens=padded, tokens_mask=MASK)
    assert np.isfinite(batches.batch(0)["tokens"]).all()
    assert (
        data.from_arrays(IMAGES, batch_size=4, tokens=TOKENS)
        .batch(0)["tokens_mask"]
        .all()
    )


def write_folder(folder, names):
    for row, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), row, np.uint8)).save(path)


NAMES = [f"{'ab'[i % 2]}/{i}.png" for i in range(N)]


def test_rows_of_a_folder_s_cond_npz_are_matched_by_name_never_by_position(tmp_path):
    write_folder(tmp_path, NAMES)
    order = np.random.default_rng(1).permutation(N)
    np.savez(tmp_path / "cond.npz", names=np.array(NAMES)[order], cond=COND[order])
    for in_memory in (True, False):
        found = data.load(
            *("folder", "train"),
            **dict(path=tmp_path, image_size=4, batch_size=6, in_memory=in_memory),
        )
        assert found.examples.left_out == "" and found.num_classes == 2
        batch = found.batch(1)
        rows = batch["image"][:, 0, 0, 0]
        np.testing.assert_array_equal(batch["cond"], COND[rows].astype(np.float32))


def test_what_stands_in_for_a_damaged_image_brings_its_own_conditioning(tmp_path):
    write_folder(tmp_path, NAMES)
    (tmp_path / NAMES[4]).write_bytes(b"no image")
    np.savez(tmp_path / "cond.npz", names=NAMES, cond=COND)
    for in_memory in (True, False):
        found = data.load(
            *("folder", "all"),
            **dict(path=tmp_path, image_size=4, batch_size=N, in_memory=in_memory),
            **dict(on_error="skip", train=False),
        )
        batch = found.batch(0)
        rows = batch["image"][:, 0, 0, 0]
        assert sorted(rows) != [*range(N)]  # one image stands there twice
        np.testing.assert_array_equal(batch["cond"], COND[rows].astype(np.float32))
        stored = found.stored_conditioning["cond"]  # a run is known by it, see `resume`
        np.testing.assert_allclose(np.sort(stored, 0), np.sort(COND, 0), 1e-6)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (dict(names=NAMES[1:], cond=COND[1:]), "got 1 images without a row and 0 rows"),
        (
            dict(names=[*NAMES, "a/new.png"], cond=np.ones((N + 1, 3))),
            "got 0 images without a row and 1 rows without an image, such as 'a/new",
        ),
        (dict(names=[*NAMES[:-1], NAMES[0]], cond=COND), "names of which 19 differ"),
        (dict(cond=COND), "must have names, text .n., and cond or tokens, got no such"),
        (dict(names=NAMES), "must have names, text .n., and cond or tokens, got no"),
        (dict(names=NAMES, cond=COND[1:]), "must have a row for each of the 20 images"),
    ],
)
def test_a_cond_npz_that_does_not_fit_the_folder_is_refused(tmp_path, given, told):
    write_folder(tmp_path, NAMES)
    np.savez(tmp_path / "cond.npz", **given)
    with pytest.raises(ValueError, match=told):
        data.load("folder", path=tmp_path, image_size=4, batch_size=2)


TWO_LENGTHS = [np.ones((2, 3)), np.ones((3, 3))] * 10
REFUSED = [
    (dict(tokens=TWO_LENGTHS), "tokens_mask must be given where lengths of tokens dif"),
    (dict(cond=[[1.0], [2.0, 3.0]]), r"cond must be numbers \[n, d\], got rows of sev"),
    (dict(cond=COND[:, 0]), r"cond must be numbers \[n, d\], got \(20,\)"),
    (dict(cond=COND[1:]), "cond must have a row for each of the 20 images, got 19"),
    (dict(cond=COND.astype(str)), r"cond must be numbers \[n, d\], got <U32"),
    (dict(cond=COND * 1e39), "cond must be finite, got other numbers in 20 of 20 rows"),
    (dict(tokens=TOKENS + np.inf), "tokens must be finite where they count, got other"),
    (dict(tokens=TOKENS, tokens_mask=MASK * 1), r"tokens_mask must be bool \[n, k\]"),
    (dict(tokens=TOKENS, tokens_mask=MASK.T), r"must be bool \[20, 2\], as tokens"),
    (dict(tokens_mask=MASK), "tokens_mask needs tokens, got it alone"),
    (dict(token=TOKENS), "there is no option 'token'; did you mean 'tokens'"),
]


@pytest.mark.parametrize(("given", "told"), REFUSED)
def test_wrong_conditioning_is_refused_in_one_sentence(given, told):
    with pytest.raises(ValueError, match=told):
        data.from_arrays(IMAGES, batch_size=2, **given)


def test_a_file_is_named_where_its_arrays_are_wrong(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES, cond=COND[1:])
    with pytest.raises(ValueError, match=rf"^cond of {path} must have a row for each"):
        data.load("npz", path=path, batch_size=2)
    ragged = np.empty(2, object)
    ragged[:] = TWO_LENGTHS[:2]
    np.savez(path, tokens=ragged)
    with pytest.raises(ValueError, match="of several lengths, which are padded"):
        data.read_conditioning(path)
    np.savez(path, other=COND)
    with pytest.raises(ValueError, match=r"cond must be a .npz file .*got neither"):
        data.read_conditioning(path)
