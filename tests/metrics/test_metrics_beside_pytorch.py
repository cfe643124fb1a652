"""Metrics beside those of torch-fidelity and pytorch-fid, of the same features."""

import numpy as np
import pytest
from support.peers import peer

from jax_diffusion import metrics

pytestmark = pytest.mark.slow

SAME = dict(rtol=1e-6)


def cloud(seed, n, d=48, scale=1.0):
    """Features as a network's: correlated, not negative, many of them 0."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(d, d)) / d**0.5
    features = rng.normal(size=(n, d)) * np.linspace(0.2, 2, d) @ mixing
    return np.maximum(scale * features + 0.1, 0).astype(np.float32)


def to_torch(features):
    import torch

    return torch.from_numpy(features)


@pytest.mark.parametrize("n, splits", [(1000, 10), (1003, 7), (50, 1)])
def test_inception_score_is_that_of_torch_fidelity(n, splits):
    isc = peer("torch_fidelity.metric_isc")
    logits = 5 * cloud(1, n)
    told = isc.isc_features_to_metric(to_torch(logits), splits=splits, shuffle=False)
    ours = metrics.inception_score(logits, splits=splits)
    assert ours.value > 2
    np.testing.assert_allclose(ours.value, told["inception_score_mean"], **SAME)
    np.testing.assert_allclose(ours.error, told["inception_score_std"], **SAME)


def kernel_distance(a, b, subsets, size):
    """By torch-fidelity."""
    kid = peer("torch_fidelity.metric_kid")
    features = [to_torch(x).double() for x in (a, b)]
    options = dict(kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return kid.kid_features_to_metric(*features, **options)


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_kid_is_that_of_torch_fidelity(scale):
    """Of subsets that hold all images, as the two draw others."""
    a, b = cloud(1, 600), cloud(2, 600, scale=scale)
    told = kernel_distance(a, b, subsets=2, size=600)
    ours = metrics.kernel_distance(a, b, subsets=2, subset_size=600)
    tolerance = dict(rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(
        ours.value, told["kernel_inception_distance_mean"], **tolerance
    )


def test_kids_of_other_subsets_agree_within_their_error():
    a, b = cloud(1, 2000), cloud(2, 2000, scale=1.1)
    told = kernel_distance(a, b, subsets=50, size=500)
    ours = metrics.kernel_distance(a, b, subsets=50, subset_size=500)
    known = told["kernel_inception_distance_mean"]
    deviation = told["kernel_inception_distance_std"]
    assert abs(ours.value - known) < 5 * deviation * (2 / 50) ** 0.5
    assert 0.6 < ours.error / deviation < 1.6


def dense(seed, n, scale=1.0):
    """Points of a plane, so close that float32 has few digits of their distances."""
    return (scale * np.random.default_rng(seed).normal(size=(n, 2))).astype(np.float32)


@pytest.mark.parametrize("neighbours, scale", [(3, 1.0), (3, 0.6), (5, 1.5)])
def test_precision_and_recall_are_those_of_torch_fidelity(neighbours, scale):
    a, b = cloud(1, 1500, d=12, scale=scale), cloud(2, 1300, d=12)
    compare_precision_and_recall(a, b, neighbours)


def test_precision_and_recall_are_those_of_torch_fidelity_where_points_are_dense():
    compare_precision_and_recall(dense(1, 3000), dense(2, 3000, scale=1.5), 3)


def compare_precision_and_recall(a, b, neighbours):
    prc = peer("torch_fidelity.metric_prc")
    told = prc.prc_features_to_metric(
        to_torch(a).double(),
        to_torch(b).double(),
        prc_neighborhood=neighbours,
        prc_batch_size=10_000,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = metrics.precision_recall(a, b, neighbours=neighbours, block=400)
    assert 0.05 < ours.precision < 1 and 0.05 < ours.recall < 1
    np.testing.assert_allclose(ours.precision, told["precision"], rtol=1e-6)
    np.testing.assert_allclose(ours.recall, told["recall"], rtol=1e-6)


@pytest.fixture
def fid_score(monkeypatch):
    """pytorch-fid, for a scipy whose sqrtm has no `disp`."""
    module = peer("pytorch_fid.fid_score")
    from scipy import linalg

    true = linalg.sqrtm
    monkeypatch.setattr(
        module.linalg, "sqrtm", lambda a, disp=True: true(a) if disp else (true(a), 0)
    )
    return module


def test_fid_is_that_of_pytorch_fid(fid_score):
    a, b = (metrics.moments(cloud(seed, 500, scale=seed)) for seed in (1, 2))
    told = fid_score.calculate_frechet_distance(a.mean, a.cov, b.mean, b.cov)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), told, **SAME)


def test_moments_of_pytorch_fid_are_read_and_ours_are_read_by_it(fid_score, tmp_path):
    found = metrics.moments(cloud(1, 100))
    np.savez_compressed(tmp_path / "theirs.npz", mu=found.mean, sigma=found.cov)
    theirs = metrics.load_moments(tmp_path / "theirs.npz")["pool"]
    metrics.save_moments(tmp_path / "ours.npz", {"pool": found})
    mean, cov = fid_score.compute_statistics_of_path(
        str(tmp_path / "ours.npz"), None, 50, 2048, "cpu"
    )
    for m in (theirs.mean, mean):
        np.testing.assert_array_equal(m, found.mean)
    for c in (theirs.cov, cov):
        np.testing.assert_array_equal(c, found.cov)
    assert theirs.count == 0  # which is not in their files
