r"""A rectified flow on CIFAR-10, as I-CFM of Tong et al., https://arxiv.org/abs/2302.00482.

Command:
    python -m jax_diffusion.train --config configs/cifar10_flow.py --workdir runs/c10f

Hardware: not run. Theirs took one RTX 2080.
Time: not run.
Result: not run. The authors' code, with an adaptive solver, has FID 3.5 to 3.7 after
400,000 steps.

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

    config.schedule = dict(name="flow", num_steps=1000)
    config.objective = dict(mean_type="flow", var_type="fixed_small", loss="l2")
    config.timesteps = dict(name="low_discrepancy")
    config.model = dict(
        name="unet",
        channels=128,
        multipliers=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=64,
        dropout=0.1,
        scale_shift=False,
    )
    config.optimizer = dict(lr=2e-4, warmup_steps=5000, decay="constant", grad_clip=1.0)
    config.ema_decays = (0.9999,)
    config.ema_warmup = False

    config.total_steps = 400_000
    config.log_every = 100
    config.save_every = 10_000
    config.sample_every = 10_000
    config.sampling = dict(sampler="ddim", steps=100, spacing="trailing", n=64)
    return config
