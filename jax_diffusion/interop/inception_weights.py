"""Translates pytorch-fid's file of Inception-v3 weights into our parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from jax_diffusion.interop.layouts import check_same
from jax_diffusion.interop.tensors import Tensor, as_float32
from jax_diffusion.models.inception import SIZE, Inception

# The published file of github.com/mseitzer/pytorch-fid has 95,628,359 bytes. Its name
# holds the first digits of its hash, as PyTorch's hub requires.
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

NORM_EPSILON = 1e-3
NORM = ("weight", "bias", "running_mean", "running_var")


def params_from_torch(tensors: Mapping[str, Tensor | np.ndarray]) -> PyTree:
    """Makes the parameters of `models.inception.Inception` of pytorch-fid's state dict.

    Each convolution absorbs the batch norm that follows it, with running mean m and
    variance v: the kernel becomes gain / sqrt(v + 1e-3) times itself, the bias becomes
    bias - m gain / sqrt(v + 1e-3). This is computed in float64.

    Args:
        tensors: arrays by PyTorch's names, as `torch_files.read_torch` returns them for
            the file at `URL`. Tensors `num_batches_tracked` are ignored.

    Returns:
        A tree of float32 NumPy arrays.

    Raises:
        ValueError: if tensors are missing, unexpected or of another shape; the error
            names all of them. Or if they are not finite floats.
    """
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.uint8)
    init = jax.eval_shape(Inception().init, jax.random.key(0), image)
    flat: dict[tuple[str, ...], Any] = flatten_dict(init["params"])
    kernels = {  # kernel shape [*size, in, out] of every convolution by its name
        ".".join(path[:-1]): array.shape
        for path, array in flat.items()
        if path[0] != "fc" and path[-1] == "kernel"
    }
    wanted: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, (*size, c_in, c_out) in kernels.items():
        wanted[f"{name}.conv.weight"] = (c_out, c_in, *size)
        wanted |= {f"{name}.bn.{kind}": (c_out,) for kind in NORM}
    counts = {f"{name}.bn.num_batches_tracked" for name in kernels}
    found = {name: np.shape(tensors[name]) for name in tensors if name not in counts}
    check_same(wanted, found)

    def read(name):
        return as_float32(name, tensors[name])

    params: dict[tuple[str, ...], np.ndarray] = {}
    params["fc", "kernel"] = read("fc.weight").T
    for name in kernels:
        gain, bias, mean, var = (
            read(f"{name}.bn.{kind}").astype(np.float64) for kind in NORM
        )
        if np.any(var < 0):
            raise ValueError(
                f"variances must be >= 0, got {var.min()} in {name}.bn.running_var."
            )
        scale = gain / np.sqrt(var + NORM_EPSILON)
        kernel = np.transpose(read(f"{name}.conv.weight"), (2, 3, 1, 0)) * scale
        path = tuple(name.split("."))
        params[*path, "kernel"] = np.asarray(kernel, np.float32)
        params[*path, "bias"] = np.asarray(bias - mean * scale, np.float32)
    return unflatten_dict(params)
