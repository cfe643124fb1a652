"""Training with vectors and tokens: what is learned, hidden, resumed and refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.oracles import normal
from support.programs import train
from support.tiny_runs import UNET, tiny_config

from jax_diffusion import (
    data,
    diffusion,
    guidance,
    samplers,
    schedules,
    timesteps,
    training,
)
from jax_diffusion.models import bind, traits
from jax_diffusion.models.unet import UNet
from jax_diffusion.runtime import checkpoint
from jax_diffusion.training import setup

KEY = jax.random.key(2)
N = 512
RNG = np.random.default_rng(0)
COLORS = RNG.uniform(-0.8, 0.8, (N, 2)).astype(np.float32)  # of the two channels
MASK = np.eye(2, dtype=bool)[np.arange(N) % 2]  # one of two tokens counts
TOKENS = np.where(MASK, COLORS[:, 1:], RNG.uniform(-0.8, 0.8, (N, 2)))[:, :, None]
TOLD = dict(cond=COLORS[:, :1], tokens=TOKENS, tokens_mask=MASK)
MODEL = UNET | dict(name="unet", cond_dim=1, token_dim=1, attention_resolutions=(4,))


def write(path, **told):
    """Images of one color: `cond` tells its first channel, a token the second one."""
    images = np.rint((COLORS[:, None, None] + np.zeros((1, 4, 4, 1)) + 1) * 127.5)
    np.savez(path, images=images.astype(np.uint8), **{**TOLD, **told})
    return path


def config_of(path, model=MODEL, **changes):
    fields = dict(label_dropout=0.2, sample_every=0) | changes
    return tiny_config(path, model=model, **fields)


@pytest.mark.slow
def test_a_small_network_learns_what_a_vector_and_a_token_say(tmp_path):
    batches = data.load("npz", path=write(tmp_path / "a.npz"), batch_size=32)
    fields = {name: value for name, value in MODEL.items() if name != "name"}
    model, sampler, tx = (
        UNet(**fields, out_channels=2),
        timesteps.uniform(8),
        optax.adam(3e-3),
    )
    schedule = schedules.make_schedule(schedules.cosine_betas(8))
    state = training.init_state(KEY, model, tx, sampler, (4, 4, 2), (0.98,))
    step = jax.jit(
        training.make_train_step(
            *(model, tx, schedule, objective := diffusion.Objective("x_0"), sampler),
            **dict(ema_decays=(0.98,), label_dropout=0.2),
        )
    )
    for i in range(500):
        state, _ = step(KEY, state, batches.batch(i))
    params = state.ema_params["0.98"]
    told = {
        name: jnp.asarray(array[:64]) for name, array in batches.conditioning.items()
    }

    def model_fn(x_t, t, **told):
        return bind(model, params, None, **told)(x_t, t)

    denoise_fn = diffusion.denoiser(model_fn, schedule, objective)

    @jax.jit
    def colors(scale):
        guided = guidance.classifier_free(denoise_fn, told, traits(model).null, scale)
        keys = samplers.image_keys(KEY, jnp.arange(64))
        x_T = samplers.normal(keys, (4, 4, 2))
        x_0 = samplers.sample(keys, guided, samplers.ddim_step, schedule, x_T)
        return x_0.mean((1, 2))

    wanted = COLORS[np.arange(N) % 10 != 9][:64]  # every tenth is for tests
    error, blind = ((np.asarray(colors(s)) - wanted).std(0) for s in (1.0, 0.0))
    assert (error < 0.35 * wanted.std(0)).all(), error
    assert (blind > 0.8 * wanted.std(0)).all(), blind


def test_batches_of_a_config_have_the_conditioning_that_the_network_takes(tmp_path):
    path = write(tmp_path / "images.npz")
    batch = setup.make_setup(config_of(path)).batches.batch(0)
    assert batch.keys() == {"image", "label", "cond", "tokens", "tokens_mask"}


class Told(nn.Module):
    """Adds all that it is told to the image."""

    cond_dim: int = 3
    token_dim: int = 3
    num_classes: int = 5

    @nn.compact
    def __call__(self, x, t, label, *, cond, tokens, tokens_mask, train=False):
        told = cond + (tokens * tokens_mask[..., None]).sum(1)
        told += jax.nn.one_hot(label, self.num_classes)[:, :3]
        return nn.Dense(3)(x) + told[:, None, None]


@pytest.mark.slow
def test_a_step_with_all_hidden_is_that_of_null_conditioning_and_label():
    sampler, tx = timesteps.uniform(9), optax.sgd(0.1)
    told = dict(label=jnp.arange(4) % 4, cond=normal(1, 4, 3))
    told |= dict(tokens=normal(2, 4, 2, 3), tokens_mask=jnp.ones((4, 2), bool))
    null = dict(label=jnp.full(4, 4), tokens_mask=jnp.zeros((4, 2), bool))
    null |= {name: 0 * told[name] for name in ("cond", "tokens")}
    state = training.init_state(KEY, Told(), tx, sampler, (4, 4, 3), (0.9,))
    schedule = schedules.make_schedule(schedules.cosine_betas(9))

    def loss(batch, share):
        step = training.make_train_step(
            *(Told(), tx, schedule, diffusion.Objective(), sampler),
            **dict(ema_decays=(0.9,), label_dropout=share),
        )
        return jax.jit(step)(KEY, state, dict(image=normal(3, 4, 4, 4, 3), **batch))[1][
            "loss"
        ]

    np.testing.assert_array_equal(loss(told, 1.0), loss(null, 0.0))
    assert loss(told, 0.0) != loss(told, 0.5) != loss(told, 1.0)


def test_a_network_without_conditioning_leaves_that_of_the_data_alone_and_says_so(
    tmp_path, caplog
):
    path = write(tmp_path / "images.npz")
    config = config_of(path, MODEL | dict(cond_dim=0, token_dim=0), label_dropout=0.0)
    with caplog.at_level("INFO", logger="jax_diffusion.data"):
        assert setup.make_setup(config).batches.batch(0).keys() == {"image", "label"}
    for name, field in (("cond", "cond_dim"), ("tokens", "token_dim")):
        told = f"{name} of the data is not used: config.model.{field} is 0"
        assert told in caplog.messages


@pytest.mark.parametrize(
    ("told", "changes", "sentence"),
    [
        (
            dict(cond=COLORS),
            {},
            r"cond of the training images must be \[n, 1\] .* got \[461, 2\]",
        ),
        (
            {},
            dict(model=MODEL | dict(token_dim=2)),
            r"tokens of the .* must be \[n, k, 2\]",
        ),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused(
    tmp_path, told, changes, sentence
):
    path = write(tmp_path / "images.npz", **told)
    with pytest.raises(ValueError, match=sentence):
        setup.make_setup(config_of(path, **changes))


@pytest.mark.slow
def test_a_run_with_conditioning_resumes_bit_for_bit_and_knows_its_data(tmp_path):
    path = write(tmp_path / "images.npz")

    def run(steps, workdir):
        network = dict(name="support.networks:TinyTold")
        return train.train(config_of(path, network, total_steps=steps), workdir)

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "run")
    parts = run(4, tmp_path / "run")
    same = jax.tree.map(np.array_equal, *map(jax.device_get, (whole, parts)))
    assert all(jax.tree.leaves(same))
    record = checkpoint.load_record(tmp_path / "run")["conditioning"]
    assert {name: of["shape"] for name, of in record.items()} == {
        **{"cond": [1], "tokens": [2, 1], "tokens_mask": [2]}
    }
    write(path, cond=-TOLD["cond"])
    told = "data.path: other conditioning than the run was trained with"
    with pytest.raises(ValueError, match=told):
        run(6, tmp_path / "run")
