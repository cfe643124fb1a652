"""A network that is traced and saved in a moment, and the config of runs of it.

For tests of what stands around a network: processes, kills, resumes, devices. It has
what the trainer must deal with: labels, dropout, a kernel that is large enough to be
split over devices.
"""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import smoke

CONFIG = "tests/support/tiny.py"


class TinyNet(nn.Module):
    """Two convolutions, between which timestep and label are added."""

    out_channels: int
    channels: int = 32
    num_classes: int = 10
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x, timesteps, label, *, train=False):
        shift = nn.Dense(self.channels)(jnp.log1p(timesteps)[:, None])
        shift += nn.Embed(self.num_classes, self.channels, name="label")(label)
        h = nn.Conv(self.channels, (3, 3))(x) + shift[:, None, None]
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = nn.silu(nn.Conv(self.channels, (3, 3))(h))
        return nn.Conv(self.out_channels, (3, 3))(h)


def get_config() -> ConfigDict:
    """smoke.py with its loss-aware sampler, over in a moment."""
    config = smoke.get_config()
    config.model = dict(name="support.tiny:TinyNet", channels=32)
    config.schedule.num_steps = 10
    config.timesteps.history = 1
    config.total_steps, config.log_every = 12, 2
    config.save_every, config.sample_every, config.keep = 4, 100, 10
    config.sampling.n, config.sampling.steps = 4, 2
    return config
