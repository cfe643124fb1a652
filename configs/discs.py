r"""Coloured discs, drawn by the package itself: the smallest run with colours.

Command:
    python -m jax_diffusion.train --config configs/discs.py --workdir runs/discs

Hardware: 2 CPU cores. Time: not run. Result: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config: Any = digits.get_config()
    config.data = dict(name="synthetic", split="train", image_size=8, batch_size=64)
    return config
