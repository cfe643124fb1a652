"""Feature extractors: the networks whose features FID and its relatives compare.

`inception` is the network of published FIDs, with the weights of pytorch-fid; `pixels`
is no network at all; `feature_classifier` trains a small one on the data themselves,
for images that Inception was not made for. `compiled` makes a function of any of them,
`extract` runs it over batches and `map_features` over a set of images.
"""

import os
import shutil
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pooch
from jaxtyping import Array, PyTree

from jax_diffusion import data
from jax_diffusion.evaluation.image_sets import Arrays, ImageSet
from jax_diffusion.evaluation.per_image import SAMPLES
from jax_diffusion.interop import inception_weights
from jax_diffusion.interop.torch_files import read_torch
from jax_diffusion.models.inception import Inception
from jax_diffusion.runtime import cpu, sharding
from jax_diffusion.runtime.files import sha256_of_file

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
TIMEOUT = 30  # seconds until a silent server is given up
KINDS = ("pool", "spatial", "logits")  # of features, see FeatureExtractor.apply


class FeatureExtractor(NamedTuple):
    """A network that computes features of images, or a function without parameters.

    Attributes:
        name: "inception", "classifier", "pixels", or one of your own.
        sha256: of the weights; "" if there are none.
        params: the parameters, the first argument of `apply`.
        apply: (params, images uint8 [b, h, w, c]) -> float32 features by kind: "pool"
            [b, d], and perhaps "spatial" [b, s] and "logits" [b, k].
        any_size: whether images of different sizes have comparable features.
    """

    name: str
    sha256: str
    params: PyTree
    apply: Callable[[PyTree, Array], dict[str, Array]]
    any_size: bool = False


def compiled(
    extractor: FeatureExtractor,
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Builds features_of(images), jitted, from uint8 [b, h, w, c] to float32 by kind.

    All devices share a batch. A batch shorter than the first one is filled up for the
    network, so that it is compiled once. Products are computed in full float32 on every
    device, because features are compared between machines.

    Raises:
        ValueError: from features_of, for images of another type or shape.
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
        return {kind: a[:n] for kind, a in features.items()}

    return features_of


def extract(
    extractor: FeatureExtractor, batches: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the features, by kind, of every batch's "image"; see `compiled`."""
    features_of = compiled(extractor)
    for batch in batches:
        yield features_of(batch["image"])


def pixels() -> FeatureExtractor:
    """Returns the extractor of raw pixels, scaled to [-1, 1] and flattened."""

    def flat(params, images):
        return {"pool": data.from_uint8(images).reshape(len(images), -1)}

    return FeatureExtractor("pixels", "", {}, flat)


def inception(
    source: str | os.PathLike | None = None,
    *,
    url: str = inception_weights.URL,
    sha256: str | None = inception_weights.SHA256,
    cache: Path | None = None,
) -> FeatureExtractor:
    """Loads the Inception of published FIDs, with the weights of pytorch-fid.

    Args:
        source: path of the weights; by default they are downloaded once, to `cache`.
        url: address to download from: http, https or file.
        sha256: the required SHA-256; None accepts any file, with `source` only.
        cache: a folder; default $XDG_CACHE_HOME or ~/.cache, in it jax_diffusion.

    Raises:
        ValueError: if the file cannot be had, or has the wrong hash.
    """
    advice = f"get the file from {url} and give its path as `inception`"
    if source is not None:
        path = Path(source).expanduser()
        if not path.is_file():
            raise ValueError(
                f"inception must be the file of its weights, got {str(path)!r}, where "
                f"no file is; {advice}."
            )
    elif sha256 is None:
        raise ValueError(
            "sha256 must be given for a file that is downloaded, got None."
        )
    else:
        path = _download(url, sha256, cache or cpu.cache_folder(), advice)
    found = sha256_of_file(path)
    if sha256 not in (None, found):
        remedy = f"remove it, or {advice}" if source is None else advice
        raise ValueError(f"{path} must have SHA-256 {sha256}, got {found}; {remedy}.")
    try:
        tensors = read_torch(path)
        if not isinstance(tensors, dict):
            raise ValueError(f"{type(tensors).__name__} for a state dict")
        params = inception_weights.params_from_torch(tensors)
    except (TypeError, ValueError) as error:  # what is no dict has any contents
        raise ValueError(
            f"{path} must hold Inception's weights, got {str(error)!r}; {advice}."
        ) from error

    def features(params, images):
        network = Inception()
        return network.apply({"params": params}, images)._asdict()  # pyright: ignore

    return FeatureExtractor("inception", found, params, features, any_size=True)


def _download(url: str, sha256: str, folder: Path, advice: str) -> Path:
    """Returns the path of the file in a folder, into which it is downloaded if absent.

    A file of another hash that is there stays there, and is for the caller to refuse.
    """
    path = Path(folder) / INCEPTION_FILE
    if path.is_file():
        return path
    try:
        # pooch downloads to a name of its own beside, checks, and moves into place: of
        # several processes that start at once, it does not matter which comes first.
        http = url.startswith("http")
        downloader: Any = pooch.HTTPDownloader(timeout=TIMEOUT) if http else _copy
        pooch.retrieve(
            url,
            sha256,
            fname=path.name,
            path=path.parent,
            downloader=downloader,
        )
    except (OSError, ValueError) as error:  # those of requests are OSErrors
        reason, *_ = str(error).split(". ")  # pooch goes on to guess why
        raise ValueError(
            f"Inception's weights must be in {folder} or come from {url}, got "
            f"{reason.rstrip('.')}; {advice}."
        ) from error
    return path


def _copy(url: str, path: str, _: Any) -> None:
    """Downloads from a file: address, which pooch does not know."""
    with urllib.request.urlopen(url) as source, open(path, "wb") as file:
        shutil.copyfileobj(source, file)


def map_features(
    images: ImageSet,
    extractors: Sequence[FeatureExtractor],
    *,
    keep_images: bool = False,
) -> Callable[[int], Iterator[Arrays]]:
    """Builds compute(start), for `collect`, of "inception_pool" and so on.

    Args:
        keep_images: whether images and labels are yielded too, as `SAMPLES`.
    """
    functions = [(extractor.name, compiled(extractor)) for extractor in extractors]

    def compute(start):
        for batch in images.batches(start):
            arrays: Arrays = {}
            if keep_images:
                given = (batch["image"], batch["label"])
                arrays = dict(zip(SAMPLES, given, strict=True))
            for name, extract in functions:
                found = extract(batch["image"])
                arrays |= {array_name(name, k): found[k] for k in KINDS if k in found}
            yield arrays

    return compute


def array_name(extractor: str, kind: str) -> str:
    """Returns the name of an array of features in files: "inception_pool"."""
    return f"{extractor}_{kind}"


def of_extractor(arrays: Arrays, extractor: str) -> Arrays:
    """Returns the features of one extractor, by kind."""
    names = {kind: array_name(extractor, kind) for kind in KINDS}
    return {kind: arrays[name] for kind, name in names.items() if name in arrays}
