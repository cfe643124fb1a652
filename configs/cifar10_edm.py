r"""EDM on CIFAR-10: Karras et al. 2022, https://arxiv.org/abs/2206.00364.

Command:
    python -m jax_diffusion.train --config configs/cifar10_edm.py --workdir runs/c10e

Hardware: not run. The paper's took two days on 8 V100.
Time: not run.
Result: not run. The paper has FID 1.97 with 35 network calls, after 200 million images.
It augments the images and has the network of DDPM++; this config has neither.

Data: the extra `tfds`, and cifar10 prepared as array_record: see
jax_diffusion/data/tfds.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.data = dict(
        name="tfds", path="cifar10", split="train", batch_size=512, flip=True
    )

    config.schedule = dict(name="edm", num_steps=1000)
    config.objective = dict(
        mean_type="x_0",
        var_type="fixed_small",
        loss="l2",
        weighting="edm",
        sigma_data=0.5,
        precondition=True,
    )
    config.timesteps = dict(name="log_normal", mean=-1.2, std=1.2)
    config.model = dict(
        name="unet",
        channels=128,
        multipliers=(2, 2, 2),
        num_res_blocks=4,
        attention_resolutions=(16,),
        dropout=0.13,
    )
    config.optimizer = dict(lr=1e-3, warmup_steps=19_531, decay="constant")
    config.ema_decays = (0.9993,)  # half of it forgotten after 500,000 images
    config.ema_warmup = True

    config.total_steps = 390_625
    config.log_every = 100
    config.save_every = 10_000
    config.sample_every = 10_000
    config.sampling = dict(sampler="heun", steps=18, spacing="sections", n=64)
    return config
