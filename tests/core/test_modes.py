"""Networks of Flax NNX are evaluated with dropout off, however it is switched off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_diffusion import diffusion, guidance, samplers, schedules

nnx = pytest.importorskip("flax.nnx")

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(10))
KEYS = samplers.image_keys(jax.random.key(0), jnp.arange(3))
X, T = jnp.ones((3, 4)), jnp.arange(3)
REFUSED = "model_fn must {}, .* got {} in training mode"


class Dropping(nnx.Module):
    def __init__(self, rate=0.5):
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(0))

    def __call__(self, x_t, timesteps, deterministic=None):
        return self.dropout(x_t, deterministic=deterministic)


class Averaging(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x_t, timesteps):
        return self.norm(x_t)


class Attending(nnx.Module):
    def __init__(self):
        sizes = dict(num_heads=1, in_features=4, decode=False, deterministic=False)
        self.attention = nnx.MultiHeadAttention(
            **sizes, dropout_rate=0.5, rngs=nnx.Rngs(0)
        )

    def __call__(self, x_t, timesteps):
        return self.attention(x_t[:, None])[:, 0]


NETWORK, OFF = Dropping(), Dropping()
OFF.eval()


def top_level(x_t, timesteps):
    return NETWORK(x_t, timesteps)


@functools.wraps(top_level)
def wrapped(*inputs):
    return top_level(*inputs)  # type: ignore


def denoiser(model_fn):
    return diffusion.denoiser(model_fn, SCHEDULE, diffusion.Objective("v"))


def preconditioned(model_fn):
    objective = diffusion.Objective("x_0", precondition=True)
    return diffusion.denoiser(model_fn, SCHEDULE, objective)(X, T).x_0


def sampled(model_fn):
    return samplers.sample(KEYS, denoiser(model_fn), samplers.ddim_step, SCHEDULE, X)


def called(model_fn):
    return denoiser(model_fn)(X, T).x_0


calls = pytest.mark.parametrize("call", [called, preconditioned, sampled])


@calls
@pytest.mark.parametrize(
    "model_fn, layer",
    [
        (NETWORK, "Dropout"),
        (NETWORK.__call__, "Dropout"),
        (functools.partial(NETWORK), "Dropout"),
        (functools.partial(OFF, deterministic=False), "Dropout"),
        (top_level, "Dropout"),
        (jax.tree_util.Partial(top_level), "Dropout"),
        (wrapped, "Dropout"),
        (Averaging(), "BatchNorm"),
        (Attending(), "(MultiHeadAttention|Dropout)"),
    ],
)
def test_a_network_that_drops_or_averages_is_refused(call, model_fn, layer):
    averages = layer == "BatchNorm"
    rule = "be in evaluation mode" if averages else "have its dropout off"
    with pytest.raises(ValueError, match=REFUSED.format(rule, layer)):
        call(model_fn)


@calls
@pytest.mark.parametrize(
    "model_fn",
    [
        OFF,
        functools.partial(NETWORK, deterministic=True),
        lambda x_t, timesteps: NETWORK(x_t, timesteps, deterministic=True),
        nnx.view(NETWORK, deterministic=True),
        nnx.view(Averaging(), use_running_average=True),
        Dropping(rate=0.0),
    ],
)
def test_dropout_that_is_off_in_the_call_is_off(call, model_fn):
    assert np.all(np.isfinite(call(model_fn)))


def test_a_classifier_that_drops_is_refused_and_one_that_does_not_is_not():
    for network, refused in ((NETWORK, True), (OFF, False)):
        log_prob = guidance.label_log_prob(network, T)
        if refused:
            with pytest.raises(ValueError, match="logits_fn must have its dropout off"):
                log_prob(X, T)
        else:
            assert log_prob(X, T).shape == (3,)
