r"""The annotated DDPM's setting on Fashion-MNIST: T = 200, Huber loss, Adam 1e-3.

The tutorial's betas rise from 1e-4 to 0.02 whatever T is. With T = 200 this leaves a
third of the signal in x_T. Here they are multiplied by 1000 / T, so that x_T is noise.

Command:
    python -m jax_diffusion.train --config configs/fashion_mnist.py \
        --workdir runs/fashion --config.data.path=/usr/share/datasets/fashion-mnist

The folder holds the four IDX files; this one is of Debian's dataset-fashion-mnist.

Hardware: 2 CPU cores.
Time: 0.28 s a step, 11 minutes for the five epochs of this file, half an hour for 14.
Result: a Huber loss of 0.021 after 14 epochs (--config.total_steps=6562). The scores
are in tests/benchmarks/README.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.data = dict(
        name="idx", path="data/fashion-mnist", split="train", batch_size=128, flip=True
    )

    config.schedule = dict(name="linear", num_steps=200)
    config.objective = dict(mean_type="eps", var_type="fixed_small", loss="huber")
    config.timesteps = dict(name="uniform")
    config.model = dict(
        name="unet",
        channels=16,
        multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(7,),
        num_groups=8,
    )
    config.optimizer = dict(lr=1e-3, warmup_steps=0, decay="constant")
    config.ema_decays = (0.995,)
    config.ema_warmup = True

    config.total_steps = 5 * 60_000 // 128  # five epochs
    config.log_every = 20
    config.save_every = 500
    config.sample_every = 500
    config.sampling = dict(sampler="ddim", steps=50, spacing="sections", eta=0.0, n=64)
    return config
