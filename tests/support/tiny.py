"""Configs of runs that are over in a moment, and a network that is traced in one.

For tests of what stands around a network: processes, kills, resumes, devices. The tiny
network has what the trainer must deal with: labels, dropout, a kernel that is large
enough to be split over devices.
"""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import smoke

CONFIG = "tests/support/tiny.py"
SHORT = {  # fields of a run that is over in a moment
    **{"schedule.num_steps": 10, "timesteps.history": 1, "total_steps": 12},
    **{"log_every": 2, "save_every": 4, "sample_every": 100, "keep": 10},
    **{"sampling.n": 4, "sampling.steps": 2},
}
SMALL = [  # flags of a short run of smoke.py's U-Net, of one level
    *(f"--config.{field}={value}" for field, value in SHORT.items()),
    *("--config.model.multipliers=(1,)", "--config.model.attention_resolutions=()"),
    "--config.model.num_res_blocks=0",
]


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
    config.update_from_flattened_dict(SHORT)
    return config
