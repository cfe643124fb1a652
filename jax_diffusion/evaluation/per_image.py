"""Computes something for each image and stores it, so that a killed job continues.

`each_image` evaluates a function on all images of a set, whose batches all devices
share. `collect` gathers what it yields, in files that survive a kill if a path is
given: the same command then continues where it stopped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from jax_diffusion.evaluation.image_sets import Arrays, ImageSet
from jax_diffusion.runtime import sharding
from jax_diffusion.runtime.resumable_npz import ResumableNpz

SAMPLES = ("arr_0", "arr_1")  # images and labels, as improved-diffusion names them

# (params, ids int32 [b], image uint8 [b h w c], label [b]) -> NamedTuple of [b, ...];
# of a network with conditioning it is also given that, by name
ScoreFn = Callable[..., Any]


class Collected(NamedTuple):
    """What `collect` returns.

    Attributes:
        arrays: by name, [n, ...] of all n images. With a path, empty on hosts other
            than the first one, and without the images themselves (`SAMPLES`).
        finish: makes one file of the parts, or removes them.
    """

    arrays: Arrays
    finish: Callable[[], None]


def collect(
    compute: Callable[[int], Iterator[Arrays]],
    n: int,
    *,
    path: Path | None = None,
    keep: Sequence[str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Collected:
    """Gathers what compute(start) yields about images start, ..., n - 1, in order.

    On several hosts, all of them call it.

    Args:
        compute: yields arrays [b, ...] by name, batch by batch.
        n: the number of images.
        path: of a .npz. Batches are written to its parts, and those that are there
            already are not computed again. By default nothing is written.
        keep: names of the arrays that the finished file holds; default all of them,
            and with () there is no file.
        record: what decides the arrays; parts of another record are refused.

    Raises:
        ValueError: if the parts at `path` are of another record or damaged.
    """
    if path is None:
        batches = [*compute(0)]
        arrays = jax.tree.map(lambda *a: np.concatenate(a), *batches)
        return Collected(arrays, lambda: None)
    leader = jax.process_index() == 0
    writer = None
    if leader:
        writer = ResumableNpz(path, {**(record or {}), "n": n, "jax": jax.__version__})
    done = min(sharding.broadcast_from_first(writer.done if writer else 0), n)
    quiet = None if leader else True
    with tqdm(total=n, initial=done, unit="image", disable=quiet) as bar:
        for arrays in compute(done) if done < n else ():
            if writer is not None:
                writer.add(arrays)
            bar.update(len(next(iter(arrays.values()))))
    if writer is None:
        return Collected({}, lambda: None)
    finish = writer.discard if keep == () else lambda: writer.join(n, keep)
    return Collected(writer.read(n, without=SAMPLES), finish)


def each_image(
    score: ScoreFn, params: PyTree, images: ImageSet
) -> Callable[[int], Iterator[Arrays]]:
    """Builds compute(start), for `collect`, which evaluates `score` on every image.

    Args:
        score: a jitted function of parameters, ids, images, labels and conditioning of
            a batch. The id of an image is its number in the set.
        params: its first argument, copied to all devices.
        images: the image set.
    """
    mesh = sharding.make_mesh()
    params = sharding.replicate(mesh, params)

    def compute(start):
        for batch in images.batches(start):
            n = len(batch["label"])
            ids = np.arange(start, start + n, dtype=np.int32)
            found = score(params, **sharding.shard_padded(mesh, {**batch, "ids": ids}))
            scores = sharding.fetch(found)._asdict()
            yield {name: a[:n] for name, a in scores.items()}
            start += n

    return compute


def mean_and_error(values: Any) -> tuple[float, float]:
    """Returns the mean over images, values [n], and its standard error, in float64."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
