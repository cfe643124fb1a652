"""Research code with a Flax NNX network, `nnx.jit` and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_diffusion import diffusion, losses, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(50))
OBJECTIVE = diffusion.Objective("v")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inside = nnx.Linear(2, 64, rngs=rngs)
        self.middle = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.01, rngs=rngs)
        self.outside = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x_t, timesteps):
        h = jnp.concatenate([x_t, timesteps[:, None] / 50], axis=-1)
        h = self.dropout(nnx.silu(self.middle(nnx.silu(self.inside(h)))))
        return self.outside(h)


@nnx.jit
def update(net, optimizer, key):
    key_x, key_t, key_eps = jax.random.split(key, 3)
    x_0 = jnp.where(jax.random.bernoulli(key_x, 0.7, (256, 1)), 0.5, -0.5)
    t = jax.random.randint(key_t, (256,), 0, 50)

    def loss_fn(net):
        terms = losses.training_loss(key_eps, net, SCHEDULE, OBJECTIVE, x_0, t)
        return terms.loss.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(net)
    optimizer.update(net, grads)
    return loss


@nnx.jit
def sample(net, keys):
    denoise_fn = diffusion.denoiser(net, SCHEDULE, OBJECTIVE)
    x_T = samplers.normal(keys, (1,))
    return samplers.sample(keys, denoise_fn, samplers.ddpm_step, SCHEDULE, x_T)


def test_an_nnx_network_learns_and_is_not_sampled_while_its_dropout_is_on():
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)
    history = [update(net, optimizer, jax.random.key(i)) for i in range(600)]
    assert np.mean(history[-50:]) < 0.75 * np.mean(history[:10])
    keys = samplers.image_keys(jax.random.key(2), jnp.arange(1000))
    with pytest.raises(ValueError, match="model_fn must have its dropout off"):
        sample(net, keys)
    net.eval()
    x = np.asarray(sample(net, keys))
    assert (np.abs(np.abs(x) - 0.5) < 0.2).mean() > 0.8
    assert 0.6 < (x > 0).mean() < 0.8
