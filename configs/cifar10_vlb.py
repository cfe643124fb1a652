r"""Improved DDPM on CIFAR-10 with the loss "vlb" and importance-sampled timesteps.

Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, section 3.3.

Command:
    python -m jax_diffusion.train --config configs/cifar10_vlb.py --workdir runs/c10v

Hardware: not run.
Time: not run.
Result: not run. The paper has 2.94 bits/dim and FID 11.47 after 500,000 steps.
"""

from ml_collections import ConfigDict

from configs import cifar10_hybrid


def get_config() -> ConfigDict:
    config = cifar10_hybrid.get_config()
    config.objective = dict(mean_type="eps", var_type="learned_range", loss="vlb")
    config.timesteps = dict(name="loss_second_moment")
    config.reproduces = "iddpm_cifar10_vlb"
    return config
