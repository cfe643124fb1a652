"""Research code with an Equinox network: it is trained, and sampled from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_diffusion import diffusion, losses, samplers, schedules

SCHEDULE = schedules.make_schedule(schedules.cosine_betas(50))
OBJECTIVE = diffusion.Objective("v")


class Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, x_t, timesteps):
        features = jnp.concatenate([x_t, timesteps[:, None] / 50], axis=-1)
        return jax.vmap(self.mlp)(features)


@eqx.filter_jit
def train(net, tx, key, num_updates):
    def loss_fn(net, key, x_0, t):
        return losses.training_loss(key, net, SCHEDULE, OBJECTIVE, x_0, t).loss.mean()

    def update(carry, key):
        net, opt_state = carry
        key_x, key_t, key_eps = jax.random.split(key, 3)
        x_0 = jnp.where(jax.random.bernoulli(key_x, 0.7, (256, 1)), 0.5, -0.5)
        t = jax.random.randint(key_t, (256,), 0, 50)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(net, key_eps, x_0, t)
        updates, opt_state = tx.update(grads, opt_state)
        return (eqx.apply_updates(net, updates), opt_state), loss

    params, static = eqx.partition(net, eqx.is_array)

    def one(carry, key):
        net = eqx.combine(carry[0], static)
        (net, opt_state), loss = update((net, carry[1]), key)
        return (eqx.filter(net, eqx.is_array), opt_state), loss

    keys = jax.random.split(key, num_updates)
    (params, _), history = jax.lax.scan(one, (params, tx.init(params)), keys)
    return eqx.combine(params, static), history


def test_an_equinox_network_learns_the_two_points_of_its_data():
    net = Net(eqx.nn.MLP(2, 1, 64, 2, key=jax.random.key(0)))
    net, history = train(net, optax.adam(3e-3), jax.random.key(1), 600)
    assert history[-50:].mean() < 0.75 * history[:10].mean()

    @eqx.filter_jit
    def sample(net, keys):
        denoise_fn = diffusion.denoiser(net, SCHEDULE, OBJECTIVE)
        x_T = samplers.normal(keys, (1,))
        return samplers.sample(keys, denoise_fn, samplers.ddpm_step, SCHEDULE, x_T)

    x = sample(net, samplers.image_keys(jax.random.key(2), jnp.arange(1000)))
    near = np.abs(np.abs(x) - 0.5) < 0.1
    assert near.mean() > 0.9 and 0.6 < (np.asarray(x) > 0).mean() < 0.8
