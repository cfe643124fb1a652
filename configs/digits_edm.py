r"""EDM on scikit-learn's 8 x 8 digits, beside the default run, digits.py.

Command:
    python -m jax_diffusion.train --config configs/digits_edm.py --workdir runs/edm

Hardware: 2 CPU cores.
Time: not run.
Result: not run.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
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
    config.sampling = dict(sampler="heun", steps=18, spacing="sections", n=100)
    return config
