"""Research code with a Flax NNX network, `nnx.jit` and dropout."""

import jax
import optax
import pytest
from flax import nnx
from support import two_points


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inside, self.middle, self.outside = (
            nnx.Linear(*sizes, rngs=rngs) for sizes in ((2, 64), (64, 64), (64, 1))
        )
        self.dropout = nnx.Dropout(0.01, rngs=rngs)

    def __call__(self, x_t, timesteps):
        h = nnx.silu(self.inside(two_points.features(x_t, timesteps)))
        return self.outside(self.dropout(nnx.silu(self.middle(h))))


@nnx.jit
def update(net, optimizer, key):
    loss, grads = nnx.value_and_grad(two_points.loss)(net, key)
    optimizer.update(net, grads)
    return loss


@pytest.mark.slow
def test_an_nnx_network_learns_and_is_not_sampled_while_its_dropout_is_on():
    net, sample = Net(nnx.Rngs(0)), nnx.jit(two_points.sample)
    optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)
    history = [update(net, optimizer, jax.random.key(i)) for i in range(600)]
    keys = jax.random.split(jax.random.key(2), 1000)
    with pytest.raises(ValueError, match="model_fn must have its dropout off"):
        sample(net, keys)
    net.eval()
    two_points.assert_learned(history, sample(net, keys), within=0.2, share=0.8)
