r"""The default run with labels, for classifier-free guidance.

One label in ten is hidden from the network in training. num_classes = 10 counts the ten
digits; `config.build` adds the class of hidden labels.

Command:
    python -m jax_diffusion.train --config configs/digits_labels.py \
        --workdir runs/labels

Then draw with guidance:
    python -m jax_diffusion.sample --workdir runs/labels --out threes --label 3 \
        --guidance 2

Hardware: 2 CPU cores, busy with other work.
Time: 2 min 42 s for 1,600 steps.
Result: the Frechet distance in raw pixels between 1,797 samples (DDIM, 50 steps) and
the digits is 0.13, between two halves of the digits 0.26.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config: Any = digits.get_config()
    config.label_dropout = 0.1
    config.model.num_classes = 10
    config.total_steps = 1600
    return config
