r"""DDPM on CIFAR-10: Ho et al. 2020, https://arxiv.org/abs/2006.11239.

Command:
    python -m jax_diffusion.train --config configs/cifar10.py --workdir runs/cifar10

Hardware: not run in full. One train step with a batch of 2 was run on 2 CPU cores.
Time: not run.
Result: not run. The paper has FID 3.17 and at most 3.75 bits/dim after 800,000 steps.

Data: the extra `tfds`, and cifar10 prepared as array_record: see
jax_diffusion/data/tfds.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.data = dict(
        name="tfds", path="cifar10", split="train", batch_size=128, flip=True
    )

    config.schedule = dict(name="linear", num_steps=1000)
    config.objective = dict(mean_type="eps", var_type="fixed_large", loss="l2")
    config.timesteps = dict(name="uniform")
    config.model = dict(
        name="unet",
        channels=128,
        multipliers=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        dropout=0.1,
        # Where Ho et al. differ from Improved DDPM:
        scale_shift=False,
        init_style="ho",
        norm_epsilon=1e-6,
        embedding_order="sin_cos",
        embedding_endpoint=True,
        down_padding="bottom_right",
    )
    config.optimizer = dict(lr=2e-4, warmup_steps=5000, decay="constant", grad_clip=1.0)
    config.ema_decays = (0.9999,)
    config.ema_warmup = True

    config.total_steps = 800_000
    config.log_every = 100
    config.save_every = 10_000
    config.sample_every = 10_000
    config.sampling = dict(sampler="ddim", steps=50, spacing="sections", eta=0.0, n=64)
    config.reproduces = "ddpm_cifar10"
    return config
