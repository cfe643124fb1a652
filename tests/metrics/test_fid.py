"""FID against closed forms and SciPy; moments and their files."""

import numpy as np
import pytest
from scipy import linalg
from support.features import cloud

from jax_diffusion import metrics
from jax_diffusion.metrics import Moments

EXACT = dict(rtol=1e-9, atol=1e-9)


def rotation(d):
    return np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]


def gaussian(mean, std, axes=None):
    """A Gaussian with these standard deviations along these axes."""
    axes = np.eye(len(std)) if axes is None else axes
    return Moments(100, np.array(mean, float), axes * np.square(std) @ axes.T)


def test_moments_are_the_count_the_mean_and_the_unbiased_covariance():
    m = metrics.moments(np.array([[0, 0], [2, 0], [0, 4], [2, 4]]))
    assert m.count == 4
    np.testing.assert_array_equal(m.mean, [1, 2])
    np.testing.assert_allclose(m.cov, [[4 / 3, 0], [0, 16 / 3]], **EXACT)


def test_moments_of_float32_features_are_summed_in_float64():
    features = (cloud(0, n=1000) + 1e4).astype(np.float32)
    ours, centred = metrics.moments(features), features.astype(np.longdouble) - 1e4
    np.testing.assert_allclose(ours.mean - 1e4, centred.mean(axis=0), **EXACT)
    np.testing.assert_allclose(ours.cov, np.cov(centred, rowvar=False), **EXACT)


def test_fid_of_diagonal_gaussians_is_that_of_means_and_standard_deviations():
    a, b = gaussian([0, 1, 2], [1, 2, 3]), gaussian([1, 1, 0], [4, 2, 1])
    ours = metrics.frechet_distance(a, b)
    np.testing.assert_allclose(ours, (1 + 0 + 4) + (9 + 0 + 4), **EXACT)


def test_fid_does_not_depend_on_the_axes_that_covariances_share():
    axes = rotation(3)
    a, b = (
        gaussian([0, 1, 2], [1, 2, 3], axes),
        gaussian([1, 1, 0], [4, 2, 1], axes),
    )
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 5 + 13, **EXACT)


def test_fid_is_right_where_covariances_do_not_commute():
    a, b = gaussian([0, 0], [1, 3]), gaussian([0, 0], [2, 5], rotation(2))
    # The eigenvalues of a root r of cov_a cov_b: (tr r)^2 = tr r^2 + 2 det r.
    root_trace = np.sqrt(np.trace(a.cov @ b.cov) + 2 * (1 * 3 * 2 * 5))
    expected = (1 + 9) + (4 + 25) - 2 * root_trace
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, **EXACT)


def test_fid_of_scalar_features_is_that_of_means_and_standard_deviations():
    a = metrics.moments(np.array([[-1.0], [1.0]]))  # variance 2
    b = metrics.moments(np.array([[1.0], [5.0]]))  # mean 3, variance 8
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 9 + 2, **EXACT)


def test_fid_to_itself_is_zero():
    a = metrics.moments(cloud(0))
    np.testing.assert_allclose(metrics.frechet_distance(a, a), 0, **EXACT)


def test_fid_is_symmetric():
    a, b = metrics.moments(cloud(0)), metrics.moments(cloud(1))
    there, back = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
    assert there > 1
    np.testing.assert_allclose(there, back, **EXACT)


def test_fid_to_a_line_follows_the_variance_along_it():
    along = np.array([3.0, 4.0, 0.0])
    line = Moments(100, np.zeros(3), np.outer(along, along))
    full = gaussian([0, 0, 0], [1, 2, 3], rotation(3))
    # cov_a is a a^T: the product has one eigenvalue, a^T cov_b a.
    expected = 25 + (1 + 4 + 9) - 2 * np.sqrt(along @ full.cov @ along)
    for a, b in [(line, full), (full, line)]:
        ours = metrics.frechet_distance(a, b)
        np.testing.assert_allclose(ours, expected, **EXACT)


def test_fid_is_right_with_fewer_images_than_features():
    features = cloud(0, n=5, d=20)
    a, b = metrics.moments(features), metrics.moments(features[::-1] + 2)
    for other, distance in ((a, 0), (b, 20 * 2**2)):
        with pytest.warns(UserWarning, match="of 20 features needs more than 20 .* 5:"):
            ours = metrics.frechet_distance(a, other)
        np.testing.assert_allclose(ours, distance, **EXACT)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_of_uneven_batches_merge_to_those_of_one(offset):
    features = cloud(0, n=1000, d=16) + offset
    edges = np.array([0, 1, 2, 4, 5, 100, 101, 300, 301, 302, 640, 650, 999, 1000])
    parts, known = np.split(features, edges[1:-1]), None
    assert len(parts) == 13 and min(map(len, parts)) == 1
    for part in parts:
        known = metrics.update(known, part)
    whole = metrics.moments(features)
    # The offset itself is known to 1e-12 of its size, and so are its differences.
    tolerance = dict(rtol=1e-12, atol=1e-12 * np.abs(whole.cov).max() + offset * 1e-15)
    assert known.count == 1000
    np.testing.assert_allclose(known.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(known.cov, whole.cov, **tolerance)


def test_merged_moments_do_not_depend_on_the_order():
    a, b, c = (metrics.moments(cloud(seed, n=10 + seed)) for seed in range(3))
    left = metrics.merge(metrics.merge(a, b), c)
    right = metrics.merge(metrics.merge(c, a), b)
    for ours, others in zip(left, right, strict=True):
        np.testing.assert_allclose(ours, others, rtol=1e-12, atol=1e-12)


def test_moments_of_a_single_row_have_no_variance_until_others_come():
    one = metrics.update(None, np.array([[1.0, 2.0]]))
    assert one.count == 1
    np.testing.assert_array_equal(one.mean, [1, 2])
    np.testing.assert_array_equal(one.cov, np.zeros((2, 2)))
    two = metrics.update(one, np.array([[3.0, 2.0]]))
    np.testing.assert_array_equal(two.cov, [[2, 0], [0, 0]])


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_fid_of_rank_deficient_gaussians_is_right(rank):
    """On common axes the roots are known, whatever is 0."""
    d, axes = 64, rotation(64)
    rng = np.random.default_rng(rank)
    stds = [np.append(rng.uniform(0.1, 3, rank), np.zeros(d - rank)) for _ in range(2)]
    a, b = (gaussian(np.zeros(d), std, axes) for std in stds)
    expected = np.sum((stds[0] - stds[1]) ** 2)
    ours = metrics.frechet_distance(a, b)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    if 2 * rank <= d:
        apart = gaussian(np.zeros(d), np.roll(stds[1], rank), axes)  # no common axis
        expected = np.sum(stds[0] ** 2) + np.sum(stds[1] ** 2)
        ours = metrics.frechet_distance(a, apart)
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize("rank", [5, 30, 64])
def test_fid_to_low_rank_on_other_axes_is_that_of_a_small_matrix(rank):
    """With cov = F F^T, the root of (F_a^T F_b)(F_a^T F_b)^T has the same trace."""
    rng = np.random.default_rng(rank)
    f, g = rng.normal(size=(64, 5)), rng.normal(size=(64, rank))
    a, b = (Moments(100, np.zeros(64), x @ x.T) for x in (f, g))
    root = linalg.sqrtm((f.T @ g) @ (g.T @ f))  # [5, 5] and well conditioned
    expected = np.sum(f**2) + np.sum(g**2) - 2 * np.trace(root)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(metrics.frechet_distance(b, a), expected, rtol=1e-10)


def test_fid_counts_variances_a_trillion_times_smaller():
    stds = np.geomspace(1e-6, 1, 16)
    a, b = (gaussian(np.zeros(16), x, rotation(16)) for x in (stds, stds[::-1]))
    expected = np.sum((stds - stds[::-1]) ** 2)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-8)


def test_fid_to_a_point_is_all_the_variance():
    point = gaussian(np.zeros(3), np.zeros(3))
    full = gaussian([1, 2, 2], [1, 2, 3], rotation(3))
    np.testing.assert_allclose(metrics.frechet_distance(point, full), 9 + 14, **EXACT)
    assert metrics.frechet_distance(point, point) == 0


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9])
def test_fid_is_that_of_scipys_root_on_nearly_singular_covariances(smallest):
    d = 24
    stds = np.geomspace(smallest, 1, d)
    a = gaussian(np.zeros(d), stds, rotation(d))
    b = gaussian(np.ones(d), stds[::-1] * 2, np.roll(rotation(d), 3, axis=0))
    root = linalg.sqrtm(a.cov @ b.cov)
    told = d + np.trace(a.cov + b.cov) - 2 * np.trace(root).real
    np.testing.assert_allclose(metrics.frechet_distance(a, b), told, rtol=1e-6)


def test_fid_to_a_gaussian_on_other_axes_is_the_closed_form_of_two_dimensions():
    """(tr (cov_a cov_b)^(1/2))^2 = tr cov_a cov_b + 2 (det cov_a det cov_b)^(1/2)."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        stds = rng.uniform(1e-3, 2, (2, 2))
        angles = rng.uniform(0, np.pi, 2)
        axes = [
            np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]]) for t in angles
        ]
        a, b = (gaussian([0, 0], s, x) for s, x in zip(stds, axes, strict=True))
        root = np.sqrt(np.trace(a.cov @ b.cov) + 2 * np.prod(stds))
        expected = np.sum(stds**2) - 2 * root
        ours = metrics.frechet_distance(a, b)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("counts", [(6, 100), (100, 6), (0, 6), (2, 6)], ids=str)
def test_fid_warns_of_no_more_images_than_features(counts):
    a, b = (gaussian(np.zeros(6), np.ones(6))._replace(count=n) for n in counts)
    with pytest.warns(UserWarning, match=r"^a Frechet distance of 6 .* than 6 .*\.$"):
        metrics.frechet_distance(a, b)


@pytest.mark.parametrize("counts", [(7, 7), (0, 7), (0, 0)], ids=str)
def test_fid_does_not_warn_of_more_images_than_features_or_unknown_counts(counts):
    a, b = (gaussian(np.zeros(6), np.ones(6))._replace(count=n) for n in counts)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 0, **EXACT)


def test_covariances_of_no_more_images_than_features_are_singular():
    """Which is why FID warns of them: one more image is enough for full rank."""
    ranks = [np.linalg.matrix_rank(metrics.moments(cloud(0, n=n)).cov) for n in (6, 7)]
    assert ranks == [5, 6]


def test_fid_refuses_a_matrix_that_is_no_covariance():
    a, b = gaussian([0, 0], [1, 1]), gaussian([0, 0], [1, 1])
    for wrong in (np.diag([1, -0.1]), -np.eye(2)):
        with pytest.raises(ValueError, match=r"no eigenvalues below 0, got -\d.*\.$"):
            metrics.frechet_distance(a, b._replace(cov=wrong))


def test_moments_come_back_from_their_file(tmp_path):
    found = {
        "pool": metrics.moments(cloud(0)),
        "spatial": metrics.moments(cloud(1, d=1)),
    }
    metrics.save_moments(tmp_path / "m.npz", found)
    back = metrics.load_moments(tmp_path / "m.npz")
    assert back.keys() == found.keys()
    for name, m in found.items():
        assert back[name].count == m.count == 50
        np.testing.assert_array_equal(back[name].mean, m.mean)
        np.testing.assert_array_equal(back[name].cov, m.cov)


def test_moments_of_a_reference_batch_of_guided_diffusion_are_read(tmp_path):
    pool, spatial = gaussian([1, 2], [1, 2]), gaussian([0], [3])
    np.savez(
        tmp_path / "m.npz",
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        mu=pool.mean,
        sigma=pool.cov,
        mu_s=spatial.mean,
        sigma_s=spatial.cov,
    )
    back = metrics.load_moments(tmp_path / "m.npz")
    np.testing.assert_array_equal(back["spatial"].cov, [[9]])
    np.testing.assert_array_equal(back["pool"].mean, [1, 2])
    assert back["pool"].count == 0


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(mu=np.zeros(2)), r"mu and sigma, got \['mu'\]"),
        (dict(sigma=np.eye(2)), r"mu and sigma, got \['sigma'\]"),
        (dict(mu=np.zeros(2), sigma=np.eye(3)), r"got shapes \(2,\) and \(3, 3\)"),
        (dict(mu=np.zeros((2, 1)), sigma=np.eye(2)), r"got shapes \(2, 1\) and"),
        (dict(mu=np.zeros(2), sigma=np.zeros((2, 3))), r"and \(2, 3\)"),
        (dict(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"got shapes \(0,\)"),
        (dict(mu=np.zeros(2), sigma=np.diag([1, np.nan])), "with 1 .* not finite"),
        (dict(mu=np.full(2, np.inf), sigma=np.eye(2)), "with 2 .* not finite"),
        (dict(mu=np.zeros(2), sigma=np.array([[1, 2], [0, 1.0]])), "symmetric sigma"),
        (dict(arr_0=np.zeros(2)), "mu"),
        (dict(mu=np.zeros(1), sigma=np.eye(1), mu_s=np.zeros(2)), "mu_s"),
        (dict(mu=np.array([{}]), sigma=np.eye(1)), "file of plain arrays, got"),
        (dict(mu=np.array(["a"]), sigma=np.eye(1)), "hold numbers, got mu of <U1"),
        (dict(mu=np.zeros(1), sigma=np.eye(1), count=-1), "a count of images, got -1"),
        (dict(mu=np.zeros(1), sigma=np.eye(1), count=np.ones(1)), "a count of images"),
    ],
)
def test_files_that_hold_no_moments_are_refused(arrays, words, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(ValueError, match=rf"m\.npz .*{words}.*\.$"):
        metrics.load_moments(tmp_path / "m.npz")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"text"])
def test_moments_are_not_read_from_what_is_no_file_of_arrays(content, tmp_path):
    if content is not None:
        (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.npz must be a whole \.npz file .*, got"):
        metrics.load_moments(tmp_path / "m.npz")


def test_moments_are_not_read_from_a_single_array(tmp_path):
    np.save(tmp_path / "m.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"m\.npy must be a whole \.npz file .*, got"):
        metrics.load_moments(tmp_path / "m.npy")


@pytest.mark.parametrize("kinds", [("spatial",), ("pool", "logits"), ("pool", "more")])
def test_moments_are_written_of_one_set_of_images_only(kinds, tmp_path):
    m = metrics.moments(cloud(0))
    wrong = {kind: m for kind in kinds}
    if "more" in kinds:
        wrong = {"pool": m, "spatial": m._replace(count=51)}
    with pytest.raises(ValueError, match=r"^moments must be of pool, .* got \["):
        metrics.save_moments(tmp_path / "m.npz", wrong)
    assert not [*tmp_path.iterdir()]


def test_moments_are_told_from_images_by_the_names_in_a_file(tmp_path):
    moments = dict(mu=np.zeros(2), sigma=np.eye(2))
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "moments.npz", **moments)
    np.savez(tmp_path / "both.npz", **moments, arr_0=images)
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.save(tmp_path / "images.npy", images)
    kept = {p.name for p in tmp_path.iterdir() if metrics.holds_moments(p)}
    assert kept == {"moments.npz", "both.npz"}
    assert not metrics.holds_moments(tmp_path)
    assert not metrics.holds_moments(tmp_path / "none.npz")
