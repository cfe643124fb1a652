"""The classifier of noisy images: its network, its loss and its training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracles import F32, F32_SUM, assert_moments, normal

from jax_diffusion import diffusion, losses, schedules
from jax_diffusion.models.noisy_classifier import (
    HIDDEN,
    POOLS,
    AttentionPool,
    NoisyClassifier,
)

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = dict(
    num_labels=10,
    channels=8,
    num_groups=4,
    multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
IMAGES = normal(1, 2, 8, 8, 3)
T = jnp.array([999.0, 3.0])

pools = pytest.mark.parametrize("pool", POOLS)


@functools.cache
def param_shapes(model, image_shape):
    x, t = jnp.zeros((1, *image_shape)), jnp.zeros(1)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, t))["params"]


def random_like(shapes):
    """Weights that let signals through, in place of zeros."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        draws = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        return jnp.asarray(draws, jnp.float32)

    return jax.tree.map(draw, shapes)


@functools.partial(jit, static_argnums=0)
def apply(model, params, x, t):
    return model.apply({"params": params}, x, t)


def random_params(model):
    return random_like(param_shapes(model, IMAGES.shape[1:]))


# Sizes


def linear(n_in, n_out, size=1):
    return size * size * n_in * n_out + n_out


def res_block(n_in, n_out, emb):
    skip = linear(n_in, n_out) if n_in != n_out else 0
    convs = linear(n_in, n_out, 3) + linear(n_out, n_out, 3)
    return 2 * n_in + 2 * n_out + convs + linear(emb, 2 * n_out) + skip


def attention(n):
    return 2 * n + linear(n, 3 * n) + linear(n, n)


def size_of(sides, channels, multipliers, depth, at, labels, pool):
    """Parameters by the paper's description, image sides `sides` by level."""
    emb, widths = 4 * channels, [int(m * channels) for m in multipliers]
    total = linear(channels, emb) + linear(emb, emb) + linear(3, widths[0], 3)
    last, features = widths[0], widths[0]
    for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
        for _ in range(depth):
            total += res_block(last, width, emb) + (side in at) * attention(width)
            last, features = width, features + width
        if level < len(widths) - 1:
            total += res_block(width, width, emb)
            features += width
    total += 2 * res_block(last, last, emb) + attention(last)
    features += last
    tokens = sides[-1] ** 2 + 1
    return (
        total
        + {
            "adaptive": 2 * last + linear(last, labels),
            "attention": 2 * last
            + tokens * last
            + linear(last, 3 * last)
            + linear(last, labels),
            "spatial": linear(features, HIDDEN) + linear(HIDDEN, labels),
            "spatial_v2": linear(features, HIDDEN)
            + 2 * HIDDEN
            + linear(HIDDEN, labels),
        }[pool]
    )


RELEASED = dict(
    attention_resolutions=(32, 16, 8), head_channels=64, resample="resblock"
)
MULTIPLIERS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


@pytest.mark.parametrize(
    ("side", "depth", "pool"),
    [
        *((side, 4 if side == 64 else 2, "attention") for side in MULTIPLIERS),
        *((64, 1, pool) for pool in POOLS),
    ],
)
def test_number_of_parameters_is_that_of_the_described_network(side, depth, pool):
    multipliers = MULTIPLIERS[side]
    model = NoisyClassifier(
        multipliers=multipliers, num_res_blocks=depth, pool=pool, **RELEASED
    )
    shapes = param_shapes(model, (side, side, 3))
    count = sum(p.size for p in jax.tree.leaves(shapes))
    sides = [side >> level for level in range(len(multipliers))]
    wanted = size_of(sides, 128, multipliers, depth, (32, 16, 8), 1000, pool)
    assert count == wanted


def test_the_released_256_pixel_classifier_has_54_million_parameters():
    sides, multipliers = (256, 128, 64, 32, 16, 8), MULTIPLIERS[256]
    count = size_of(sides, 128, multipliers, 2, (32, 16, 8), 1000, "attention")
    assert round(count / 1e6) == 54  # Dhariwal & Nichol's guided model: 554 M + 54 M


# The heads


@pytest.mark.slow
def test_attention_pool_is_torch_attention_of_the_mean_token():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, x = AttentionPool(num_labels=5, num_heads=3), normal(2, 2, 4, 3, 12)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    ours = model.apply({"params": params}, x)

    weights = jax.tree.map(lambda p: torch.from_numpy(np.array(p)), params)
    pixels = torch.from_numpy(np.array(x)).reshape(2, 12, 12)
    tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1)
    tokens = tokens + weights["positions"]
    qkv = functional.linear(
        tokens, weights["qkv_proj"]["kernel"].T, weights["qkv_proj"]["bias"]
    )
    # q, k, v first, then heads: what guided diffusion calls the new order.
    q, k, v = (
        part.reshape(2, 13, 3, 4).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
    )
    h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    h = h.reshape(2, 13, 12)[:, 0]
    theirs = functional.linear(
        h, weights["c_proj"]["kernel"].T, weights["c_proj"]["bias"]
    )
    np.testing.assert_allclose(ours, theirs.numpy(), **F32_SUM)


def test_attention_pool_knows_the_place_of_a_pixel_by_its_embedding_alone():
    model, x = AttentionPool(num_labels=5, num_heads=2), normal(3, 1, 3, 3, 8)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    order = np.random.default_rng(0).permutation(9)
    permuted = x.reshape(1, 9, 8)[:, order].reshape(x.shape)

    def change(params):
        y, z = (model.apply({"params": params}, a) for a in (x, permuted))
        return float(jnp.abs(y - z).max())

    assert change(params) > 0.01
    assert change(params | {"positions": jnp.zeros((10, 8))}) < 1e-5


def test_positions_start_with_the_variance_of_one_over_channels():
    def positions(key):
        x = jnp.zeros((1, 8, 8, 64))
        return AttentionPool(num_labels=2).init(key, x)["params"]["positions"]

    drawn = jit(positions)(jax.random.key(0))
    assert drawn.shape == (8 * 8 + 1, 64)
    assert_moments(drawn.ravel(), 0, 1 / 64)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_mirroring_images_and_kernels_changes_no_logit_of_a_mean_over_pixels(pool):
    model = NoisyClassifier(**SMALL, pool=pool, resample="pool")
    params = random_params(model)
    mirrored = jax.tree.map(lambda p: p[:, ::-1] if p.ndim == 4 else p, params)
    y = apply(model, params, IMAGES, T)
    z = apply(model, mirrored, IMAGES[:, :, ::-1], T)
    assert jnp.abs(y).max() > 0.1
    np.testing.assert_allclose(z, y, **F32_SUM)


def test_a_spatial_head_reads_every_stage():
    # Blocks without a last convolution add nothing, so each stage is the one before,
    # and what the mean of the input's convolution is, all features say again.
    model = NoisyClassifier(
        **SMALL | dict(multipliers=(1, 1)), pool="spatial", resample="pool"
    )
    params = random_params(model)
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    for name, block in params.items():
        for last in ("conv_out", "out"):
            if name.startswith(("down", "mid")) and last in block:
                block[last] = zeros(block[last])
    kernel, c = params["hidden"]["kernel"], SMALL["channels"]
    assert kernel.shape[0] == 5 * c  # conv_in, a block, halve, a block, the middle
    for stage in range(5):
        only = jnp.zeros_like(kernel).at[stage * c : (stage + 1) * c].set(kernel[:c])
        hidden = params["hidden"] | {"kernel": only}
        y = apply(model, params | {"hidden": hidden}, IMAGES, T)
        first = y if stage == 0 else first
        np.testing.assert_allclose(y, first, **F32_SUM)


# What must hold of any


@pytest.mark.slow
def test_a_new_adaptive_classifier_finds_all_labels_alike():
    model = NoisyClassifier(**SMALL)
    logits, _ = jit(model.init_with_output)(jax.random.key(0), IMAGES, T)
    np.testing.assert_array_equal(logits, np.zeros((2, 10)))


@pytest.mark.parametrize("resample", ["conv", "pool", "resblock"])
def test_every_way_of_halving_halves(resample):
    model = NoisyClassifier(**SMALL | dict(multipliers=(1, 1, 1)), resample=resample)
    shapes = param_shapes(model.clone(pool="attention"), (8, 16, 3))
    assert shapes["pool"]["positions"].shape == (2 * 4 + 1, 8)
    assert ("down_1_halve" in shapes) == (resample != "pool")


def test_attention_follows_each_block_of_the_heights_asked_for_and_the_middle():
    names = [
        n for n in param_shapes(NoisyClassifier(**SMALL), (8, 8, 3)) if "attention" in n
    ]
    assert set(names) == {"down_1_0_attention", "mid_attention"}


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        (dict(pool="mean"), (8, 8), "pool must be one of .* got 'mean'"),
        (dict(resample="max"), (8, 8), "resample must be one of .* got 'max'"),
        (dict(channels=10), (8, 8), "divisible by num_groups = 4 .* got 10"),
        (dict(num_heads=3), (8, 8), "by num_heads = 3, got 8"),
        (dict(head_channels=16), (8, 8), "by head_channels = 16, got 8"),
        (dict(multipliers=(0.01, 1)), (8, 8), "num_groups = 4 .* got 0"),
    ],
)
def test_wrong_names_and_shapes_are_named_in_one_sentence(options, size, message):
    x = IMAGES[:, : size[0], : size[1]]
    with pytest.raises(ValueError, match=rf"^[^.]*{message}\.(\n|$)"):
        NoisyClassifier(**SMALL | options).init(jax.random.key(0), x, T)


# The loss

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(20), keep=range(0, 20, 2))
X_0, LABEL = normal(4, 4, 3), jnp.array([0, 1, 6, 6])


def loss_of(logits, label=LABEL):
    t = jnp.zeros(4, jnp.int32)
    key, logits_fn = jax.random.key(0), lambda x_t, timesteps: logits
    return losses.classifier_loss(key, logits_fn, SCHEDULE, X_0, t, label)


def test_cross_entropy_of_equal_logits_is_the_log_of_their_number_and_one_is_right():
    terms = loss_of(jnp.full((4, 7), 3.0))
    np.testing.assert_allclose(terms.loss, np.log(7), **F32)
    np.testing.assert_array_equal(terms.accuracy, [1, 0, 0, 0])
    np.testing.assert_array_equal(terms.top_5, [1, 1, 0, 0])


def test_cross_entropy_of_certain_logits_is_zero_if_right_and_their_gap_if_wrong():
    logits = 100.0 * jax.nn.one_hot(jnp.array([0, 1, 6, 2]), 7)
    terms = loss_of(logits)
    np.testing.assert_allclose(terms.loss, [0, 0, 0, 100], **F32)
    np.testing.assert_array_equal(terms.accuracy, [1, 1, 1, 0])


def test_gradient_of_the_loss_is_the_chance_given_less_the_truth():
    logits = normal(5, 4, 7)
    grads = jax.grad(lambda a: loss_of(a).loss.sum())(logits)
    chances = np.exp(np.asarray(logits, np.float64))
    chances /= chances.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(grads, chances - np.eye(7)[LABEL], **F32)


def test_top_5_of_few_labels_is_always_right():
    assert loss_of(normal(6, 4, 3), jnp.array([0, 1, 2, 2])).top_5.min() == 1


def test_a_label_beyond_the_logits_makes_the_loss_nan():
    loss = jax.jit(loss_of)(normal(6, 4, 6), LABEL).loss  # outside jit, refused
    np.testing.assert_array_equal(np.isnan(loss), [False, False, True, True])


def test_the_classifier_sees_x_t_and_the_timesteps_of_the_schedule():
    t, eps, seen = jnp.array([0, 3, 9, 5]), normal(7, 4, 3), []

    def logits_fn(x_t, timesteps):
        seen.extend((x_t, timesteps))
        return jnp.zeros((4, 7))

    key = jax.random.key(0)
    losses.classifier_loss(key, logits_fn, SCHEDULE, X_0, t, LABEL, eps=eps)
    np.testing.assert_array_equal(seen[0], diffusion.q_sample(SCHEDULE, X_0, t, eps))
    np.testing.assert_array_equal(seen[1], [0, 6, 18, 10])
