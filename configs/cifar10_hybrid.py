r"""Improved DDPM on CIFAR-10 with the hybrid loss: https://arxiv.org/abs/2102.09672.

Command:
    python -m jax_diffusion.train --config configs/cifar10_hybrid.py --workdir runs/c10h

Hardware: not run in full. One train step with a batch of 2 was run on 2 CPU cores.
Time: not run.
Result: not run. The paper has FID 3.19 and 3.17 bits/dim after 500,000 steps.

Data: the extra `tfds`, and cifar10 prepared as array_record: see
jax_diffusion/data/tfds.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.data = dict(name="tfds", path="cifar10", split="train", batch_size=128)

    config.schedule = dict(name="cosine", num_steps=4000, rescale_timesteps=True)
    config.objective = dict(mean_type="eps", var_type="learned_range", loss="hybrid")
    config.timesteps = dict(name="uniform")
    config.model = dict(
        name="unet",
        channels=128,
        multipliers=(1, 2, 2, 2),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
        num_heads=4,
        dropout=0.3,
    )
    config.optimizer = dict(lr=1e-4, warmup_steps=0, decay="constant")
    config.ema_decays = (0.9999,)
    config.ema_warmup = True

    config.total_steps = 500_000
    config.log_every = 100
    config.save_every = 10_000
    config.sample_every = 10_000
    config.sampling = dict(sampler="ddim", steps=50, spacing="sections", eta=0.0, n=64)
    config.reproduces = "iddpm_cifar10_hybrid"
    return config
