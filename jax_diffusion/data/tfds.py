"""Data sets of TensorFlow Datasets (TFDS), read without TensorFlow.

`pip install 'jax_diffusion[tfds]'` installs what reads them. Official data sets must be
prepared once, on any machine, which needs TensorFlow:

    pip install tensorflow tensorflow-datasets array_record importlib_resources
    python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10',
        data_dir='/data', file_format='array_record').download_and_prepare()"

Then train with $TFDS_DATA_DIR=/data and `--config.data.path=cifar10:3.0.2`, or name the
folder: `--config.data.path=/data/cifar10/3.0.2`. Your own builders that yield Pillow
images prepare without TensorFlow.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from jax_diffusion.data.decode import Decoder, fit, in_threads, reading
from jax_diffusion.data.examples import (
    Arrays,
    Examples,
    ImageSize,
    Source,
    check_arrays,
)
from jax_diffusion.data.find import digest_of_files

# Not `tfds build`: that wants Apache Beam and mlcroissant besides TensorFlow.
PREPARE = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('{}', "
    "data_dir='{}', file_format='array_record').download_and_prepare()\""
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tfds(Examples):
    """Records of a TFDS data set, read and decoded when they are asked for.

    Attributes:
        records: the random-access data source of TFDS.
        rule: what the records must be; errors begin with it.
        image_size: (h, w) that images are resized and cropped to, or the side of a
            square; None leaves them as they are.
        decoder: converts those of more than 8 bits, and those with alpha.
    """

    records: Any
    rule: str
    image_size: ImageSize
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        """(h, w, c) of the first image, which all must have."""
        return self._decode([0])[0].shape[1:]

    @functools.cached_property
    def digest(self) -> str:
        """Of names and sizes of the files of all splits."""
        folder = Path(self.records.dataset_info.data_dir)
        return digest_of_files(sorted(map(str, folder.glob("*array_record*"))))

    @property
    def num_classes(self) -> int:
        """As many as the data set declares, be they in the split or not."""
        label = dict(self.records.dataset_info.features).get("label")
        found = 1 if label is None else getattr(label, "num_classes", None)
        if found is None:
            rule = "labels must be of a ClassLabel, or in_memory be True"
            raise ValueError(f"{rule}, got {label}.")
        return found

    @property
    def labeled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the data set has a feature "label"."""
        return "label" in dict(self.records.dataset_info.features)

    @property
    def class_names(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the data set calls its labels."""
        label = dict(self.records.dataset_info.features).get("label")
        names = getattr(label, "names", None)
        return None if names is None else tuple(names)

    def counts(self) -> None:
        """Only decoding would tell how many images a class has."""

    @property
    def labels(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """int32 [n]; the images are decoded to find them."""
        return self.read_all()[1]

    def _decode(self, rows: list[int]) -> Arrays:
        with reading(self.rule):
            images, labels = [], []
            for example in self.records.__getitems__(rows):
                image = self.decoder.convert(example["image"])
                images.append(fit(image, self.image_size) if self.image_size else image)
                labels.append(example.get("label", 0))
            return check_arrays(np.stack(images), np.array(labels))

    def read(self, rows: np.ndarray) -> Arrays:
        """Decodes the images and labels of these rows, int [k].

        Raises:
            ValueError: if records are damaged, or images differ in shape.
        """
        none = np.empty((0, *self.image_shape), np.uint8), np.empty(0, np.int32)
        parts = [none, *in_threads(self._decode, rows)]
        with reading(self.rule):  # or else there are several shapes
            images, labels = zip(*parts, strict=True)
            return np.concatenate(images), np.concatenate(labels)


def open_tfds(
    split: str, path: Source, image_size: ImageSize, *, decoder: Decoder | None = None
) -> Tfds:
    """Opens a split of a data set that TFDS prepared as array_record.

    Builders that yield Pillow images prepare without TensorFlow; official ones need it
    once, for the command `PREPARE`.

    Args:
        split: a split of the data set, as "train[:10%]"; "all" is "train+test".
        path: its name in $TFDS_DATA_DIR, or else in ~/tensorflow_datasets, as cifar10
            or cifar10:3.0.2; or its folder, as /data/cifar10 or /data/cifar10/3.0.2.
        image_size: (h, w) of the images in pixels, or the side of square ones; None
            leaves them as they are.
        decoder: converts images of more than 8 bits, and those with alpha.

    Raises:
        ValueError: if TFDS is not installed, or the data or the split is not there.
    """
    with reading("this needs tensorflow-datasets, `pip install 'jax_diffusion[tfds]'`"):
        import tensorflow_datasets as tfds
    folder = _prepared(path)
    rule = f"{folder} must have split {split!r} with images of one shape"
    with reading(rule):
        parts = "train+test" if split == "all" else split
        builder: Any = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split=parts)
        return Tfds(source, rule, image_size, decoder or Decoder())


def _prepared(path: Source) -> Path:
    """The folder of a version that is there as array_record, the newest one."""
    from tensorflow_datasets.core import Version

    # We look ourselves what is there: TFDS would ask the net, and wait for it.
    home = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    name, _, version = os.path.expanduser(path or "NAME").partition(":")
    folder = Path(home, name)
    infos = [
        f / "dataset_info.json" for f in (folder, *folder.glob(version or "[0-9]*"))
    ]
    infos = [f for f in infos if f.is_file() and '"array_record"' in f.read_text()]
    ready = [info.parent for info in infos]
    if not ready:
        command = PREPARE.format("NAME" if os.path.isabs(name) else name, home)
        rule = f"path must name TFDS data, which must be prepared by `{command}`"
        raise ValueError(f"{rule}, got no {path}.")
    return folder if folder in ready else max(ready, key=lambda f: Version(f.name))
