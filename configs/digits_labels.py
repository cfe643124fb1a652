r"""Digits by label, for classifier-free guidance: the default run that is told labels.

Command:
    python -m jax_diffusion.train --config configs/digits_labels.py \
        --workdir runs/labels

Then `sample --workdir runs/labels --label 3 --guidance 2`.

Hardware: 2 CPU cores. Time: not run. Result: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config: Any = digits.get_config()
    config.label_dropout = 0.1
    config.model.num_classes = 11  # ten digits, and one that means hidden
    config.total_steps = 1600
    return config
