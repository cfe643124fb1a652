"""Data sets of TFDS, against what its own builders write."""

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jax_diffusion import data

ROOT = Path(__file__).parents[2]


def flat(value, size=4):
    return np.full((size, size, 3), value, np.uint8)


@pytest.fixture
def tfds(monkeypatch, tmp_path):
    """TFDS with an empty data folder and no network to wait for."""

    def refuse(*args):
        raise AssertionError("a test asked the network")

    module = pytest.importorskip("tensorflow_datasets")
    module.disable_progress_bar()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return module


def prepare_patches(tfds, folder, shape):
    """Writes a dataset of 12 + 5 flat images, by builder, and returns its name."""

    class TinyPatches(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3))
            features = {
                "image": image,
                "label": tfds.features.ClassLabel(num_classes=5),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            spans = {"train": range(12), "test": range(12, 17)}
            return {
                split: self._generate_examples(span) for split, span in spans.items()
            }

        def _generate_examples(self, span):
            for i in span:
                image = Image.fromarray(np.full(shape, 10 * i, np.uint8))
                yield i, {"image": image, "label": i % 5}

    builder = TinyPatches(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return "tiny_patches"


def test_tfds_reads_what_a_builder_wrote(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (6, 6, 3))
    numbers = {"train": range(12), "test": range(12, 17), "all": range(17)}
    for path in (name, f"{name}:1.0.0"):
        for split, span in numbers.items():
            batches = data.load("tfds", split, path=path, batch_size=1)
            assert batches.image_shape == (6, 6, 3)
            found = (
                batches.images[:, 0, 0, 0] // 10
            )  # TFDS stores in an order of its own
            assert sorted(found) == [*span]
            np.testing.assert_array_equal(batches.labels, found % 5)
    assert data.load("tfds", "train[:3]", path=name, batch_size=1).num_examples == 3
    with pytest.raises(ValueError, match=r"must have split 'tset'.*'train', 'test'"):
        data.load("tfds", "tset", path=name, batch_size=1)
    with pytest.raises(ValueError, match=r"got no tiny_patches:2\.0\.0"):
        data.load("tfds", path=f"{name}:2.0.0", batch_size=1)


def test_tfds_images_are_resized_by_the_rule_of_folders(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (8, 11, 3))
    assert data.load("tfds", path=name, batch_size=1).image_shape == (8, 11, 3)
    batches = data.load("tfds", path=name, image_size=4, batch_size=1)
    assert batches.images.shape == (12, 4, 4, 3)
    assert sorted(batches.images[:, 2, 2, 0] // 10) == [*range(12)]


def test_lazy_tfds_batches_equal_those_in_memory(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (8, 11, 3))
    for size, train in ((None, True), (4, True), (None, False)):
        options = dict(path=name, image_size=size, batch_size=5, train=train, flip=True)
        lazy = data.load("tfds", "all", in_memory=False, **options)
        memory = data.load("tfds", "all", **options)
        assert memory.in_memory and not lazy.in_memory
        assert lazy.image_shape == memory.image_shape
        assert lazy.num_examples == memory.num_examples == 17
        assert lazy.num_classes == 5  # as declared
        np.testing.assert_array_equal(lazy.images, memory.images)
        np.testing.assert_array_equal(lazy.labels, memory.labels)
        with contextlib.closing(lazy.stream(0, [0, 2, 4])) as stream:
            for step, found in zip(range(4), stream, strict=False):
                for key, value in memory.batch(step, [0, 2, 4]).items():
                    assert found[key].dtype == value.dtype
                    np.testing.assert_array_equal(found[key], value)
        nothing = lazy.batch(0, np.arange(0))
        assert nothing["image"].shape == (0, *lazy.image_shape)


@pytest.mark.slow
def test_tfds_reads_without_tensorflow(tfds, tmp_path):
    name = prepare_patches(tfds, tmp_path, (6, 6, 3))
    code = f"""if True:
        import sys
        from jax_diffusion import data
        options = dict(path={name!r}, image_size=4, batch_size=2)
        for in_memory in (True, False):
            data.load("tfds", in_memory=in_memory, **options).batch(0)
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def stub(folder, file_format):
    folder.mkdir(parents=True)
    info = json.dumps({"fileFormat": file_format, "name": folder.parent.name})
    (folder / "dataset_info.json").write_text(info)


class Records(list):
    """A source of TFDS: flat images of the sizes in the list, without labels."""

    dataset_info = SimpleNamespace(features={})

    def __getitems__(self, rows):
        return [{"image": flat(0, self[i])} for i in rows]


def prepared(tfds, monkeypatch, records):
    """Lets all folders hold these records; returns the folders and splits asked for."""
    asked = []

    def open_folder(folder):
        def as_data_source(split):
            asked.append((folder, split))
            return records

        return SimpleNamespace(as_data_source=as_data_source)

    monkeypatch.setattr(tfds, "builder_from_directory", open_folder)
    return asked


def test_tfds_reads_an_official_data_set(tfds, tmp_path, monkeypatch):
    mocking = pytest.importorskip("tensorflow_datasets.testing.mocking")
    # The original expects a `self` that the mock, not a class, does not give it.
    monkeypatch.setattr(
        mocking,
        "_getitems",
        lambda rows, generator: [*map(generator.__getitem__, rows)],
    )
    stub(tmp_path / "cifar10/3.0.2", "array_record")
    with tfds.testing.mock_data(num_examples=7):
        records = tfds.data_source("cifar10", split="train")
        prepared(tfds, monkeypatch, records)
        for size, in_memory in ((None, True), (32, False), (16, True), (16, False)):
            options = dict(image_size=size, in_memory=in_memory, batch_size=4)
            batches = data.load("tfds", path="cifar10", **options)
            shape = size or 32, size or 32, 3
            assert batches.image_shape == shape and batches.num_classes <= 10
            assert batches.images.shape == (7, *shape) and batches.images.std() > 20
            assert batches.labels.shape == (7,)
        assert (
            data.load("tfds", path="cifar10", in_memory=False, batch_size=1).num_classes
            == 10
        )


def test_tfds_takes_the_newest_version_that_is_ready(tfds, tmp_path, monkeypatch):
    for version in ("9.0.0", "10.0.0", "incomplete.4F_11.0.0"):
        stub(tmp_path / "made/up" / version, "array_record")
    stub(tmp_path / "made/up/12.0.0", "tfrecord")
    asked = prepared(tfds, monkeypatch, Records([4] * 1001))
    batches = data.load("tfds", "all", path="made/up", batch_size=1)
    assert asked == [(tmp_path / "made/up/10.0.0", "train+test")]
    assert batches.num_examples == 1001 and not batches.labels.any()


def test_tfds_data_may_be_anywhere(tfds, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for version in ("1.0.0", "2.0.0"):
        stub(tmp_path / "here" / version, "array_record")
    asked = prepared(tfds, monkeypatch, Records([4, 4]))
    here = f"{tmp_path}/here"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    for path in (here, f"{here}:1.0.0", f"{here}/1.0.0", Path(here), "~/here"):
        data.load("tfds", "test", path=path, batch_size=1)
    versions = [folder.name for folder, _ in asked]
    assert versions == ["2.0.0", "1.0.0", "1.0.0", "2.0.0", "2.0.0"]
    monkeypatch.delenv("TFDS_DATA_DIR")
    stub(tmp_path / "tensorflow_datasets/here/3.0.0", "array_record")
    data.load("tfds", path="here", batch_size=1)
    assert asked[-1] == (tmp_path / "tensorflow_datasets/here/3.0.0", "train")


def test_tfds_images_of_many_shapes_need_an_image_size(tfds, tmp_path, monkeypatch):
    stub(tmp_path / "many/1.0.0", "array_record")
    prepared(tfds, monkeypatch, Records([4, 5, 6]))
    with pytest.raises(ValueError, match=r"images of one shape, got.*same shape"):
        data.load("tfds", path="many", batch_size=1)
    lazy = data.load("tfds", path="many", batch_size=1, in_memory=False, train=False)
    assert lazy.batch(0)["image"].shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match=r"1\.0\.0 must have .* images of one shape"):
        lazy.batch(1)
    for in_memory in (True, False):
        batches = data.load(
            "tfds", path="many", image_size=4, batch_size=1, in_memory=in_memory
        )
        assert batches.images.shape == (3, 4, 4, 3)


def test_lazy_tfds_data_know_their_classes_or_say_why_not(tfds, tmp_path, monkeypatch):
    stub(tmp_path / "many/1.0.0", "array_record")
    records = Records([4, 4])
    prepared(tfds, monkeypatch, records)
    lazy = data.load("tfds", path="many", batch_size=1, in_memory=False)
    assert lazy.num_classes == 1 and lazy.batch(0)["label"].tolist() == [0]
    records.dataset_info = SimpleNamespace(features={"label": "a scalar"})
    with pytest.raises(ValueError, match=r"ClassLabel.*got a scalar"):
        lazy.num_classes  # noqa: B018


def test_damaged_tfds_data_are_refused(tfds, tmp_path):
    prepare_patches(tfds, tmp_path, (6, 6, 3))
    file = next(tmp_path.glob("tiny_patches/1.0.0/*train.array_record*"))
    file.write_bytes(file.read_bytes()[:100])
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"tiny_patches/1\.0\.0 must have split"):
            data.load("tfds", path="tiny_patches", batch_size=1, in_memory=in_memory)


def test_tfds_data_that_are_not_prepared_name_the_command(tfds, tmp_path):
    command = (
        rf"tfds\.builder\('mnist', data_dir='{tmp_path}', file_format='array_record'"
    )
    for prepare in (lambda: None, lambda: stub(tmp_path / "mnist/3.0.1", "tfrecord")):
        prepare()
        with pytest.raises(ValueError, match=f"`python.*{command}.*got no mnist"):
            data.load("tfds", path="mnist", batch_size=1)
    with pytest.raises(ValueError, match=r"must be prepared.*got no None"):
        data.load("tfds", batch_size=1)


def test_tfds_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'jax_diffusion\[tfds\]'"):
        data.load("tfds", path="mnist", batch_size=1)
