"""Evaluation of runs and of images: FID, KID, bits/dim and their relatives.

    import jax_diffusion as jd

    run = jd.load_run("runs/digits")
    print(jd.evaluate(run, metrics=["pixel_distance", "bpd"]))
    print(jd.evaluate("mine", reference="theirs", metrics=["fid", "kid"]))

`evaluate` is what the program and Python call. Which file computes what:

    metric                       file                  what, and its source
    fid, sfid                    sample_quality        Frechet distance of Inception's
                                 with metrics.fid      pooled, or spatial, features
                                                       (Heusel 2017; Nash 2021)
    kid                          ... metrics.kid       unbiased MMD, over subsets
                                                       (Binkowski 2018)
    inception_score              ... inception_score   over 10 splits (Salimans 2016)
    precision_recall             ... precision_recall  improved, of 3 neighbors
                                                       (Kynkaanniemi 2019)
    cnn_fd, cnn_kid, cnn_is,     sample_quality with   the same on features of a small
    cnn_precision_recall         feature_classifier    CNN trained on the data
    pixel_distance               sample_quality        Frechet distance of raw pixels
    bpd                          bits_per_dim          variational bound and its parts
                                                       (Ho 2020)
    nll_ode                      bits_per_dim          likelihood by the probability-
                                                       flow ODE (Song 2021)
    accuracy                     classifier_accuracy   of a noisy classifier
    package.module:attribute     arguments             your own, see `as_metric`

    arguments          which metrics are chosen, and what is refused
    image_sets         sets of images: arrays, files, a split, samples of a run
    features           networks whose features are compared; Inception's weights
    per_image          the map over images that survives a kill
    results            Score, Scores (a list that prints as a table), scores.json
    published          numbers that papers report, for --compare paper
    during_training    scores while training; the best EMA so far in WORKDIR/best

Inception is pytorch-fid's network in Flax with pytorch-fid's weights, from a file that
is given, else from the cache, else downloaded, with their SHA-256 checked. Beside
pytorch-fid with the same random weights, features of images of 28 to 320 pixels agree
to 2e-5 of their norm, and FID between two sets of 2,048 images to 5e-7. Inception
score, KID, precision and recall agree with torch-fidelity on the same features to 1e-6
(tests: test_inception.py, test_fidelity.py). The published weights could not be
downloaded where this was tested.

A FID of fewer than 10,000 samples says how many in its name, fid_n2000, because FID
falls as samples become more. A score *_real_vs_real beside a distance is what as many
real images have: n images of the reference, at most half, against all its others. It is
left out unless n is larger than the number of features.

Images are resized only by Inception's own rule, and images of mixed sizes are refused.
A reference for FID and sFID may also be a .npz of moments, as pytorch-fid and
guided-diffusion write them.

With `out`, every part of the work is kept there until scores.json has been written. An
evaluation that was killed continues when it is called again with the same arguments,
and its numbers agree, also on another number of devices, to 1e-6. The record (in
scores.json and as `Scores.record`) has samples (sampler, steps, eta, clipping,
rounding, seed; EMA, step and checksum of the network), reference (split, number of
images, hash), hashes of the extractors, versions, commit, hardware, command, and the
seconds of every stage.
"""

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from jax_diffusion import config as configs
from jax_diffusion.evaluation import arguments, image_sets, results
from jax_diffusion.evaluation import feature_classifier as classifiers
from jax_diffusion.evaluation.arguments import NETWORK_METRICS
from jax_diffusion.evaluation.image_sets import Images, from_split, open_samples
from jax_diffusion.evaluation.results import Result, Score, Scores
from jax_diffusion.evaluation.sample_quality import (
    METRICS,
    Metric,
    check_enough,
    make_loaders,
    open_reference,
    score_images,
)
from jax_diffusion.interop.inception_weights import SHA256, URL
from jax_diffusion.pipeline import Run, SamplingOptions
from jax_diffusion.runtime import locks, logs

__all__ = [
    "METRICS",
    "NETWORK_METRICS",
    "Metric",
    "Score",
    "Scores",
    "arguments",
    "bits_per_dim",
    "classifier_accuracy",
    "during_training",
    "evaluate",
    "feature_classifier",
    "features",
    "image_sets",
    "per_image",
    "published",
    "results",
    "sample_quality",
]


@locks.holding("out")
def evaluate(
    run_or_images: Run | Images,
    *,
    metrics: Sequence[str] | str | None = None,
    images: Images | None = None,
    reference: Images | None = None,
    reference_split: str = "train",
    data: str | os.PathLike | None = None,
    split: str = "test",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    out: str | os.PathLike | None = None,
    save_moments: str | os.PathLike | None = None,
    inception: str | os.PathLike | None = None,
    inception_url: str = URL,
    inception_sha256: str = SHA256,
    feature_classifier: str | os.PathLike | None = None,
    train_feature_classifier: bool = False,
    bpd_images: int | None = None,
    bpd_steps: int | None = None,
    ode_steps: int = 200,
    ode_probes: int = 2,
    options: SamplingOptions | None = None,
    **sampling: Any,
) -> Scores:
    """Computes scores of a run, or of images beside others.

    Args:
        run_or_images: a run, whose samples are compared with its data. Or images: uint8
            [n h w c], or PATH or NAME:PATH, of a folder, of a .npz, or of a data set.
        metrics: keys of `METRICS` and `NETWORK_METRICS`, or "package.module:attribute",
            see `arguments.as_metric`. By default pixel_distance (fid for large
            images) and bpd of a denoiser, accuracy of a classifier, and fid, kid and
            precision_recall of images.
        images: images to score in place of samples of the run.
        reference: images to compare with, or the path of a .npz of moments; by default
            a split of the run's data, unflipped.
        reference_split: which split: "train", "test" or "all".
        data: PATH or NAME:PATH of a data set in place of the run's.
        split: the split on which bpd, nll_ode and accuracy are computed.
        n: how many images to score; default all images, or as many samples as the
            reference has.
        seed: of the samples, of the noise of bpd and of the training of a classifier.
        batch_size: images that all devices together compute at once.
        out: folder for scores.json, files and intermediate results, see the module. By
            default none, and nothing is written but a trained feature classifier and
            `save_moments`.
        save_moments: path of a .npz for the moments of the reference's Inception
            features, in the format of pytorch-fid.
        inception: path of Inception's weights; default downloaded once.
        inception_url: where they are downloaded from.
        inception_sha256: SHA-256 that the file must have.
        feature_classifier: path of the classifier whose features cnn_* compare;
            default classifier.npz in `out`, else in the run's own evaluation folder.
        train_feature_classifier: whether to train it first, on the run's labeled data,
            and write it to that file, also without `out`; the default of `metrics` is
            then none.
        bpd_images: how many images bpd and nll_ode are of, the first ones; default all.
        bpd_steps: number of terms of the bound; default all T.
        ode_steps: steps of the ODE; at most T - 1.
        ode_probes: of Hutchinson's estimate, for the ODE.
        options: how samples are drawn; by default with 50 steps of DDIM.
        sampling: fields of the options to change, such as steps=100 or guidance=2.0.

    Returns:
        The scores, and how they were made as `.record`. On several hosts all of them
        call this; with `out`, the others than the first one get no scores. What cannot
        be computed, such as precision of 3 images, is left out, and `.failures` says
        why; a score that is not finite is null in scores.json, and is a failure too.

    Raises:
        ValueError: if an argument is out of range, does not fit the others, or is
            used by none of the metrics; if none of them can be computed; if another
            process is evaluating into `out`.
    """
    as_called = locals()
    configs.check_signature(evaluate, as_called, arguments.OF_ONE_TYPE)
    ode: dict[str, Any] = dict(ode_steps=ode_steps, ode_probes=ode_probes)
    counts: dict[str, Any] = dict(n=n, bpd_images=bpd_images, bpd_steps=bpd_steps)
    arguments.check_counts(seed, counts, batch_size=batch_size, **ode)
    run, images, how, rows, names = arguments.choose(
        *(run_or_images, images, reference, data, metrics, options, sampling),
        trains=train_feature_classifier,
        save_moments=save_moments,
        given={name: as_called[name] for name in arguments.NOT_FOR_ALL},
    )
    folder = None if out is None else Path(out)
    if folder is not None:  # must be readable when the scores are there
        results.read_records(folder / "scores.json")
    file = feature_classifier or classifiers.default_file(folder, run)
    source = data and os.fspath(data)
    of_data: dict[str, Any] = dict(source=source, batch_size=batch_size)
    both, found = {}, []
    if rows:  # opened now, so that nothing is written if they are wrong
        drawn: Any = dict(n=n, options=how, seed=seed, split=reference_split, **of_data)
        both = open_both(run, images, reference, rows, names, **drawn)
    some = partial(from_split, n=bpd_images, split=split, labels=True, **of_data)
    sets = {name: some(cast(Any, run)) for name in names}
    if train_feature_classifier and run is not None:
        found.append(classifiers.train_on_run(run, file, seed=seed, **of_data))
    if rows:
        weights = dict(url=inception_url, sha256=inception_sha256)
        both |= dict(loaders=make_loaders(file, inception, **weights), rows=rows)
        both |= dict(out=folder, keep_images=images is None)
        found.append(score_images(**both, save_moments=save_moments))
    own: dict[str, Any] = {"bpd": {"steps": bpd_steps}}
    own |= {"nll_ode": {"steps": ode_steps, "probes": ode_probes}}
    found += score_networks(run, sets, own, seed=seed, out=folder)
    return _join(found, run, seed, folder)


def score_networks(
    run: Run | None,
    sets: Mapping[str, image_sets.ImageSet],
    own: Mapping[str, Mapping[str, Any]],
    **more: Any,
) -> list[Result]:
    """Computes metrics of a network; one that fails does not stop the others.

    Args:
        run: whose network it is.
        sets: the images by name of the metric.
        own: arguments of single metrics.
        more: arguments of all of them.
    """
    found = []
    for name, images in sets.items():
        try:
            compute = NETWORK_METRICS[name]
            found.append(compute(cast(Any, run), images, **more, **own.get(name, {})))
        except ValueError as error:  # what others have found is not lost
            found.append(Result([], {}, {}, failures={name: str(error)}))
    return found


def open_both(
    run: Run | None,
    images: Images | None,
    reference: Images | None,
    rows: Mapping[str, Metric],
    names: Sequence[str],
    *,
    n: int | None,
    options: SamplingOptions,
    seed: int,
    **of_data: Any,
) -> dict[str, Any]:
    """Opens the images to score and what they are compared with.

    Args:
        run: whose samples are scored unless there are images.
        images: images to score.
        reference: see `open_reference`.
        rows: the metrics.
        names: other metrics, which need no samples.
        n: how many images to score, see `image_sets.open_samples`.
        options: how samples are drawn.
        seed: of the samples.
        of_data: split of the reference, source and batch_size.

    Returns:
        samples, reference and moments, as `score_images` takes them.

    Raises:
        ValueError: if they are wrong, or too few for every metric.
    """
    source: Any = run if images is None else images
    try:
        known, moments = open_reference(reference, run, rows, **of_data)
        samples = open_samples(source, n, known, options, seed, **of_data)
    except ValueError as error:
        if str(error).startswith("split "):
            raise ValueError(f"reference_{error}") from error
        raise
    if not names:
        check_enough(samples.n, rows)
    return {"samples": samples, "reference": known, "moments": moments}


def _join(
    found: Sequence[Result], run: Run | None, seed: int, out: Path | None
) -> Scores:
    """The scores of all parts and their record, which is added to scores.json."""
    scores = [score for result in found for score in result.scores]
    failures: dict[str, str] = {}
    for result in found:
        failures |= result.failures
        odd = {s.metric: s.value for s in result.scores if not math.isfinite(s.value)}
        failures |= {k: f"{k} must be finite, got {v}." for k, v in odd.items()}
    if failures and not scores:
        raise ValueError(" ".join(failures.values()))
    about: dict[str, Any] = {"seed": seed}
    if run is not None:
        about["network"] = image_sets.network_of(run)
    seconds: dict[str, float] = {}
    for result in found:
        about |= result.about
        seconds |= result.seconds
    record = {
        "scores": {
            s.metric: s.value if math.isfinite(s.value) else None for s in scores
        },
        "errors": {
            s.metric: s.error
            for s in scores
            if s.error is not None and math.isfinite(s.error)
        },
        "images": {s.metric: s.images for s in scores},
        **({"failures": failures} if failures else {}),
        **about,
        "seconds": seconds,
        **logs.describe(run.config.to_dict() if run else {}),
    }
    if out is not None and scores:  # on the first host
        results.append_record(out / "scores.json", record)
    for result in found:
        for finish in result.finish:
            finish()
    return Scores(scores, record)
