"""Scores of sets for which they are known; statistics of few pixels."""

import numpy as np
import pytest
from scipy import linalg
from support.oracles import assert_mean

from jax_diffusion import data, metrics
from jax_diffusion.metrics import ChannelStats, Moments

EXACT = dict(rtol=1e-9, atol=1e-9)


def rotation(d):
    return np.linalg.qr(np.random.default_rng(d).normal(size=(d, d)))[0]


def gaussian(mean, std, axes=None):
    """A Gaussian with these standard deviations along these axes."""
    axes = np.eye(len(std)) if axes is None else axes
    return Moments(100, np.array(mean, float), axes * np.square(std) @ axes.T)


def cloud(seed, n=50, d=6):
    """Features that are neither centred nor uncorrelated."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def line(*places):
    return np.array(places, float)[:, None]


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


def test_distance_of_diagonal_gaussians_is_that_of_means_and_standard_deviations():
    a, b = gaussian([0, 1, 2], [1, 2, 3]), gaussian([1, 1, 0], [4, 2, 1])
    ours = metrics.frechet_distance(a, b)
    np.testing.assert_allclose(ours, (1 + 0 + 4) + (9 + 0 + 4), **EXACT)


def test_distance_does_not_depend_on_the_axes_that_covariances_share():
    axes = rotation(3)
    a, b = (
        gaussian([0, 1, 2], [1, 2, 3], axes),
        gaussian([1, 1, 0], [4, 2, 1], axes),
    )
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 5 + 13, **EXACT)


def test_distance_is_right_where_covariances_do_not_commute():
    a, b = gaussian([0, 0], [1, 3]), gaussian([0, 0], [2, 5], rotation(2))
    # The eigenvalues of a root r of cov_a cov_b: (tr r)^2 = tr r^2 + 2 det r.
    root_trace = np.sqrt(np.trace(a.cov @ b.cov) + 2 * (1 * 3 * 2 * 5))
    expected = (1 + 9) + (4 + 25) - 2 * root_trace
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, **EXACT)


def test_distance_of_scalar_features_is_that_of_means_and_standard_deviations():
    a = metrics.moments(np.array([[-1.0], [1.0]]))  # variance 2
    b = metrics.moments(np.array([[1.0], [5.0]]))  # mean 3, variance 8
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 9 + 2, **EXACT)


def test_distance_to_itself_is_zero():
    a = metrics.moments(cloud(0))
    np.testing.assert_allclose(metrics.frechet_distance(a, a), 0, **EXACT)


def test_distance_is_symmetric():
    a, b = metrics.moments(cloud(0)), metrics.moments(cloud(1))
    there, back = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
    assert there > 1
    np.testing.assert_allclose(there, back, **EXACT)


def test_distance_to_a_line_follows_the_variance_along_it():
    along = np.array([3.0, 4.0, 0.0])
    line = Moments(100, np.zeros(3), np.outer(along, along))
    full = gaussian([0, 0, 0], [1, 2, 3], rotation(3))
    # cov_a is a a^T: the product has one eigenvalue, a^T cov_b a.
    expected = 25 + (1 + 4 + 9) - 2 * np.sqrt(along @ full.cov @ along)
    for a, b in [(line, full), (full, line)]:
        ours = metrics.frechet_distance(a, b)
        np.testing.assert_allclose(ours, expected, **EXACT)


def test_distance_is_right_with_fewer_images_than_features():
    features = cloud(0, n=5, d=20)
    a, b = metrics.moments(features), metrics.moments(features[::-1] + 2)
    for other, distance in ((a, 0), (b, 20 * 2**2)):
        with pytest.warns(UserWarning, match="of 20 features needs more than 20 .* 5:"):
            ours = metrics.frechet_distance(a, other)
        np.testing.assert_allclose(ours, distance, **EXACT)


@pytest.mark.parametrize("shape", [(5,), (1, 3), (2, 3, 3)], ids=str)
def test_moments_need_rows_of_features_and_two_at_least(shape):
    with pytest.raises(
        ValueError, match=r"^features must be \[n, d\] with n >= 2, got"
    ):
        metrics.moments(np.zeros(shape))


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), (1, 3, 3)], ids=str)
def test_batches_need_rows_of_features_and_one_at_least(shape):
    with pytest.raises(
        ValueError, match=r"^features must be \[n, d\] with n >= 1, got"
    ):
        metrics.update(None, np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value):
    good, bad = np.zeros((2, 5, 3))
    bad[2, 1] = value
    for call in (
        lambda: metrics.moments(bad),
        lambda: metrics.update(None, bad),
        lambda: metrics.inception_score(bad, splits=1),
        lambda: metrics.kernel_distance(good, bad),
        lambda: metrics.precision_recall(good, bad),
    ):
        with pytest.raises(ValueError, match=r"^features must be finite, got NaN or"):
            call()


def test_distance_needs_features_of_one_dimension():
    a, b = gaussian([0, 0], [1, 1]), gaussian([0, 0, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=r"^both sets .* got 2 and 3\.$"):
        metrics.frechet_distance(a, b)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_uneven_batches_merge_to_the_moments_of_one(offset):
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


def test_merging_does_not_depend_on_order_and_hosts():
    a, b, c = (metrics.moments(cloud(seed, n=10 + seed)) for seed in range(3))
    left = metrics.merge(metrics.merge(a, b), c)
    right = metrics.merge(metrics.merge(c, a), b)
    for ours, others in zip(left, right, strict=True):
        np.testing.assert_allclose(ours, others, rtol=1e-12, atol=1e-12)


def test_moments_without_a_count_cannot_be_merged():
    unknown = gaussian([0, 0], [1, 1])._replace(count=0)
    with pytest.raises(ValueError, match=r"needs known counts, got 0 and 100\.$"):
        metrics.merge(unknown, gaussian([0, 0], [1, 1]))


def test_moments_of_other_features_cannot_be_merged():
    with pytest.raises(ValueError, match=r"equally many features, got 2 and 1\.$"):
        metrics.merge(gaussian([0, 0], [1, 1]), gaussian([0], [1]))


def test_a_single_row_has_its_place_and_no_variance_until_others_come():
    one = metrics.update(None, np.array([[1.0, 2.0]]))
    assert one.count == 1
    np.testing.assert_array_equal(one.mean, [1, 2])
    np.testing.assert_array_equal(one.cov, np.zeros((2, 2)))
    two = metrics.update(one, np.array([[3.0, 2.0]]))
    np.testing.assert_array_equal(two.cov, [[2, 0], [0, 0]])


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_distance_of_rank_deficient_gaussians_is_right(rank):
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
def test_distance_to_low_rank_on_other_axes_is_that_of_a_small_matrix(rank):
    """With cov = F F^T, the root of (F_a^T F_b)(F_a^T F_b)^T has the same trace."""
    rng = np.random.default_rng(rank)
    f, g = rng.normal(size=(64, 5)), rng.normal(size=(64, rank))
    a, b = (Moments(100, np.zeros(64), x @ x.T) for x in (f, g))
    root = linalg.sqrtm((f.T @ g) @ (g.T @ f))  # [5, 5] and well conditioned
    expected = np.sum(f**2) + np.sum(g**2) - 2 * np.trace(root)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-10)
    np.testing.assert_allclose(metrics.frechet_distance(b, a), expected, rtol=1e-10)


def test_variances_a_trillion_times_smaller_count():
    stds = np.geomspace(1e-6, 1, 16)
    a, b = (gaussian(np.zeros(16), x, rotation(16)) for x in (stds, stds[::-1]))
    expected = np.sum((stds - stds[::-1]) ** 2)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), expected, rtol=1e-8)


def test_distance_to_a_point_is_all_the_variance():
    point = gaussian(np.zeros(3), np.zeros(3))
    full = gaussian([1, 2, 2], [1, 2, 3], rotation(3))
    np.testing.assert_allclose(metrics.frechet_distance(point, full), 9 + 14, **EXACT)
    assert metrics.frechet_distance(point, point) == 0


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9])
def test_distance_is_that_of_scipys_root_on_nearly_singular_covariances(smallest):
    d = 24
    stds = np.geomspace(smallest, 1, d)
    a = gaussian(np.zeros(d), stds, rotation(d))
    b = gaussian(np.ones(d), stds[::-1] * 2, np.roll(rotation(d), 3, axis=0))
    root = linalg.sqrtm(a.cov @ b.cov)
    told = d + np.trace(a.cov + b.cov) - 2 * np.trace(root).real
    np.testing.assert_allclose(metrics.frechet_distance(a, b), told, rtol=1e-6)


def test_distance_to_a_gaussian_on_other_axes_is_the_closed_form_of_two_dimensions():
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
def test_no_more_images_than_features_are_warned_of(counts):
    a, b = (gaussian(np.zeros(6), np.ones(6))._replace(count=n) for n in counts)
    with pytest.warns(UserWarning, match=r"^a Frechet distance of 6 .* than 6 .*\.$"):
        metrics.frechet_distance(a, b)


@pytest.mark.parametrize("counts", [(7, 7), (0, 7), (0, 0)], ids=str)
def test_more_images_than_features_and_unknown_counts_are_not_warned_of(counts):
    a, b = (gaussian(np.zeros(6), np.ones(6))._replace(count=n) for n in counts)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 0, **EXACT)


def test_images_no_more_than_features_have_a_singular_covariance():
    """Which is why the distance warns of them: one more is enough for full rank."""
    ranks = [np.linalg.matrix_rank(metrics.moments(cloud(0, n=n)).cov) for n in (6, 7)]
    assert ranks == [5, 6]


def test_a_matrix_that_is_no_covariance_has_no_distance():
    a, b = gaussian([0, 0], [1, 1]), gaussian([0, 0], [1, 1])
    for wrong in (np.diag([1, -0.1]), -np.eye(2)):
        with pytest.raises(ValueError, match=r"no eigenvalues below 0, got -\d.*\.$"):
            metrics.frechet_distance(a, b._replace(cov=wrong))


# --- Inception score, kernel distance, precision and recall


def test_certain_and_even_answers_have_the_score_of_their_number():
    """E KL to the mean is log k for k labels that are equally frequent and certain."""
    for k in (2, 10):
        logits = 800.0 * np.eye(k)[np.arange(1000) % k]  # exp(-800) is 0 in float64
        score = metrics.inception_score(logits)
        np.testing.assert_allclose(score.value, k, rtol=1e-9)
        np.testing.assert_allclose(score.error, 0, atol=1e-9)


def test_answers_that_do_not_differ_have_the_score_1():
    logits = np.tile(np.random.default_rng(0).normal(size=(1, 8)), (100, 1)) + 1e3
    np.testing.assert_allclose(metrics.inception_score(logits).value, 1, rtol=1e-9)


def test_parts_of_an_inception_score_are_in_order():
    """The first half knows one label, the second two: scores 1 and 2."""
    labels = np.append(np.zeros(50, int), np.arange(50) % 2)
    score = metrics.inception_score(800.0 * np.eye(2)[labels], splits=2)
    np.testing.assert_allclose(score, (1.5, 0.5), rtol=1e-9)


def test_kernel_distance_of_points_is_the_closed_form():
    """All of a at one point and all of b at another: k(a, a) + k(b, b) - 2 k(a, b)."""
    a, b = np.tile([[1.0, 0.0]], (10, 1)), np.tile([[1.0, 2.0]], (12, 1))
    expected = 1.5**3 + 3.5**3 - 2 * 1.5**3
    value, error = metrics.kernel_distance(a, b)
    np.testing.assert_allclose((value, error), (expected, 0), rtol=1e-12, atol=1e-12)


def test_kernel_distance_of_few_points_can_be_counted():
    """k(x, y) = (x y + 1)^3, between other points only: 1, 343, and 1, 1, 27, 64."""
    value, _ = metrics.kernel_distance(line(0, 1), line(2, 3), subsets=2)
    np.testing.assert_allclose(value, 1 + 343 - 2 * (1 + 1 + 27 + 64) / 4, rtol=1e-12)


def test_kernel_distance_of_gaussians_is_on_average_that_of_their_moments():
    """With (x y + 1)^3 = 1 + 3 x y + 3 (x y)^2 + (x y)^3, it is 3 d_1^2 + 3 d_2^2 +
    d_3^2, where d_k are the differences of E x^k: 1, 1, 4 for N(0, 1) and N(1, 1).
    """
    draws = np.random.default_rng(0).normal(size=(300, 2, 50, 1))
    found = [metrics.kernel_distance(a, b + 1, subsets=1).value for a, b in draws]
    assert_mean(found, 22)


def test_kernel_distance_of_one_distribution_is_0_on_average():
    rng = np.random.default_rng(0)
    found = [
        metrics.kernel_distance(*rng.normal(size=(2, 40, 4)), subsets=1).value
        for _ in range(400)
    ]
    assert abs(np.mean(found)) < 5 * np.std(found) / 400**0.5
    assert min(found) < 0  # unbiased: it cannot be above 0 always


def test_kernel_distance_of_few_images_is_not_said_to_be_certain():
    a, b = np.random.default_rng(0).normal(size=(2, 40, 4))
    assert metrics.kernel_distance(a, b).error > 0


def test_kernel_distance_draws_the_same_subsets_for_the_same_seed():
    a, b = cloud(0), cloud(1)
    one, same, other = (
        metrics.kernel_distance(a, b, subset_size=20, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one.error > 0


def test_precision_and_recall_of_points_that_can_be_counted():
    """Balls of the first neighbour: around 0, 1 of radius 1; around 10 of radius 9."""
    reference = line(0, 1, 10)
    features = line(-0.9, 2.1, 0.5, 19.5)
    found = metrics.precision_recall(features, reference, neighbours=1)
    # 2.1 is 1.1 from 1, but 7.9 from 10; 19.5 is 9.5 from 10. Radii of the features:
    # 1.4 at -0.9 and 0.5, 1.6 at 2.1, 17.4 at 19.5, which reaches 10.
    np.testing.assert_allclose(found, (3 / 4, 1), rtol=1e-6)


def test_a_point_on_the_edge_of_a_ball_is_within():
    """The ball around 5 reaches 1 and 9. Around their mean 2, the numbers are exact."""
    found = metrics.precision_recall(line(9, 9.5), line(0, 1, 5), neighbours=1)
    assert found == (1 / 2, 0)


def test_precision_of_one_set_is_the_recall_of_the_other():
    a, b = cloud(0, n=200, d=3), cloud(1, n=150, d=3)
    precision, recall = metrics.precision_recall(a, b)
    assert 0 < precision < recall < 1 or 0 < recall < precision < 1
    assert metrics.precision_recall(b, a) == (recall, precision)


def test_precision_and_recall_do_not_depend_on_where_the_origin_is():
    a, b = cloud(0, n=200, d=8), cloud(1, n=200, d=8)
    found = metrics.precision_recall(a, b)
    assert found != (0, 0) and metrics.precision_recall(a + 1e6, b + 1e6) == found


def test_equal_sets_have_both_and_distant_ones_neither():
    features = cloud(0, n=100, d=3).astype(np.float32)
    assert metrics.precision_recall(features, features) == (1, 1)
    assert metrics.precision_recall(features, features + 1e3) == (0, 0)


def test_copies_are_within_their_own_balls_of_radius_0():
    rng = np.random.default_rng(0)
    # Like Inception's features, most of them low: float32 rounds products one way.
    points = np.repeat(np.maximum(rng.normal(size=(60, 2048)), 0), 5, axis=0)
    assert metrics.precision_recall(points, points[::-1]) == (1, 1)
    assert metrics.precision_recall(points[::3], points, block=7).precision == 1


@pytest.mark.parametrize("apart, expected", [(0.04, (1, 1)), (0.2, (0, 0))])
def test_points_are_one_if_closer_than_float32_can_tell(apart, expected):
    """Than 0.003 of their distance from the mean, which is 26 here."""
    rng = np.random.default_rng(0)
    points = np.repeat(np.maximum(rng.normal(size=(60, 2048)), 0), 5, axis=0)
    shifted = points + apart * (np.arange(2048) == 0)
    assert metrics.precision_recall(shifted, points) == expected


def test_a_lost_mode_costs_recall_and_not_precision():
    rng = np.random.default_rng(0)
    modes = np.array([0.0, 20.0])[rng.integers(0, 2, 400)]
    reference = modes[:, None] + rng.normal(size=(400, 2))
    features = rng.normal(size=(400, 2))
    precision, recall = metrics.precision_recall(features, reference)
    assert precision > 0.9 and 0.35 < recall < 0.6


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_change_nothing(block):
    a, b = cloud(0, n=70), cloud(1, n=50)
    whole = metrics.precision_recall(a, b)
    assert metrics.precision_recall(a, b, block=block) == whole


# --- files


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


def test_a_reference_batch_of_guided_diffusion_is_read(tmp_path):
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


def test_a_single_array_is_no_file_of_moments(tmp_path):
    np.save(tmp_path / "m.npy", np.eye(2))
    with pytest.raises(ValueError, match=r"m\.npy must be a whole \.npz file .*, got"):
        metrics.load_moments(tmp_path / "m.npy")


def test_files_are_written_of_one_set_of_images_only(tmp_path):
    m = metrics.moments(cloud(0))
    for wrong in (
        {"spatial": m},
        {"pool": m, "logits": m},
        {"pool": m, "spatial": m._replace(count=51)},
    ):
        with pytest.raises(ValueError, match=r"^moments must be of pool, .* got \["):
            metrics.save_moments(tmp_path / "m.npz", wrong)
    assert not (tmp_path / "m.npz").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"text"])
def test_what_is_no_file_of_arrays_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.npz must be a whole \.npz file .*, got"):
        metrics.load_moments(tmp_path / "m.npz")


def test_scores_of_too_few_points_are_refused():
    five, four = np.zeros((5, 3)), np.zeros((4, 4))
    for call, words in (
        (lambda: metrics.inception_score(five), "splits must be 1 to 5, .* got 10"),
        (lambda: metrics.inception_score(five, splits=0), "got 0"),
        (lambda: metrics.inception_score(np.zeros(5)), r"\[n, d\] .* got shape \(5,\)"),
        (lambda: metrics.kernel_distance(five, five[:1]), r"n >= 2, got .*\(1, 3\)"),
        (lambda: metrics.kernel_distance(five, four), "equally many .* 3 and 4"),
        (lambda: metrics.kernel_distance(five, five, subset_size=6), "2 to 5 .* of 6"),
        (lambda: metrics.kernel_distance(five, five, subset_size=1), "2 to 5 .* of 1"),
        (lambda: metrics.kernel_distance(five, five, subsets=0), "got 0 of 2"),
        (lambda: metrics.precision_recall(five, five[:3]), "below 3, .* got 3 and"),
        (lambda: metrics.precision_recall(five, four), "equally many .* 3 and 4"),
        (lambda: metrics.precision_recall(five, five, neighbours=0), "got 0 and 1024"),
        (lambda: metrics.precision_recall(five, five, block=0), "got 3 and 0"),
    ):
        with pytest.raises(ValueError, match=words + r"[^.]*\.$"):
            call()


# --- colours


def images_of(*channels):
    """One row of pixels, from a list of values a channel."""
    return np.array(channels, np.uint8).T[None, None]


def test_black_is_minus_one_white_is_one_and_neither_varies():
    stats = metrics.channel_stats(images_of([0, 0], [255, 255]))
    np.testing.assert_array_equal(stats.mean, [-1, 1])
    np.testing.assert_array_equal(stats.std, [0, 0])


def test_half_black_half_white_has_mean_zero_and_deviation_one():
    stats = metrics.channel_stats(images_of([0, 255, 255, 0]))
    assert (stats.mean, stats.std) == ([0], [1])


def test_channels_are_counted_apart_and_images_and_pixels_together():
    images = images_of([0, 51, 204, 255], [0, 0, 0, 255]).reshape(2, 1, 2, 2)
    stats = metrics.channel_stats(images)
    # -1, -0.6, 0.6, 1 and -1, -1, -1, 1
    np.testing.assert_allclose(stats.mean, [0, -0.5], **EXACT)
    np.testing.assert_allclose(stats.std, [np.sqrt(0.68), np.sqrt(0.75)], **EXACT)
    assert stats.mean.dtype == stats.std.dtype == np.float64


def test_scale_is_that_on_which_networks_see_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 3), np.uint8)
    stats, x = metrics.channel_stats(images), data.from_uint8(images)
    tolerance = dict(rtol=0, atol=1e-6)  # of float32 pixels
    np.testing.assert_allclose(stats.mean, x.mean(axis=(0, 1, 2)), **tolerance)
    np.testing.assert_allclose(stats.std, x.std(axis=(0, 1, 2)), **tolerance)


def test_one_odd_pixel_in_a_million_is_not_lost_to_rounding():
    n = 10**6
    images = np.full((1, 1000, 1000, 1), 255, np.uint8)
    images[0, 0, 0, 0] = 254
    stats = metrics.channel_stats(images)
    np.testing.assert_allclose(stats.mean, 1 - 1 / n / 127.5, rtol=1e-15)
    np.testing.assert_allclose(stats.std, np.sqrt(n - 1) / n / 127.5, rtol=1e-15)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
    ids=["float32", "one image", "none"],
)
def test_channel_statistics_need_uint8_images(images):
    with pytest.raises(
        ValueError, match=r"^images must be uint8 \[n, h, w, c\] .* got"
    ):
        metrics.channel_stats(images)


def test_log_shows_samples_beside_data_channel_by_channel():
    samples = ChannelStats(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    whole = ChannelStats(np.array([0.5, 0.6]), np.array([0.7, 0.8]))
    assert metrics.colour_metrics(samples, whole) == {
        **{"samples_mean_0": 0.1, "samples_mean_1": 0.2},
        **{"samples_std_0": 0.3, "samples_std_1": 0.4},
        **{"data_mean_0": 0.5, "data_mean_1": 0.6},
        **{"data_std_0": 0.7, "data_std_1": 0.8},
    }


def test_log_refuses_grey_samples_beside_colours():
    grey, colour = (metrics.channel_stats(np.zeros((1, 2, 2, c), "u1")) for c in (1, 3))
    with pytest.raises(ValueError, match=r"equally many channels, got 1 and 3\.$"):
        metrics.colour_metrics(grey, colour)
