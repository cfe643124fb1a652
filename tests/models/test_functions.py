"""Networks made of two functions, as of Haiku or plain JAX, beside one of Flax."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.oracles import normal
from support.own_networks import round_trip
from support.tiny import get_config

from jax_diffusion import models, schedules, timesteps, training
from jax_diffusion.diffusion import Objective
from jax_diffusion.pipeline import load_run, sample_images
from jax_diffusion.train import train

KEY = jax.random.key(0)
X, T = normal(0, 4, 3), jnp.arange(4.0)


class Linen(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, x, timesteps, label, *, angle, train=False):
        told = self.param("told", nn.initializers.ones, (3, 3))
        scale = self.param("scale", nn.initializers.ones, (3,))
        if train:
            scale = scale * jax.random.uniform(self.make_rng("dropout"))
        return scale[None] * x + told[label] + angle[:, None]


def init(key, x, timesteps, *, label, angle):
    return {"scale": jnp.ones(3), "told": [jnp.ones(3)] * 3}


def apply(params, x, timesteps, *, label, angle, train, rngs):
    assert bool(rngs) is train
    scale = params["scale"]
    if train:
        scale = scale * jax.random.uniform(rngs["dropout"])
    return scale[None] * x + jnp.stack(params["told"])[label] + angle[:, None]


def stepped(model):
    """A state after one update, and its metrics; the key of dropout aside."""
    sampler, tx = timesteps.uniform(9), optax.sgd(0.1)
    batch = {"image": X, "label": jnp.arange(4) % 2, "angle": T}
    state = training.init_state(
        KEY, model, tx, sampler, (3,), (0.9,), cond={"angle": T}
    )
    schedule = schedules.make_schedule(schedules.cosine_betas(9))
    step = training.make_train_step(
        *(model, tx, schedule, Objective(), sampler),
        ema_decays=(0.9,),
        label_dropout=0.5,
    )
    return jax.jit(step)(KEY, state, batch)


def test_two_functions_train_as_the_network_of_flax_that_computes_the_same(monkeypatch):
    # Flax folds a name into the key of dropout.
    monkeypatch.setattr(
        nn.Module, "make_rng", lambda self, name: self.scope.rngs[name].rng
    )
    network = models.from_functions(init, apply, num_classes=3)
    (ours, metrics), (flax, flax_metrics) = map(stepped, (network, Linen()))
    np.testing.assert_array_equal(metrics["loss"], flax_metrics["loss"])
    told = ours.params["told"]
    assert sorted(told) == ["0", "1", "2"] and sorted(ours.params) == ["scale", "told"]
    stacked = np.stack([told[name] for name in sorted(told)])
    np.testing.assert_allclose(stacked, flax.params["told"], rtol=1e-6)
    np.testing.assert_allclose(ours.params["scale"], flax.params["scale"], rtol=1e-6)


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)


def bare(x):
    return lambda key, x_0, timesteps: x


REFUSED = {
    "count": (bare({"n": jnp.ones(2, int)}), "parameter n must be a float array"),
    "function": (bare({"act": [nn.relu]}), "parameter act/0 must be a float array"),
    "state": (
        lambda key, x, timesteps: nnx.state(Normed(nnx.Rngs(key))),
        "init must return parameters, and no other variables, got a BatchStat.",
    ),
}


@pytest.mark.parametrize(("init_fn", "begins"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused(init_fn, begins):
    with pytest.raises(ValueError) as error:
        models.from_functions(init_fn, apply).init(KEY, X, T)
    assert str(error.value).startswith(begins)


def test_other_parameters_and_unknown_conditioning_are_refused():
    network = models.from_functions(bare({"a": [X]}), lambda params, x, t, train: x)
    with pytest.raises(
        ValueError, match=r"params must be those that init .*, got others at a"
    ):
        network.apply({"params": {"a": X}}, X, T)
    with pytest.raises(ValueError, match=r"apply must be a function of .*rngs=\), got"):
        network.apply({"params": {"a": {"0": X}}}, X, T)


def points(key, x, timesteps):
    """Parameters as Haiku names them."""
    draw, keys = jax.random.normal, jax.random.split(key, 3)
    sizes = [(3, 64), (64, 64), (64, 2)]
    return {
        f"mlp/~/linear_{i}": {
            "w": draw(keys[i], s) / s[0] ** 0.5,
            "b": jnp.zeros(s[-1]),
        }
        for i, s in enumerate(sizes)
    }


def apply_points(params, x, timesteps, *, train, rngs):
    h = jnp.concatenate([x, timesteps[:, None] / 50], axis=-1)
    for i in range(3):
        layer = params[f"mlp/~/linear_{i}"]
        h = (jax.nn.silu(h) if i else h) @ layer["w"] + layer["b"][None]
    return h


@pytest.mark.slow
def test_two_functions_go_through_the_trainer_checkpoints_samplers_and_export(tmp_path):
    round_trip(models.from_functions(points, apply_points), tmp_path)


def pixels(out_channels, channels=4):
    """What config.model.name may name."""

    def init(key, x, timesteps):
        shape = (2, x.shape[-1] + 1, out_channels)
        return [0.1 * jax.random.normal(key, shape)]

    def apply(params, x, timesteps, *, train, rngs):
        time = jnp.broadcast_to(timesteps[:, None, None, None], (*x.shape[:3], 1))
        h = jnp.concatenate([x, time / 100], axis=-1)
        return h @ params[0][0] + jnp.sin(h) @ params[0][1]

    return models.from_functions(init, apply)


@pytest.mark.slow
def test_the_trainer_and_the_sampler_take_two_functions_by_name(tmp_path):
    config = get_config()
    config.model = dict(name="models.test_functions:pixels", channels=8)
    train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert sorted(run.params) == ["0"] and run.step == config.total_steps
    images = sample_images(run, n=3, steps=2)
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    other = dataclasses.replace(run, params={"0": 0 * run.params["0"]})
    assert not np.array_equal(images, sample_images(other, n=3, steps=2))
