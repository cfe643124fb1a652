"""Denoising diffusion in JAX: pure functions, and a trainer that uses them.

The core needs jax, numpy and jaxtyping, and takes a denoiser from any library:

    schedules   betas in float64 -> NoiseSchedule
    spacing     which steps of it to take
    diffusion   forward process, conversions between eps, x_0, v, mu; the denoiser
    timesteps   which t to train on
    losses      simple, variational and hybrid; weightings
    samplers    DDPM, DDIM, DPM-Solver++, Heun, inpainting; one scan over steps
    guidance    what a label or a classifier adds to a denoiser
    likelihood  bits per dim, term by term and by the ODE; progressive coding
    editing     completing, changing and joining images

Beside it stand, imported only on demand: `models` (Flax networks, and the weights and
names of those that others have released), `training` (the Optax train step), `sharding`
(one mesh for devices and hosts), `data` (training data; anybody's images, as they
are), `checkpoint`, `metrics`, `roofline`, `plotting`, `logs`, `parts`
(arrays of many images in a file), `export` (a sampler in one file), `tasks` (what
samplers are for), `cpu`, and the programs. Of these, `train` has `plan` and `watching`
(scores on the way), `sample` has `asked`, `evaluate` has `evaluation`, `image_scores`,
`scoring`, `extractors` (of features) and `papers`, and all have `settings` and `runs`.

    python -m jax_diffusion.train --config configs/digits.py --workdir runs/digits
    python -m jax_diffusion.sample --workdir runs/digits --out pictures
    python -m jax_diffusion.evaluate --workdir runs/digits
    python -m jax_diffusion.convert --workdir runs/digits --to diffusers --out digits
"""

from jax_diffusion import (
    diffusion,
    editing,
    guidance,
    likelihood,
    losses,
    samplers,
    schedules,
    spacing,
    timesteps,
)

__version__ = "0.1.0"
__all__ = [
    "diffusion",
    "editing",
    "guidance",
    "likelihood",
    "losses",
    "samplers",
    "schedules",
    "spacing",
    "timesteps",
]
