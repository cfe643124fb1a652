r"""Improved DDPM on ImageNet at 64 x 64 pixels, with the hybrid loss.

Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672.

The settings are the flags that the README of openai/improved-diffusion gives for its
unconditional model, "imagenet64_uncond_100M_1500K". It has 121,063,942 parameters.

Command:
    python -m jax_diffusion.train --config configs/imagenet64.py --workdir runs/i64

Hardware: not run.
Time: not run.
Result: not run. The paper has FID 19.2 and 3.57 bits/dim after 1,500,000 steps.

Data: the extra `tfds`, and downsampled_imagenet/64x64 prepared as array_record: see
jax_diffusion/data/tfds.py. If they are decoded into memory, the 1,281,149 images take
15.7 GB, and twice as much while they are read.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.data = dict(
        name="tfds", path="downsampled_imagenet/64x64", split="train", batch_size=128
    )

    config.schedule = dict(name="cosine", num_steps=4000, rescale_timesteps=True)
    config.objective = dict(mean_type="eps", var_type="learned_range", loss="hybrid")
    config.timesteps = dict(name="uniform")
    config.model = dict(
        name="unet",
        channels=128,
        multipliers=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        dropout=0.0,
    )
    config.optimizer = dict(lr=1e-4, warmup_steps=0, decay="constant")
    config.ema_decays = (0.9999,)
    config.ema_warmup = True

    config.total_steps = 1_500_000
    config.log_every = 100
    config.save_every = 10_000
    config.sample_every = 10_000
    config.sampling = dict(sampler="ddim", steps=50, spacing="sections", eta=0.0, n=64)
    config.reproduces = "iddpm_imagenet64_hybrid"
    return config
