"""Data sets by name: `load`, readers of one's own, and PATH or NAME:PATH."""

import sys

import numpy as np
import pytest
from support.networks import Tiny

from jax_diffusion import data
from jax_diffusion.evaluation.image_sets import as_image_set
from jax_diffusion.pipeline import Run, open_images

RUN = Run(None, Tiny(), None, None, (4, 4, 1))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("digts", {}, r"'digits', 'folder'.*did you mean 'digits'\?$"),
        ("zzz", {}, r"^dataset must be one of.*got 'zzz'\.$"),
        ("digits", dict(image_size=16), r"digits must be 8 x 8, got 16\.$"),
        (
            "synthetic",
            dict(image_size=0),
            r"image_size must be an integer in .*, got 0\.$",
        ),
        (
            "synthetic",
            dict(image_size=-1),
            r"image_size must be an integer in .*, got -1\.$",
        ),
        ("digits", dict(in_memory=False), "None or True for 'digits', got False.*tfds"),
    ],
)
def test_load_refuses_what_there_is_not(name, options, words):
    with pytest.raises(ValueError, match=words):
        data.load(name, batch_size=2, **options)


@pytest.mark.parametrize("name", sorted(data.DATASETS.keys() - {"tfds"}))
def test_every_reader_refuses_unknown_splits(name):
    words = r"^split must be one of \('train', 'test', 'all'\).*did you mean 'train'"
    with pytest.raises(ValueError, match=words):
        data.load(name, "trian", batch_size=2, image_size=8)


def test_load_has_no_other_options():
    with pytest.raises(TypeError, match="fip"):
        data.load("synthetic", batch_size=2, fip=True)  # pyright: ignore


def test_load_passes_the_options_on():
    kwargs = dict(batch_size=3, seed=5, train=True, flip=True, start_step=4)
    batches = data.load("synthetic", **kwargs)
    assert {key: getattr(batches, key) for key in kwargs} == kwargs


OWN = """
import numpy as np
from jax_diffusion import data

def arrays(split, path, image_size):
    images = np.full((6, 4, 4, 1), len(split), np.uint8)
    return images, np.arange(6) % 3

class Lazy(data.Examples):
    labels = np.arange(6, dtype=np.int32)
    image_shape = (4, 4, 3)

    def __init__(self, value):
        self.value = value

    def __len__(self):
        return 6

    def read(self, rows):
        images = np.full((len(rows), 4, 4, 3), self.value, np.uint8)
        images[:, 0, 0] = np.asarray(rows)[:, None]
        return images, self.labels[rows]

def lazy(split, path, image_size):
    return Lazy(int(path))

def wrong(split, path, image_size):
    return np.zeros((6, 4, 4, 1), np.uint8)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module with readers."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_reader_of_ones_own_is_a_function_by_its_name(own):
    batches = data.load(f"{own}:arrays", "my split", image_size=4, batch_size=2)
    assert batches.in_memory and batches.num_classes == 3
    assert (batches.batch(5)["image"] == len("my split")).all()
    with pytest.raises(ValueError, match=r"must be 4 x 4, got 8\.$"):
        data.load(f"{own}:arrays", image_size=8, batch_size=2)
    with pytest.raises(ValueError, match=r"None or True for 'own.*:arrays', got False"):
        data.load(f"{own}:arrays", batch_size=2, in_memory=False)


def test_a_reader_of_ones_own_may_be_lazy(own):
    options = dict(path="9", batch_size=4, train=True, flip=True, seed=1)
    lazy, memory = (
        data.load(f"{own}:lazy", in_memory=in_memory, **options)
        for in_memory in (False, None)
    )
    assert memory.in_memory and not lazy.in_memory
    assert lazy.num_classes == 6 and lazy.image_shape == (4, 4, 3)
    for step in range(5):
        for key, value in memory.batch(step).items():
            np.testing.assert_array_equal(lazy.batch(step)[key], value)
    np.testing.assert_array_equal(lazy.images[:, 1, 1, 1], 9)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "wrong",
            r"name must be a reader .*, got 'own.*:wrong': it returns uint8 \[6, ",
        ),
        (
            "missing",
            r"dataset must be one of .* or an importable .*, got 'own.*:missing'",
        ),
    ],
)
def test_what_is_no_reader_is_refused(own, name, words):
    with pytest.raises(ValueError, match=words):
        data.load(f"{own}:{name}", batch_size=2)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("folder:photos", ("folder", "photos")),
        ("npz:a.npz", ("npz", "a.npz")),
        ("tfds:cifar10:3.0.2", ("tfds", "cifar10:3.0.2")),
        ("digits", ("digits", None)),
        ("digits:", ("digits", None)),
        ("FOLDER", ("folder", "FOLDER")),
        ("./FOLDER", ("folder", "./FOLDER")),
        ("a:b", ("folder", "a:b")),
        ("missing.npz", ("npz", "missing.npz")),
        ("x/A.NPY", ("npz", "x/A.NPY")),
        ("my.readers:read", ("my.readers:read", None)),
        ("my.readers:read:/a:b/c", ("my.readers:read", "/a:b/c")),
    ],
)
def test_a_source_of_images_is_a_path_or_a_name_and_a_path(
    text, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("FOLDER", "a:b", "digits"):  # "./digits" would be the folder
        (tmp_path / name).mkdir()
    assert data.parse_source(text) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        ("", r"got ''\.$"),
        ("nowhere", r"got 'nowhere', which does not exist\.$"),
        ("fodler", r"did you mean 'folder'\?$"),
        ("digit:x/y", r"one of \['digits', 'folder', .*did you mean 'digits'\?$"),
        ("a.png", r"a \.npz or \.npy file, or NAME:PATH .*got 'a\.png', which"),
    ],
)
def test_what_is_no_source_of_images_is_refused(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for field in ("images", "reference", "low_res"):
        with pytest.raises(ValueError, match=f"^{field} must be a folder, .*" + words):
            data.parse_source(text, field)


@pytest.mark.parametrize("text", ["no.npz", "npz:no.npz", "folder:no", "idx:no", "no"])
@pytest.mark.parametrize(
    ("field", "read"),
    [
        ("low_res", lambda text: data.open_stored(text, "low_res")),
        ("reference", lambda text: as_image_set(text, batch_size=1, field="reference")),
        (
            "data",
            lambda text: open_images(RUN, text, "all", batch_size=1, field="data"),
        ),
    ],
)
def test_images_that_are_missing_are_named_by_their_field(
    text, field, read, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^{field} must .*got 'no.*(nothing|not exi)"
    ):
        read(text)
