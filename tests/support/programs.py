"""The programs as modules: `jax_diffusion.train` and `.evaluate` are functions."""

import importlib

convert = importlib.import_module("jax_diffusion.convert")
evaluate = importlib.import_module("jax_diffusion.evaluate")
sample = importlib.import_module("jax_diffusion.sample")
train = importlib.import_module("jax_diffusion.train")
