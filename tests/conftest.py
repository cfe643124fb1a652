"""Eight fake CPU devices, no silent rank promotion, float32 as shipped."""

import gc
import os
import tempfile
import typing

import jax
import pytest

if "JAX_PLATFORMS" not in os.environ:  # say JAX_PLATFORMS=cuda to test on a GPU
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation is most of the suite's time: within a session, and in the programs that it
# starts, nothing is compiled twice. The folder is new each time, unless one is given.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="jax_diffusion_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

from support import lowering, xla_options  # noqa: E402

os.environ.setdefault("XLA_FLAGS", xla_options.FLAGS)
lowering.share_contexts()

from jax_diffusion import diffusion, pipeline  # noqa: E402

# jaxtyping's import hook checks the arguments of dataclasses before these can, and
# these have words of their own for wrong values.
for options in (diffusion.Objective, pipeline.SamplingOptions, pipeline.TaskOptions):
    typing.no_type_check(options)


LONG = ("_hosts", "_survival", "_conditioning", "_classifier", "_ema", "_inception")
LONG += ("_meshes", "_chains", "_x64", "_colab")
# Tracing makes millions of small objects, and JAX has a callback at every collection.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    """Long modules first: what takes longest must not be left for last."""
    items.sort(key=lambda item: not item.path.stem.endswith(LONG))


def pytest_collection_finish(session):
    """What is imported and collected by now lives on: it is not looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of `jobs` live."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder):
    """A run by this process, of eight devices."""
    from support.jobs import train_here

    train_here(folder / "alone")
    return folder / "alone"
