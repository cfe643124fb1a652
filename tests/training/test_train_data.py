"""The train step on data that are no images, with conditioning of any name."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import reduce_on_plateau, schedule_free_adamw
from support.oracles import F32, normal

from jax_diffusion import schedules, timesteps, training
from jax_diffusion.diffusion import Objective

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(20))
KEY = jax.random.key(1)
# LLVM's optimization is most of the time of a test.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Affine(nn.Module):
    """Answers scale * x, plus what it is told by name."""

    @nn.compact
    def __call__(self, x, timesteps, *, angle=None, tokens=None, train=False):
        scale = self.param("scale", nn.initializers.constant(2.0), ())
        shape = (-1, *(1 for _ in x.shape[1:]))
        told = 0.0 if angle is None else angle.reshape(shape)
        if tokens is not None:
            told += tokens.sum((1, 2)).reshape(shape)
        return scale * x + told


def build(shape, model=None, tx=None, cond=None, **options):
    model, tx, sampler = model or Affine(), tx or optax.sgd(0.1), timesteps.uniform(20)
    parts = (model, tx, sampler, shape, (0.9,))
    state = training.init_state(jax.random.key(0), *parts, cond=cond)
    step = training.make_train_step(
        model, tx, SCHEDULE, Objective(), sampler, ema_decays=(0.9,), **options
    )
    return step, state


def noised(x_0):
    """x_t and eps of the first step, by the keys that a step has always split."""
    key_t, key_eps, _ = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    t = jax.random.randint(key_t, (len(x_0),), 0, 20)
    shape = (-1, *(1 for _ in x_0.shape[1:]))
    signal, noise = (a[t].reshape(shape) for a in SCHEDULE.now[:2])
    eps = jax.random.normal(key_eps, x_0.shape)
    return signal * x_0 + noise * eps, eps


@pytest.mark.parametrize("microbatches", [1, 4])
@pytest.mark.parametrize("shape", [(2,), (5, 3), (2, 3, 4, 1)])
def test_float_data_of_any_rank_are_taken_as_they_are(shape, microbatches):
    x_0 = 3 * normal(0, 8, *shape)  # beyond [-1, 1]
    cond = {"angle": normal(1, 8), "tokens": normal(2, 8, 3, 2)}
    step, state = build(shape, cond=cond, microbatches=microbatches)
    _, metrics = jit(step)(KEY, state, {"image": x_0, **cond})
    x_t, eps = noised(x_0)
    told = (cond["angle"] + cond["tokens"].sum((1, 2))).reshape(-1, *(1 for _ in shape))
    np.testing.assert_allclose(
        metrics["loss"], np.mean((2 * x_t + told - eps) ** 2), rtol=1e-5
    )


def test_uint8_data_are_scaled_and_labels_are_not_needed():
    step, state = build((4, 4, 1))
    image = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
    _, metrics = jit(step)(KEY, state, {"image": image})
    x_t, eps = noised(image / np.float32(127.5) - 1)
    np.testing.assert_allclose(metrics["loss"], np.mean((2 * x_t - eps) ** 2), **F32)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, timesteps, *, train=False):
        return nn.BatchNorm(use_running_average=not train)(x)


class Enlarger(nn.Module):
    @nn.compact
    def __call__(self, x, timesteps, *, low_res, train=False):
        return x + low_res


class Told(nn.Module):
    num_classes: int = 3

    @nn.compact
    def __call__(self, x, timesteps, label, *, train=False):
        return x + nn.Embed(3, 1)(label)


def trace(step, state, batch):
    jax.eval_shape(step, KEY, state, batch)


X = normal(0, 8, 2)
REFUSED = {
    "optimizer": (
        "tx must need no more than gradients, parameters and value=, got TypeError: "
        "scale_by_zoom_linesearch.<locals>.update_fn() missing 2 required keyword-only "
        "arguments: 'grad' and 'value_fn'.",
        lambda: trace(*build((2,), tx=optax.lbfgs()), {"image": X}),
    ),
    "state": (
        "model must be a network without variables besides its parameters, got one "
        "with batch_stats.",
        lambda: build((2,), Normed()),
    ),
    "unknown": (
        "model must be a function of (x, timesteps, pitch=), got one of "
        "(x, timesteps, angle, tokens, train).",
        lambda: trace(*build((2,)), {"image": X, "pitch": X}),
    ),
    "label": (
        "batch must have 'label', which the network takes or learns, got ['image'].",
        lambda: trace(*build((2,), Told()), {"image": X}),
    ),
    "low_res": (
        "low_res_size must be 0 where the batch has 'low_res', got 2.",
        lambda: trace(
            *build((2,), Enlarger(), cond={"low_res": X}, low_res_size=2),
            {"image": X, "low_res": X},
        ),
    ),
}


@pytest.mark.parametrize("kind", [TypeError, AttributeError])
def test_an_error_inside_an_optimizer_comes_as_it_is(kind):
    def update(updates, state, params=None):
        raise kind("unsupported operand")

    tx = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(kind, match=r"^unsupported operand"):
        trace(*build((2,), tx=tx), {"image": X})


@pytest.mark.parametrize(("sentence", "call"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_in_a_sentence(sentence, call):
    with pytest.raises(ValueError, match=rf"^{re.escape(sentence)}(\n|$)"):
        call()


TOLD = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros(()),
    lambda grads, state, params=None, *, value, **_: (grads, value),
)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_optimizer_that_wants_a_value_is_told_the_loss_of_the_batch(microbatches):
    step, state = build((2,), tx=optax.chain(TOLD), microbatches=microbatches)
    after, metrics = jit(step)(KEY, state, {"image": X})
    assert after.opt_state[0] == metrics["loss"] > 0


def test_polyak_steps_are_the_loss_over_the_gradients_norm():
    step, state = build((2,), tx=optax.polyak_sgd(max_learning_rate=1e9, eps=0.0))
    _, metrics = jit(step)(KEY, state, {"image": X})
    exact = metrics["loss"] / metrics["grad_norm"]
    np.testing.assert_allclose(metrics["update_norm"], exact, **F32)


def test_multisteps_update_after_every_third_batch():
    tx = optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    step, state = build((2,), tx=tx)
    step, scales = jax.jit(step, donate_argnums=1), []
    for _ in range(6):
        state, _ = step(KEY, state, {"image": X})
        scales.append(float(state.params["scale"]))
    assert scales[0] == scales[1] == 2.0 and len({*scales[2:5]}) == 1
    assert len({scales[1], scales[2], scales[5]}) == 3


@pytest.mark.parametrize(
    "tx",
    [schedule_free_adamw(1e-2), optax.chain(optax.adam(1e-2), reduce_on_plateau())],
)
def test_a_state_that_is_donated_keeps_its_types(tx):
    step, state = build((2,), tx=tx)
    kinds = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for _ in range(2):
        state, metrics = jax.jit(step, donate_argnums=1)(KEY, state, {"image": X})
    assert kinds == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics["update_norm"] > 0
