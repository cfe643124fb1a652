"""Eight fake CPU devices, no silent rank promotion, float32 as shipped."""

import os
import typing

import jax

if "JAX_PLATFORMS" not in os.environ:  # say JAX_PLATFORMS=cuda to test on a GPU
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jax_diffusion import diffusion  # noqa: E402

# jaxtyping's import hook checks the arguments of dataclasses before these can, and
# `Objective` has its own words for a wrong name.
typing.no_type_check(diffusion.Objective)
