"""Eight fake CPU devices, no silent rank promotion, float32 as shipped."""

import os
import typing

import jax

if "JAX_PLATFORMS" not in os.environ:  # say JAX_PLATFORMS=cuda to test on a GPU
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from jax_diffusion import diffusion, schedules  # noqa: E402

# The import hook of jaxtyping checks functions, and that is meant; it would also check
# the fields of dataclasses. Those of a pytree hold anything at times (NumPy arrays,
# ShapeDtypeStructs, strings), and `Objective` has its own words for a wrong name.
typing.no_type_check(schedules.NoiseSchedule)
typing.no_type_check(diffusion.Objective)
