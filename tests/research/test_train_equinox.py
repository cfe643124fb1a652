"""A network of Equinox in the trainer, checkpoints, samplers and exports."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from support.own_networks import round_trip

from jax_diffusion import models


class Net(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(3, 2, 64, 2, key=key)

    def __call__(self, x, timestep):
        return self.mlp(jnp.append(x, timestep / 50))


STATIC = eqx.filter(Net(jax.random.key(0)), eqx.is_inexact_array, inverse=True)


def init(key, x, timesteps):
    return eqx.filter(Net(key), eqx.is_inexact_array)


def apply(params, x, timesteps, *, train, rngs):
    return jax.vmap(eqx.combine(params, STATIC))(x, timesteps)


@pytest.mark.slow
def test_an_equinox_network_goes_through_the_trainer_checkpoints_samplers_and_export(
    tmp_path,
):
    round_trip(models.from_functions(init, apply), tmp_path)
