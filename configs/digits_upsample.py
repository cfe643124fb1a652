r"""Digits of 4 x 4 pixels enlarged to 8 x 8: the second stage of a cascade.

The method is that of improved-diffusion: the network also sees the small image. See
digits_small.py for how the two stages are used.

Command:
    python -m jax_diffusion.train --config configs/digits_upsample.py \
        --workdir runs/upsample

Hardware: 2 CPU cores, busy with other work.
Time: 2 min 20 s for 800 steps.
Result: the picture of all tasks in README.md; it has no score.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config: Any = digits.get_config()
    config.low_res_size = 4
    config.model.low_res = True
    return config
