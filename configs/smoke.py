r"""The smallest run that uses everything: for tests, and to try a new machine.

Command:
    python -m jax_diffusion.train --config configs/smoke.py --workdir runs/smoke

Hardware: 2 CPU cores.
Time: half a minute, most of it compilation.
Result: the loss falls; the samples are noise.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    # Mirrored digits are no digits: flip=True only tries that option.
    config.data = dict(name="digits", split="train", batch_size=16, flip=True)

    config.schedule = dict(name="cosine", num_steps=50, rescale_timesteps=True)
    config.objective = dict(mean_type="eps", var_type="learned_range", loss="hybrid")
    config.timesteps = dict(name="loss_second_moment", history=2, uniform_prob=1e-3)
    config.model = dict(
        name="unet",
        channels=8,
        multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_groups=4,
        num_classes=10,
        dropout=0.1,
    )
    config.optimizer = dict(lr=2e-3, warmup_steps=10, decay="constant", grad_clip=1.0)
    config.ema_decays = (0.99, 0.9)
    config.ema_warmup = True

    config.total_steps = 40
    config.log_every = 10
    config.save_every = 20
    config.sample_every = 40
    config.sampling = dict(sampler="ddim", steps=5, spacing="sections", eta=0.0, n=16)
    return config
