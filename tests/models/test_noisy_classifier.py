"""The classifier of noisy images: its network, its loss and its training."""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jobs import evaluations, lines_of
from support.oracles import F32, F32_SUM, assert_moments, normal
from support.programs import evaluate, sample, train

from jax_diffusion import config as settings
from jax_diffusion import data, diffusion, losses, schedules, timesteps, training
from jax_diffusion.models.noisy_classifier import (
    HIDDEN,
    POOLS,
    AttentionPool,
    NoisyClassifier,
)

# LLVM's optimisation is most of the time that a network takes here, and gains nothing.
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


def test_a_new_adaptive_classifier_finds_all_labels_alike():
    model = NoisyClassifier(**SMALL)
    logits, _ = jit(model.init_with_output)(jax.random.key(0), IMAGES, T)
    np.testing.assert_array_equal(logits, np.zeros((2, 10)))


@pools
def test_batch_mates_do_not_matter_and_timesteps_do(pool):
    model = NoisyClassifier(**SMALL, pool=pool)
    params = random_params(model)
    y = apply(model, params, IMAGES, T)
    other = jnp.stack([IMAGES[1], -IMAGES[0]])
    y_other = apply(model, params, other, jnp.array([3.0, 500.0]))
    np.testing.assert_allclose(y_other[0], y[1], **F32_SUM)
    y_later = apply(model, params, IMAGES, T[::-1])
    assert jnp.abs(y_later - y).max() > 0.01


@pools
def test_bfloat16_network_gives_float32_logits_near_the_float32_network(pool):
    model = NoisyClassifier(**SMALL, pool=pool)
    params = random_params(model)
    exact = apply(model, params, IMAGES, T)
    ours = apply(model.clone(dtype=jnp.bfloat16), params, IMAGES, T)
    assert ours.dtype == jnp.float32
    error = jnp.abs(ours - exact).max() / jnp.abs(exact).max()
    assert 1e-4 < error < 0.05  # bfloat16 rounds by up to 0.004


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
        (dict(multipliers=(1, 2, 2)), (6, 8), "divisible by 4 .* got 6 x 8"),
        (dict(channels=10), (8, 8), "divisible by num_groups = 4 .* got 10"),
        (dict(num_heads=3), (8, 8), "by num_heads = 3, got 8"),
        (dict(head_channels=16), (8, 8), "by head_channels = 16, got 8"),
        (dict(multipliers=(0.01, 1)), (8, 8), "num_groups = 4 .* got 0"),
    ],
)
def test_wrong_names_and_shapes_are_named_in_one_sentence(options, size, message):
    model, x = NoisyClassifier(**SMALL | options), IMAGES[:, : size[0], : size[1]]
    with pytest.raises(ValueError, match=rf"^[^.]*{message}\.(\n|$)"):
        model.init(jax.random.key(0), x, T)


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
    loss = loss_of(normal(6, 4, 6)).loss
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


# Training

STEPS = 240


@functools.cache
def trained():
    """The metrics of a short run on the digits, and what it has learned."""
    schedule = schedules.make_schedule(schedules.cosine_betas(100))
    batches = data.load("digits", batch_size=64)
    sampler = timesteps.stratified(100)
    model = NoisyClassifier(
        **SMALL, pool="attention", head_channels=8, resample="resblock"
    )
    tx, _ = training.make_optimizer(lr=3e-3, total_steps=STEPS, weight_decay=0.05)
    state = jit(
        lambda key: training.init_state(
            key, model, tx, sampler, batches.image_shape, (0.9,)
        )
    )(jax.random.key(0))
    step = jit(
        training.make_train_step(
            model, tx, schedule, None, sampler, ema_decays=(0.9,), ema_warmup=True
        )
    )
    rows = []
    for i in range(STEPS):
        state, metrics = step(jax.random.key(1), state, batches.batch(i))
        rows.append(jax.device_get(metrics))
    return rows, model, state, schedule


def test_training_lowers_the_loss_from_the_log_of_the_number_of_labels():
    losses_ = [row["loss"] for row in trained()[0]]
    assert np.mean(losses_[:3]) > 2  # log(10) = 2.3
    assert np.mean(losses_[-20:]) < 1.6


def test_a_short_run_reads_images_with_little_noise_and_guesses_those_with_much():
    rows = trained()[0][-20:]
    quartiles = [row["quartiles"] for row in rows]
    count = sum(q["count"] for q in quartiles)
    accuracy = sum(q["accuracy"] for q in quartiles) / count
    assert accuracy[0] > 0.7 and accuracy[3] < 0.4  # chance is 0.1
    assert sum(q["top_5"] for q in quartiles)[3] / count[3] > accuracy[3]


def test_quartiles_add_up_to_the_batch():
    row = trained()[0][0]
    assert row["quartiles"]["count"].sum() == 64
    for name in ("accuracy", "top_5"):
        np.testing.assert_allclose(row["quartiles"][name].sum() / 64, row[name], **F32)


def test_its_gradient_leads_noisy_images_to_the_label_it_is_asked_for():
    _, model, state, schedule = trained()
    batch = data.load("digits", "test", batch_size=64, train=False).batch(0)
    x_0 = jnp.asarray(data.from_uint8(batch["image"]))
    t = jnp.full(64, 30)
    x_t = diffusion.q_sample(schedule, x_0, t, normal(8, *x_0.shape))
    wanted = (batch["label"] + 1) % 10

    def log_prob(x):
        logits = model.apply({"params": state.params}, x, schedule.timesteps[t])
        return jax.nn.log_softmax(logits)[jnp.arange(64), wanted]

    @jit
    def grads_and_log_prob(x):
        return jax.grad(lambda x: log_prob(x).sum())(x), log_prob(x)

    grads, before = grads_and_log_prob(x_t)
    lengths = jnp.sqrt(jnp.sum(grads**2, axis=(1, 2, 3), keepdims=True))
    _, after = grads_and_log_prob(x_t + 0.1 * grads / lengths)
    assert jnp.mean(after > before) > 0.95


# The program

RUN = [  # digits_classifier.py, much smaller: what is tested is the loop
    "--config.model.multipliers=(1,)",
    "--config.model.channels=8",
    "--config.model.num_groups=4",
    "--config.model.head_channels=8",
    "--config.schedule.num_steps=10",
    "--config.total_steps=6",
    "--config.log_every=3",
    "--config.save_every=4",
    "--config.sample_every=2",
]


def config_of(*overrides, path="configs/digits_classifier.py"):
    return settings.load_config(path, [*RUN, *overrides])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped: its workdir and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.device_get(train.train(config_of(), workdir))


def test_a_stopped_and_resumed_run_is_bit_identical(whole, tmp_path, monkeypatch):
    batch = data.Batches.batch

    def signalling_batch(self, i, rows=None):
        if i == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, i, rows)

    monkeypatch.setattr(data.Batches, "batch", signalling_batch)
    assert int(train.train(config_of(), tmp_path).step) == 5
    monkeypatch.undo()
    state = jax.device_get(train.train(config_of(), tmp_path))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, state, whole[1])))
    assert lines_of(tmp_path) == lines_of(whole[0])


def test_a_run_logs_accuracy_by_quartile_and_draws_nothing_but_its_loss(whole):
    wanted = {"loss", "accuracy", "top_5", "accuracy_q0", "loss_q3", "top_5_q1"}
    assert wanted <= lines_of(whole[0])[-1].keys()
    assert (whole[0] / "loss.png").exists() and not (whole[0] / "samples").exists()


def run_evaluate(monkeypatch, workdir, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--workdir", str(workdir), *args])
    evaluate.main()


def test_evaluate_prints_how_often_a_classifier_is_right(whole, monkeypatch, capsys):
    run_evaluate(monkeypatch, whole[0])
    (found,) = evaluations(whole[0])
    right = [found["scores"][f"accuracy_q{q}"] for q in range(4)]
    assert found["images"]["accuracy"] == 179
    assert min(right) <= found["scores"]["accuracy"] <= max(right)
    assert f"{found['scores']['accuracy']:.6g}" in capsys.readouterr().out


def test_a_classifier_has_no_samples_and_no_bits(whole, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must be of \['accuracy'\], got 'bpd'"):
        run_evaluate(monkeypatch, whole[0], "--metrics", "bpd")
    argv = ["sample", "--workdir", str(whole[0]), "--out", str(tmp_path), "--steps=4"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError, match="must be of a denoiser, got a classifier's"):
        sample.main()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(objective=dict(loss="l2")), "config.objective must be None for a class"),
        (dict(sampling=dict(n=4)), "config.sampling must be None for a classifier"),
        (dict(model=dict(name="unet")), "config.objective must be None .* no other"),
        (dict(model=dict(name="encoder", num_labels=9)), "num_labels = 9, got 9"),
        (dict(model=dict(name="encoder", num_labls=9)), "did you mean 'num_labels'"),
    ],
)
def test_a_config_that_is_half_a_classifier_is_refused(change, words, tmp_path):
    config = config_of().copy_and_resolve_references()
    with config.unlocked():
        for name, value in change.items():
            config[name] = value
    with pytest.raises(ValueError, match=words):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
