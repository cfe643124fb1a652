"""Research code with an Equinox network: it is trained, and sampled from."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from support import two_points

from jax_diffusion import samplers

TX = optax.adam(3e-3)


class Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, x_t, timesteps):
        return jax.vmap(self.mlp)(two_points.features(x_t, timesteps))


@eqx.filter_jit
def update(net, opt_state, key):
    loss, grads = eqx.filter_value_and_grad(two_points.loss)(net, key)
    updates, opt_state = TX.update(grads, opt_state)
    return eqx.apply_updates(net, updates), opt_state, loss


@pytest.mark.slow
def test_an_equinox_network_learns_the_two_points_of_its_data():
    net = Net(eqx.nn.MLP(2, 1, 64, 2, key=jax.random.key(0)))
    opt_state, history = TX.init(eqx.filter(net, eqx.is_array)), []
    for key in jax.random.split(jax.random.key(1), 600):
        net, opt_state, loss = update(net, opt_state, key)
        history.append(loss)
    keys = samplers.image_keys(jax.random.key(2), jnp.arange(1000))
    x = eqx.filter_jit(two_points.sample)(net, keys)
    two_points.assert_learned(history, x, within=0.1, share=0.9)
