"""How fast images come from memory, from array_record and from a folder of PNGs.

    python -m tests.benchmarks.loader [--rounds 5] [--images 5000]

Prints images/s of 32 x 32 x 3 images, in batches as training asks for them, and how
many times over that feeds a network of 35.7 M parameters: it takes 4,000 images/s on an
H100 and --images-per-second-here on this machine. Then the share of a training loop
that waits for data, where a step is 40 ms of computation on a batch of 64. Medians of
rounds in which the sources take turns. The last line is for machines.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_diffusion import data

H100 = 4000  # images/s of the network
STEP = 0.04  # seconds
BATCH, STEPS = 64, 50  # of a round of the loop


def draw_images(n: int) -> np.ndarray:
    """Discs with a little noise: they compress to about as much as CIFAR-10."""
    discs = data.load("synthetic", "all", image_size=32, batch_size=1).images
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 6, (n, 32, 32, 3))
    return (discs[np.arange(n) % len(discs)] + noise).clip(0, 255).astype(np.uint8)


def write_array_record(images: np.ndarray, folder: Path) -> Path:
    """Prepares a TFDS data set of these images, without TensorFlow."""
    import tensorflow_datasets as tfds

    class Discs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(32, 32, 3))
            label = tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                yield i, {"image": Image.fromarray(image), "label": i % 10}

    tfds.disable_progress_bar()
    builder = Discs(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder / "discs"


def write_folder(images: np.ndarray, folder: Path) -> Path:
    for i, image in enumerate(images):
        file = folder / str(i % 10) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


def open_all(images: np.ndarray, folder: Path) -> dict[str, data.Batches]:
    options = dict(batch_size=BATCH, flip=True)
    records = write_array_record(images, folder / "tfds")
    files = write_folder(images, folder / "files")
    lazily = dict(options, in_memory=False)
    return {
        "ram": data.from_arrays(images, np.arange(len(images)) % 10, **options),
        "array_record": data.load("tfds", path=records, **lazily),
        "folder": data.load("folder", "all", path=files, image_size=32, **lazily),
    }


def images_per_second(batches: data.Batches, first: int) -> float:
    """Of a second of reading, after those batches that were made ahead."""
    with contextlib.closing(batches.stream(first)) as stream:
        for _ in range(2 * data.PREFETCH_BATCHES):
            next(stream)
        begun, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begun) < 1:
            count += len(next(stream)["label"])
    return count / elapsed


def make_step():
    """A compiled step that takes `STEP` seconds here, alone on the machine."""

    @jax.jit
    def compute(images, repeats):
        x = images.reshape(BATCH, -1)[:, :512].astype(jnp.float32) / 255
        weights = jnp.eye(512) * 0.5
        return jax.lax.fori_loop(0, repeats, lambda _, x: jnp.sin(x @ weights), x)

    def run(images, repeats):
        begun = time.perf_counter()
        compute(images, repeats).block_until_ready()
        return time.perf_counter() - begun

    images, repeats = np.zeros((BATCH, 32, 32, 3), np.uint8), 100
    run(images, repeats)
    for _ in range(5):
        taken = statistics.median(run(images, repeats) for _ in range(9))
        repeats = max(1, round(repeats * STEP / taken))
    return lambda images: run(images, repeats)


def loop(batches: data.Batches, first: int, step) -> tuple[float, float]:
    """Seconds that a step of a loop waits for its batch and that it computes."""
    with contextlib.closing(batches.stream(first)) as stream:
        step(next(stream)["image"])
        waited = computed = 0.0
        for _ in range(STEPS):
            begun = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - begun
            computed += step(batch["image"])
    return waited / STEPS, computed / STEPS


def main() -> None:
    """Prints two lines a source, and all numbers in the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--images-per-second-here", type=float, default=8)
    args = parser.parse_args()
    step = make_step()
    with tempfile.TemporaryDirectory() as folder:
        sides = open_all(draw_images(args.images), Path(folder))
        rates, loops = ({name: [] for name in sides} for _ in range(2))
        for i, (name, batches) in itertools.product(range(args.rounds), sides.items()):
            rates[name].append(images_per_second(batches, 1000 * i))
            loops[name].append(loop(batches, 1000 * i, step))
    rate = {name: statistics.median(found) for name, found in rates.items()}
    wait = {
        name: statistics.median(w / (w + c) for w, c in found)
        for name, found in loops.items()
    }
    print(f"{os.cpu_count()} cores, {args.rounds} rounds, {args.images} images")
    for name, found in rate.items():
        computed = statistics.median(c for _, c in loops[name])
        print(
            f"{name}: {found:,.0f} images/s, {found / H100:.1f} times an H100's, "
            f"{found / args.images_per_second_here:,.0f} times this machine's; waits "
            f"{wait[name]:.2%} of the loop, computes {computed * 1e3:.1f} ms a step"
        )
    print(
        *(f"{name}={found:.0f}" for name, found in rate.items()),
        *(f"wait_{name}={found:.4f}" for name, found in wait.items()),
    )


if __name__ == "__main__":
    main()
