"""A network of Flax NNX in the trainer, checkpoints, samplers and exports."""

import jax.numpy as jnp
import pytest
from flax import nnx
from support.own_networks import round_trip

from jax_diffusion import models


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inside = nnx.Linear(3, 64, rngs=rngs)
        self.middle = nnx.Linear(64, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.01)
        self.outside = nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x, timesteps, rngs):
        h = jnp.concatenate([x, timesteps[:, None] / 50], axis=-1)
        h = nnx.silu(self.middle(nnx.silu(self.inside(h))))
        return self.outside(self.dropout(h, rngs=rngs))


GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))


def init(key, x, timesteps):
    return nnx.split(Net(nnx.Rngs(key)), nnx.Param)[1]


def apply(params, x, timesteps, *, train, rngs):
    net = nnx.merge(GRAPH, params)
    net.train() if train else net.eval()
    return net(x, timesteps, nnx.Rngs(**rngs))


@pytest.mark.slow
def test_an_nnx_network_goes_through_trainer_checkpoints_samplers_export(tmp_path):
    round_trip(models.from_functions(init, apply), tmp_path)
