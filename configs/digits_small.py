r"""Digits of 4 x 4 pixels: the first stage of a cascade.

Command:
    python -m jax_diffusion.train --config configs/digits_small.py --workdir runs/small

Then `sample --workdir runs/small --upsample runs/upsample`, see digits_upsample.py.

Hardware: 2 CPU cores. Time: not run. Result: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits_labels


def get_config() -> ConfigDict:
    config: Any = digits_labels.get_config()
    config.data.image_size = 4
    config.total_steps = 800
    return config
