"""Editing with a sampler: RePaint, SDEdit, inversion; draws from a posterior.

Each function is a few lines around `samplers.sample` and takes one key for each image.
What is known of an image is a mask or a projection, see `samplers.inpaint`: `gray` and
`block_mean` are projections, which colorize and enlarge. Any other measurement of it is
a likelihood, see `dps` and `twisted_smc`.

    projections  gray, block_mean, shrink
    inpainting   repaint, renoise
    levels       edit, descend, reconstruct, between_noises
    measured     dps, twisted_smc
"""

from jax_diffusion.editing.inpainting import renoise, repaint
from jax_diffusion.editing.levels import between_noises, descend, edit, reconstruct
from jax_diffusion.editing.measured import dps, twisted_smc
from jax_diffusion.editing.projections import block_mean, gray, grey, shrink

__all__ = [
    "between_noises",
    "block_mean",
    "descend",
    "dps",
    "edit",
    "gray",
    "grey",
    "reconstruct",
    "renoise",
    "repaint",
    "shrink",
    "twisted_smc",
]
