"""A classifier of noisy images is trained, resumed and scored."""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jobs import evaluations, lines_of
from support.oracles import F32, normal
from support.programs import evaluate, sample, train

from jax_diffusion import config as settings
from jax_diffusion import data, diffusion, schedules, timesteps, training
from jax_diffusion.models.noisy_classifier import (
    NoisyClassifier,
)

# LLVM's optimization is most of the time that a network takes here, and gains nothing.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL = dict(
    num_labels=10,
    channels=8,
    num_groups=4,
    multipliers=(1, 2),
    num_res_blocks=0,
    attention_resolutions=(4,),
)
# Training

STEPS = 300


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


@pytest.mark.slow
def test_training_lowers_the_loss_from_the_log_of_the_number_of_labels():
    losses_ = [row["loss"] for row in trained()[0]]
    assert np.mean(losses_[:3]) > 2  # log(10) = 2.3
    assert np.mean(losses_[-20:]) < 1.6


@pytest.mark.slow
def test_a_short_run_reads_images_with_little_noise_and_guesses_those_with_much():
    rows = trained()[0][-20:]
    quartiles = [row["quartiles"] for row in rows]
    count = sum(q["count"] for q in quartiles)
    accuracy = sum(q["accuracy"] for q in quartiles) / count
    assert accuracy[0] > 0.7 and accuracy[3] < 0.4  # chance is 0.1
    assert sum(q["top_5"] for q in quartiles)[3] / count[3] > accuracy[3]


@pytest.mark.slow
def test_quartiles_add_up_to_the_batch():
    row = trained()[0][0]
    assert row["quartiles"]["count"].sum() == 64
    for name in ("accuracy", "top_5"):
        np.testing.assert_allclose(row["quartiles"][name].sum() / 64, row[name], **F32)


@pytest.mark.slow
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
    "--config.schedule.num_steps=10",
    "--config.total_steps=6",
    "--config.log_every=3",
    "--config.save_every=4",
    "--config.sample_every=2",
]


def config_of(*overrides, path="configs/digits_classifier.py"):
    config = settings.load_config(path, [*RUN, *overrides])
    config.model = dict(name="support.networks:TinyClassifier", num_labels=10)
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped: its workdir and its last state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.device_get(train.train(config_of(), workdir))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_logs_accuracy_by_quartile_and_draws_nothing_but_its_loss(whole):
    wanted = {"loss", "accuracy", "top_5", "accuracy_q0", "loss_q3", "top_5_q1"}
    assert wanted <= lines_of(whole[0])[-1].keys()
    assert (whole[0] / "loss.png").exists() and not (whole[0] / "samples").exists()


def run_evaluate(monkeypatch, workdir, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--workdir", str(workdir), *args])
    evaluate.main()


@pytest.mark.slow
def test_evaluate_prints_how_often_a_classifier_is_right(whole, monkeypatch, capsys):
    run_evaluate(monkeypatch, whole[0])
    (found,) = evaluations(whole[0])
    right = [found["scores"][f"accuracy_q{q}"] for q in range(4)]
    assert found["images"]["accuracy"] == 179
    assert min(right) <= found["scores"]["accuracy"] <= max(right)
    assert f"{found['scores']['accuracy']:.6g}" in capsys.readouterr().out


@pytest.mark.slow
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
