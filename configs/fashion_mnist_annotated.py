r"""The annotated DDPM on Fashion-MNIST with its own network, 2,996,315 parameters.

Command:
    python -m jax_diffusion.train --config configs/fashion_mnist_annotated.py \
        --workdir runs/annotated --config.data.path=/usr/share/datasets/fashion-mnist

Hardware: not run.
Time: not run.
Result: not run.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    config = fashion_mnist.get_config()
    # As published, the skip of the first stage is lost; full_skip=True mends that.
    config.model = dict(
        name="annotated", channels=28, multipliers=(1, 2, 4), full_skip=False
    )
    return config
