"""The feature classifier: a small CNN, trained on the data whose samples it compares.

`train_feature_classifier` trains a `FeatureCNN` on labeled images, in seconds to
minutes, and writes it to a file; `load_feature_classifier` makes a feature extractor of
that file. Its distances (`cnn_fd`, `cnn_kid`, ...) suit small images, for which
Inception was not made; they compare runs on one data set, and are not FIDs. 98% of
held-out digits are classified correctly after 5 seconds of training, and 91% of
Fashion-MNIST's test images after 34 seconds, on 2 cores.
"""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import PyTree
from tqdm import tqdm

from jax_diffusion import data
from jax_diffusion.evaluation.features import FeatureExtractor, extract
from jax_diffusion.evaluation.image_sets import name_of_data
from jax_diffusion.evaluation.results import Clock, Result
from jax_diffusion.models.feature_cnn import FeatureCNN
from jax_diffusion.pipeline import Run, open_images
from jax_diffusion.runtime import files, sharding
from jax_diffusion.training.optimizer import make_optimizer

# How it is trained.
BATCH_SIZE, EPOCHS, MIN_STEPS = 128, 6, 500
LR, WARMUP, WEIGHT_DECAY = 1e-2, 0.05, 1e-2
ADVICE = "train it with `python -m jax_diffusion.evaluate --train-feature-classifier`"


def train_feature_classifier(
    path: str | os.PathLike,
    train: data.Batches,
    test: data.Batches | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    data_name: str = "",
) -> dict[str, Any]:
    """Trains a `FeatureCNN` on labeled images and writes it to a file.

    It uses AdamW with a cosine decay. Data, seed and number of steps decide the
    parameters, on machines of one kind; of `train`, only the images, the labels and
    `flip` count. On several hosts, all of them call it.

    Args:
        path: of the file to write, an .npz, which is written whole or not at all.
        train: images to train on.
        test: images to measure the accuracy on, of the same shape; default none.
        seed: of the initial parameters and of the order of the images, >= 0.
        steps: number of updates; default 6 epochs of batches of 128, at least 500.
        data_name: name of the data, kept in the file.

    Returns:
        "accuracy": share of `test` that is classified correctly, or None.
        "steps": number of updates made. "seconds": time that all of it took.
        "sha256": of the parameters, by name, type, shape and bytes.

    Raises:
        ValueError: if there are fewer than two labels, or an argument is out of range.
    """
    began, path = time.perf_counter(), Path(path)
    if not train.labeled or len(np.unique(train.labels)) < 2:
        found = "one" if train.labeled else "images without labels"
        raise ValueError(
            f"training a classifier needs labels of two classes at least, got {found}."
        )
    if seed < 0 or (steps is not None and steps < 1):
        raise ValueError(f"seed must be >= 0 and steps >= 1, got {seed} and {steps}.")
    if test is not None and test.image_shape != train.image_shape:
        raise ValueError(
            f"test images must be {train.image_shape}, as those to train on, got "
            f"{test.image_shape}."
        )
    if test is not None:
        known = train.class_names, train.num_classes
        test = dataclasses.replace(
            test, examples=data.fit_labels(test.examples, *known, "test images")
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    params, steps = _fit(train, seed, steps)
    extractor = _classifier(params, train.num_classes)
    accuracy = None
    if test is not None:
        once = dataclasses.replace(test, train=False, start_step=0)
        found = [f["logits"].argmax(-1) for f in extract(extractor, once)]
        accuracy = float(np.mean(np.concatenate(found) == test.labels))
    meta = {
        "image_shape": train.image_shape,
        "num_classes": train.num_classes,
        "seed": seed,
        "steps": steps,
        "accuracy": accuracy,
        "data": data_name,
    }
    if jax.process_index() == 0:
        arrays = {**_flat(params), "meta": np.array(json.dumps(meta))}
        files.write_atomic(path, lambda file: np.savez(file, **arrays))
    sharding.barrier("feature classifier written")
    told = {"seconds": time.perf_counter() - began, "sha256": extractor.sha256}
    return {"accuracy": accuracy, "steps": steps, **told}


def default_file(out: Path | None, run: Run | None) -> Path | None:
    """Returns where the classifier of a run is, unless its path is given.

    Args:
        out: folder of the evaluation; default that of the run.
        run: perhaps one without a workdir; then the file is None.
    """
    if out is None and run is not None and run.workdir is not None:
        out = run.workdir / "evaluation"
    return None if out is None else out / "classifier.npz"


def train_on_run(
    run: Run,
    path: str | os.PathLike | None,
    *,
    source: str | None = None,
    batch_size: int,
    seed: int = 0,
) -> Result:
    """Trains the classifier on a run's labeled data; see `train_feature_classifier`.

    Args:
        run: whose data it is trained on and tested with.
        path: of the file to write.
        source: PATH or NAME:PATH of a data set in place of the run's.
        batch_size: number of images that are tested at once.
        seed: of the training.

    Returns:
        No scores; for the record, accuracy and number of test images, steps, hash.
    """
    if path is None:
        raise ValueError("feature_classifier must be a file to write, got None.")
    files.check_output("feature_classifier", path)
    clock = Clock()
    train, test = (
        open_images(run, source, split, batch_size=batch_size, labels=False)
        for split in ("train", "test")
    )
    name = name_of_data(run, source)
    told = train_feature_classifier(path, train, test, seed=seed, data_name=name)
    told |= {"file": os.fspath(path), "test_images": test.num_examples}
    clock.end("train_feature_classifier")
    return Result([], {"feature_classifier": told}, clock.seconds)


def _fit(train: data.Batches, seed: int, steps: int | None) -> tuple[PyTree, int]:
    """Returns the trained parameters, in NumPy, and the number of steps made."""
    n = train.num_examples
    size = min(BATCH_SIZE, n)
    steps = max(EPOCHS * n // size, MIN_STEPS) if steps is None else steps
    order: dict[str, Any] = dict(batch_size=size, seed=seed, train=True)
    batches = dataclasses.replace(train, **order).stream(0)
    model: Any = FeatureCNN(train.num_classes)
    tx, _ = make_optimizer(
        lr=LR,
        total_steps=steps,
        warmup_steps=int(WARMUP * steps),
        decay="cosine",
        weight_decay=WEIGHT_DECAY,
    )
    mesh = sharding.make_mesh()
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def loss_fn(params, image, label):
        logits = model.apply({"params": params}, image).logits
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        # `shard_padded` may have filled up the batch; those rows must not count.
        return jnp.where(jnp.arange(len(loss)) < size, loss, 0).sum() / size

    def train_step(state, batch):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, batch["image"], batch["label"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    shardings: Any = dict(in_shardings=(whole, rows), out_shardings=whole)
    step = jax.jit(train_step, donate_argnums=0, **shardings)
    image = jnp.zeros((1, *train.image_shape), jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(seed), image)["params"]
    state = sharding.replicate(mesh, (params, tx.init(params)))
    for batch in tqdm(itertools.islice(batches, steps), total=steps, disable=None):
        # Many steps in flight on many devices of one CPU would run out of its threads.
        state = jax.block_until_ready(step(state, sharding.shard_padded(mesh, batch)))
    return sharding.fetch(state[0]), steps


def load_feature_classifier(
    path: str | os.PathLike | None, image_shape: Sequence[int]
) -> FeatureExtractor:
    """Loads the feature extractor that `train_feature_classifier` has written.

    Args:
        path: of the file.
        image_shape: (h, w, c) of the images whose features are wanted.

    Raises:
        ValueError: if the file is missing or is another, or if it was trained on
            images of another shape.
    """
    if path is None or not Path(path).is_file():
        raise ValueError(f"feature_classifier must be a file, got {path}; {ADVICE}.")
    try:
        arrays = files.read_npz(path)
        meta = json.loads(str(arrays.pop("meta")))
        shape, num_classes = tuple(meta["image_shape"]), int(meta["num_classes"])
        image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
        init = FeatureCNN(num_classes).init
        wanted = _flat(jax.eval_shape(init, jax.random.key(0), image)["params"])
        kinds = [
            {name: (a.shape, a.dtype) for name, a in tree.items()}
            for tree in (arrays, wanted)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError("other parameters")
    except Exception as error:  # damage shows as any kind of error
        raise ValueError(
            f"{path} must be a whole file of train_feature_classifier, got {error!r}; "
            f"{ADVICE}."
        ) from error
    if shape != tuple(image_shape):
        raise ValueError(
            f"{path} must be of images {tuple(image_shape)}, got {shape}; {ADVICE}."
        )
    params = traverse_util.unflatten_dict(arrays, sep="/")
    return _classifier(params, num_classes)


def _classifier(params: PyTree, num_classes: int) -> FeatureExtractor:
    model: Any = FeatureCNN(num_classes)

    def features(params, images):
        return model.apply({"params": params}, images)._asdict()

    sha256 = files.sha256_of_tree(params)
    return FeatureExtractor("classifier", sha256, params, features)


def _flat(params: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")
