"""The train step and what surrounds it."""

from jax_diffusion.training.step import *  # noqa: F403
