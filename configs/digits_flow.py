r"""A rectified flow on scikit-learn's 8 x 8 digits, beside the default run, digits.py.

Command:
    python -m jax_diffusion.train --config configs/digits_flow.py --workdir runs/flow

Hardware: 2 CPU cores.
Time: not run.
Result: not run.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.schedule = dict(name="flow", num_steps=1000)
    config.objective = dict(mean_type="flow", var_type="fixed_small", loss="l2")
    config.timesteps = dict(name="logit_normal")
    config.sampling = dict(sampler="ddim", steps=50, spacing="trailing", eta=0.0, n=100)
    return config
