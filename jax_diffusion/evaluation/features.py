"""Feature extractors for scores of sets of images, such as Frechet distances.

`inception()` is the network of published FIDs, its weights those of pytorch-fid;
`load_classifier` a small network that `train_classifier` trains on the data themselves,
for images that Inception was not made for; `pixels` no network at all. `compiled` makes
a function of any of them, and `extract` runs it over batches.
"""

import dataclasses
import http.client
import itertools
import json
import os
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, PyTree
from tqdm import tqdm

from jax_diffusion import data
from jax_diffusion.interop import inception_weights
from jax_diffusion.interop.torch_files import read_torch
from jax_diffusion.models.feature_cnn import FeatureCNN
from jax_diffusion.models.inception import Inception
from jax_diffusion.runtime import cpu, sharding
from jax_diffusion.runtime import files as parts
from jax_diffusion.training import step as training

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
TIMEOUT = 30  # seconds until a silent server is given up

# How a classifier is trained: a minute for Fashion-MNIST on two cores, see the tests.
BATCH_SIZE, EPOCHS, MIN_STEPS = 128, 6, 500
LR, WARMUP, WEIGHT_DECAY = 1e-2, 0.05, 1e-2
ADVICE = "train it with `python -m jax_diffusion.evaluate --train-classifier`"


class FeatureExtractor(NamedTuple):
    """A network that has features of images, or a function that has no parameters."""

    name: str  # "inception", "classifier" or "pixels"
    sha256: str  # of the weights; "" of pixels
    params: PyTree
    # (params, images uint8 [b, h, w, c]) -> float32 features: "pool" [b, d], and of a
    # network "logits" [b, k], of Inception "spatial" [b, s]
    apply: Callable[[PyTree, Array], dict[str, Array]]


def compiled(
    extractor: FeatureExtractor,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Builds features_of(images), jitted, from uint8 [b, h, w, c] to NumPy, float32.

    All devices share a batch. One that is shorter than the first is filled up for the
    network, which is compiled once. Products are in full float32 wherever it runs:
    features are compared between machines.

    Raises:
        ValueError: from features_of, for images of another kind.
    """
    mesh, size = sharding.make_mesh(), 0
    params, apply = sharding.replicate(mesh, extractor.params), jax.jit(extractor.apply)

    def features_of(images):
        nonlocal size
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
            raise ValueError(
                f"images must be uint8 [b, h, w, c], got {images.dtype} {images.shape}."
            )
        n = len(images)
        size = size or n
        full = images[np.minimum(np.arange(max(n, size)), n - 1)]
        shared = sharding.shard_padded(mesh, {"image": full})
        with jax.default_matmul_precision("highest"):
            features = sharding.fetch(apply(params, shared["image"]))
        return {name: a[:n] for name, a in features.items()}

    return features_of


def extract(
    extractor: FeatureExtractor, batches: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, np.ndarray]]:
    """Features of every batch's "image" by name, in order; see `compiled`."""
    features_of = compiled(extractor)
    for batch in batches:
        yield features_of(batch["image"])


def _flat_pixels(params: PyTree, images: Array) -> dict[str, Array]:
    return {"pool": data.from_uint8(images).reshape(len(images), -1)}


def pixels() -> FeatureExtractor:
    """Raw pixels in [-1, 1], flattened."""
    return FeatureExtractor("pixels", "", {}, _flat_pixels)


def _inception_features(params: PyTree, images: Array) -> dict[str, Array]:
    network = Inception()
    return network.apply({"params": params}, images)._asdict()  # pyright: ignore


def inception(
    source: str | os.PathLike | None = None,
    *,
    url: str = inception_weights.URL,
    sha256: str | None = inception_weights.SHA256,
    cache: Path | None = None,
) -> FeatureExtractor:
    """The Inception of published FIDs, with the weights of pytorch-fid.

    Args:
        source: path of the weights; by default they are downloaded once, to `cache`.
        url: where from: http, https or file.
        sha256: of the file; None, of a `source` only, for any.
        cache: a folder; default $XDG_CACHE_HOME or ~/.cache, in it jax_diffusion.

    Raises:
        ValueError: if the file is not to be had, or is another than it must be.
    """
    advice = f"get the file from {url} and give its path, --inception FILE"
    if source is None and sha256 is None:
        raise ValueError("the sha256 of a file to download must be given, got None.")
    if source is None:
        path = _cached(url, str(sha256), cache, advice)
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(
                f"Inception's weights must be a file, got {str(path)!r}; {advice}."
            )
    found = parts.sha256_of_file(path)
    if sha256 not in (None, found):
        remedy = f"remove it, or {advice}" if source is None else advice
        raise ValueError(f"{path} must have SHA-256 {sha256}, got {found}; {remedy}.")
    try:
        tensors = read_torch(path)
        if not isinstance(tensors, dict):
            raise ValueError(f"{type(tensors).__name__} for a state dict")
        params = inception_weights.params_from_torch(tensors)
    except (TypeError, ValueError) as error:  # a file may hold what is no dict
        raise ValueError(
            f"{path} must hold Inception's weights, got {str(error)!r}; {advice}."
        ) from error
    return FeatureExtractor("inception", found, params, _inception_features)


def _cached(url: str, sha256: str, cache: Path | None, advice: str) -> Path:
    """The file in the cache, where it is put, if it is the right one, unless there."""
    folder = cpu.cache_folder() if cache is None else Path(cache)
    path = folder / INCEPTION_FILE
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Each process has a place of its own beside: who comes first does not matter.
        with tempfile.TemporaryDirectory(prefix="download_", dir=folder) as aside:
            new = Path(aside) / INCEPTION_FILE
            _download(url, new)
            found = parts.sha256_of_file(new)
            if found != sha256:
                raise ValueError(f"a file of SHA-256 {found} for {sha256}")
            os.replace(new, path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(
            f"Inception's weights must be in {folder} or come from {url}, got {error}; "
            f"{advice}."
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            with path.open("wb") as file:
                shutil.copyfileobj(answer, file)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise


def train_classifier(
    path: str | os.PathLike,
    train: data.Batches,
    test: data.Batches | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    data_name: str = "",
) -> dict[str, Any]:
    """Trains a `FeatureCNN` on labelled images and writes it, whole or not at all.

    AdamW with a cosine decay. Data, seed and steps decide what comes out, on machines
    of one kind; of the batches given, only their images, labels and `flip` count.

    Args:
        path: of the file, an .npz.
        train: images to train on.
        test: images to measure the accuracy on.
        seed: of the first parameters and of the order of the images.
        steps: default 6 epochs of batches of 128, and at least 500.
        data_name: kept in the file.

    Returns:
        accuracy: on `test`, or None. seconds: that all took. steps. sha256: of the
        parameters, by name, shape and bytes.

    Raises:
        ValueError: if there are fewer than two labels, or an argument is out of range.
    """
    began, path = time.perf_counter(), Path(path)
    labels = np.unique(train.labels)
    if len(labels) < 2:
        raise ValueError(
            "training a classifier needs labels of two classes at least, got one."
        )
    if seed < 0 or (steps is not None and steps < 1):
        raise ValueError(f"seed must be >= 0 and steps >= 1, got {seed} and {steps}.")
    if test is not None and test.image_shape != train.image_shape:
        raise ValueError(
            f"test images must be {train.image_shape}, as those to train on, got "
            f"{test.image_shape}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    params, steps = _fit(train, seed, steps)
    extractor = _classifier(params, train.num_classes)
    meta = {
        "image_shape": train.image_shape,
        "num_classes": train.num_classes,
        "seed": seed,
        "steps": steps,
        "accuracy": None if test is None else _accuracy(extractor, test),
        "data": data_name,
    }
    if jax.process_index() == 0:
        arrays = {**_flat(params), "meta": np.array(json.dumps(meta))}
        parts.write_atomic(path, lambda file: np.savez(file, **arrays))
    sharding.barrier("classifier written")
    told = {"seconds": time.perf_counter() - began, "sha256": extractor.sha256}
    return {"accuracy": meta["accuracy"], "steps": steps, **told}


def _fit(train: data.Batches, seed: int, steps: int | None) -> tuple[PyTree, int]:
    """Trained parameters, in NumPy, and the number of steps."""
    n = train.num_examples
    size = min(BATCH_SIZE, n)
    steps = max(EPOCHS * n // size, MIN_STEPS) if steps is None else steps
    order: dict[str, Any] = dict(batch_size=size, seed=seed, train=True)
    batches = dataclasses.replace(train, **order).stream(0)
    model: Any = FeatureCNN(train.num_classes)
    tx, _ = training.make_optimizer(
        lr=LR,
        total_steps=steps,
        warmup_steps=int(WARMUP * steps),
        decay="cosine",
        weight_decay=WEIGHT_DECAY,
    )
    mesh = sharding.make_mesh()
    whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    step = jax.jit(
        _train_step(model, tx, size),
        in_shardings=(whole, rows),
        out_shardings=whole,
        donate_argnums=0,
    )
    image = jnp.zeros((1, *train.image_shape), jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(seed), image)["params"]
    state = sharding.replicate(mesh, (params, tx.init(params)))
    for batch in tqdm(itertools.islice(batches, steps), total=steps, disable=None):
        # Many steps in flight on many devices of one CPU would run out of its threads.
        state = jax.block_until_ready(step(state, sharding.shard_padded(mesh, batch)))
    return sharding.fetch(state[0]), steps


def _train_step(
    model: Any, tx: optax.GradientTransformation, size: int
) -> Callable[..., Any]:
    """step((params, opt_state), batch) -> (params, opt_state)."""

    def loss_fn(params, image, label):
        logits = model.apply({"params": params}, image).logits
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        # `in_parts` may have filled up the batch, which must not count.
        return jnp.where(jnp.arange(len(loss)) < size, loss, 0).sum() / size

    def step(state, batch):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, batch["image"], batch["label"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def _accuracy(extractor: FeatureExtractor, test: data.Batches) -> float:
    once = dataclasses.replace(test, train=False, start_step=0)
    found = [features["logits"].argmax(-1) for features in extract(extractor, once)]
    return float(np.mean(np.concatenate(found) == test.labels))


def load_classifier(
    path: str | os.PathLike, image_shape: Sequence[int]
) -> FeatureExtractor:
    """What `train_classifier` has written, for images of this shape, (h, w, c).

    Raises:
        ValueError: if it is not there, no such file, or of images of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the classifier must be a file, got {path}; {ADVICE}.")
    try:
        arrays = parts.read_npz(path)
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
            f"{path} must be a whole file of train_classifier, got {error!r}; {ADVICE}."
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

    digest = parts.sha256_of_tree(params)
    return FeatureExtractor("classifier", digest, params, features)


def _flat(params: PyTree) -> dict[str, Any]:
    return traverse_util.flatten_dict(params, sep="/")
